"""Programming problems with tests, such as the `code` part of Eurus-2-RL-Data (arXiv 2502.01456)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from troll_jax.data.tasks.problems import Problems
from troll_jax.rewards.code import grade_code, parse_tests
from troll_jax.rewards.sandbox import Bubblewrap, Sandbox

if TYPE_CHECKING:
    from datasets import Dataset

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EurusCode(Problems):
    """Programming problems; the program in a response, its last ```python block, is run on the problem's tests.

    See `rewards.code.last_program` for what else is taken for the program, and `rewards.code.grade_code` for the rules.
    The data's prompts ask for a ```python block at the end; there is a warning if none does. The answer in the data is
    the tests, which `parse_tests` reads.

    Loading its rows runs a program in the sandbox first, so that a run without one ends before weights are loaded.

    Args:
        sandbox: runs the programs: `Bubblewrap`, `SandboxFusion`, or `Unisolated`.
        program_seconds: time limit of all tests of one program together.
        max_tests: number of tests of a problem that are run, the first ones; None for all.
        partial: true: the reward is the share of tests that passed, and not 1 for all and else 0.

    Raises:
        ValueError: a limit that is not positive.
    """

    source: str = 'PRIME-RL/Eurus-2-RL-Data'
    test_split: str = 'validation'
    ability: str | None = 'code'
    sandbox: Sandbox = Bubblewrap()
    program_seconds: float = 30.0
    max_tests: int | None = None
    partial: bool = False
    deadline: float = field(init=False)  # past the limits of the sandbox, which ends a program and says why

    def __post_init__(self):
        if not 0 < self.program_seconds < math.inf:
            raise ValueError(f'program_seconds is {self.program_seconds}; expected a finite number above zero.')
        if self.max_tests is not None and self.max_tests < 1:
            raise ValueError(f'max_tests is {self.max_tests}; expected at least 1, or None for all.')
        object.__setattr__(self, 'deadline', self.program_seconds + self.sandbox.longest_case + 5.0)

    def load(self, split: str) -> Dataset:
        """Rows as of `Problems.load`. Those whose tests cannot be read are left out, with a warning that counts them.

        Raises:
            ValueError: see `Problems.load`, or no row has tests that can be read.
            CannotGrade: programs cannot be run in the sandbox, with what to do.
        """
        self.sandbox.check()
        problems = super().load(split)
        faults = [_fault(tests) for tests in problems['answer']]
        if found := list(filter(None, faults)):
            message = f'{len(found)} of {len(faults)} rows of code in {self.source!r} have unreadable tests'
            if len(found) == len(faults):
                raise ValueError(f'{message}. {found[0]}')
            _logger.warning('%s and are left out. %s', message, found[0])
            problems = problems.select([row for row, fault in enumerate(faults) if not fault])
        return problems

    def _reference(self, answer: object, column: str, where: Callable[[], str]) -> str:
        if not isinstance(answer, str):
            raise ValueError(f'The {column!r} in {where()} is {repr(answer)[:120]}; expected tests, as a text of JSON.')
        return answer

    def _check(self, loaded: Dataset, where: str) -> None:
        if not any('```' in m['content'] for messages in loaded['messages'] for m in messages):
            _logger.warning(
                'No prompt in %r asks for a ```python block, in which programs are looked for.', self.source
            )

    def grade(self, response: str, answer: str) -> float:
        """1.0 if the response's program passes all tests, else 0.0; with `partial` the share that it passes."""
        return grade_code(
            response,
            answer,
            sandbox=self.sandbox,
            program_seconds=self.program_seconds,
            max_tests=self.max_tests,
            partial=self.partial,
        ).reward


def _fault(tests: str) -> str:
    """The reason that the tests of a problem cannot be read, or ''."""
    try:
        parse_tests(tests)
    except (KeyError, TypeError, ValueError) as error:
        return f'{type(error).__name__}: {error}'
    return ''
