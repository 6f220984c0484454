"""Generated arithmetic modulo 10: a task that a tiny model learns on a CPU in minutes, with nothing to download.

`3*2+6*3-3*3=` is worked strictly from left to right, every value modulo 10: 6, 2, 6, 3, 9. The answer is `#9`, and a
response may write the running values first, as in `62639#9`, which makes each step easy. Reinforcement learning has
to discover this.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from troll_jax.data.tasks.interface import check_split

if TYPE_CHECKING:
    from datasets import Dataset

CHARACTERS = '0123456789+-*=#'
"""The characters of prompts and responses, for `data.tokenizer.character_tokenizer`."""

_DIGITS = '0123456789'
_OPERATORS = {'+': int.__add__, '-': int.__sub__, '*': int.__mul__}
_PROBLEM = re.compile(r'\d([-+*]\d)+=')
_HELD_OUT = 8  # one problem in so many is for testing


def running_values(problem: str) -> list[int]:
    """The value after each operator: [6, 2, 6, 3, 9] for '3*2+6*3-3*3='; the last one is the answer.

    Raises:
        ValueError: not a problem of this task.
    """
    if not _PROBLEM.fullmatch(problem):
        raise ValueError(f'Got the problem {problem!r}; expected digits joined by + - * and a final =, like 3*2+6=.')
    value, values = int(problem[0]), []
    for operator, digit in zip(problem[1:-1:2], problem[2:-1:2], strict=True):
        value = _OPERATORS[operator](value, int(digit)) % 10
        values.append(value)
    return values


def demonstration(problem: str, worked: bool) -> str:
    """A correct response: '62639#9' worked, '#9' bare. For the supervised warm start."""
    values = running_values(problem)
    return (''.join(map(str, values)) if worked else '') + f'#{values[-1]}'


def is_held_out(problem: str) -> bool:
    """True if a problem belongs to the test split: by a stable hash of its text, the same in every process and run."""
    digest = hashlib.blake2b(problem.encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'big') % _HELD_OUT == 0


@dataclass(frozen=True)
class Arithmetic:
    """Left-to-right arithmetic modulo 10 with one-digit operands.

    Args:
        operands: digits in a problem, at least 2; a prompt has 2 · operands characters, a worked response 1 + operands.
        train_size: distinct problems that `load('train')` gives.
        test_size: distinct problems that `load('test')` gives. None of them is a training problem of any seed.
        seed: random seed of the draw; the split does not depend on it.
    """

    operands: int = 6
    train_size: int = 20_000
    test_size: int = 512
    seed: int = 0

    deadline = None

    def __post_init__(self) -> None:
        if self.operands < 2:
            raise ValueError(f'operands is {self.operands}; expected at least 2.')
        total = len(_DIGITS) ** self.operands * len(_OPERATORS) ** (self.operands - 1)
        shares = {'train_size': total - total // _HELD_OUT, 'test_size': total // _HELD_OUT}
        for name, share in shares.items():
            size = getattr(self, name)
            # Distinct problems are drawn by rejection, which needs room.
            if not 1 <= size <= share // 2:
                raise ValueError(
                    f'{name} is {size}; expected between 1 and {share // 2}, half of the about {share} problems with '
                    f'{self.operands} operands in that split. Change {name}, or raise operands.'
                )

    def problems(self, split: str) -> list[str]:
        """The distinct problems of a split in a random order; a function of the arguments alone."""
        check_split(split)
        size = self.train_size if split == 'train' else self.test_size
        # A string as seed is hashed with SHA-512, so the draw is the same in every process.
        generator = random.Random(f'{self.seed} {split}')
        chosen: dict[str, None] = {}
        while len(chosen) < size:
            digits = generator.choices(_DIGITS, k=self.operands)
            operators = generator.choices(list(_OPERATORS), k=self.operands - 1)
            problem = ''.join(map(''.join, zip(digits, [*operators, '='], strict=True)))
            if is_held_out(problem) == (split == 'test'):
                chosen[problem] = None
        return list(chosen)

    def load(self, split: str) -> Dataset:
        """Rows of 'train' or 'test': `messages` with the problem as the user's words, and `answer`, one digit."""
        from datasets import Dataset

        problems = self.problems(split)
        messages = [[{'role': 'user', 'content': problem}] for problem in problems]
        return Dataset.from_dict({'messages': messages, 'answer': [str(running_values(p)[-1]) for p in problems]})

    def grade(self, response: str, answer: str) -> float:
        """1.0 if the response has one '#' and ends in '#' and the right digit; the text before it is free."""
        _, mark, tail = response.partition('#')
        return float(mark == '#' and tail == answer)
