"""GSM8K: grade-school word problems with a number for an answer (Cobbe et al. 2021, arXiv 2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from troll_jax.data.tasks.problems import Problems
from troll_jax.data.tasks.verl import ground_truth
from troll_jax.rewards.answers import NUMBER, check_places
from troll_jax.rewards.math import grade_math

if TYPE_CHECKING:
    from datasets import Dataset

INSTRUCTION = 'Reason step by step, and write the final answer, a number, in \\boxed{}.'

_FIRST_NUMBER = re.compile(rf'[\s$€£]*({NUMBER})')


@dataclass(frozen=True)
class GSM8K(Problems):
    """Word problems of grade-school mathematics, graded by their final number.

    The answer in the data ends in `#### number`; in verl's schema it may begin with the number.

    Args:
        places: markers of the final answer, see `rewards.answers.find_answer`.
    """

    source: str = 'openai/gsm8k'
    config: str | None = 'main'
    question: str | None = 'question'
    answer: str | None = 'answer'
    instruction: str | None = INSTRUCTION
    places: tuple[str, ...] = ('boxed', '####', 'last number')

    def __post_init__(self) -> None:
        check_places(self.places)

    def _references(self, rows: Dataset, column: str, where: Callable[[int], str]) -> Iterator[str]:
        """Plain numbers: no commas, no unit."""
        bare = column == 'reward_model'
        for row, answer in enumerate(rows[column]):
            answer = ground_truth(answer, partial(where, row)) if bare else str(answer)
            yield _final_number(answer, bare, partial(where, row))

    def grade(self, response: str, answer: str) -> float:
        """1.0 if the final answer is the reference, else 0.0: of the last box, else behind `####`, else a number."""
        return grade_math(response, answer, self.places)


def _final_number(answer: str, bare: bool, where: Callable[[], str]) -> str:
    """The number behind `####`, or, where it may be bare, at the beginning."""
    _, mark, tail = answer.rpartition('####')
    number = _FIRST_NUMBER.match(tail) if mark or bare else None
    if number is None:
        raise ValueError(
            f'The answer in {where()} ends {answer[-60:]!r}; expected it to end in "#### number". Fix or drop that row.'
        )
    return number[1].replace(',', '')
