"""Programming problems with tests, in verl's schema: the `code` part of Eurus-2-RL-Data (arXiv 2502.01456)."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from troll_jax.data.tasks.interface import as_dataset, check_columns, load_rows, locate
from troll_jax.data.tasks.verl import read_verl
from troll_jax.rewards.code import grade_code, parse_tests
from troll_jax.rewards.sandbox import Bubblewrap, Sandbox

if TYPE_CHECKING:
    from datasets import Dataset

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EurusCode:
    """Programming problems; the program in a response, its last ```python block, is run on the problem's tests.

    See `rewards.code.last_program` for what else is taken for the program, and `rewards.code.grade_code` for the rules.
    The data's prompts ask for a ```python block at the end; there is a warning if none does.

    Loading its rows runs a program in the sandbox first, so that a run without one ends before weights are loaded.

    Args:
        source: see `load_rows`; in verl's schema with the columns `prompt` (list of {role, content}), `ability` (rows
            other than 'code' are left out) and `reward_model`, whose `ground_truth` `parse_tests` reads.
        test_split: the source's name of the test split.
        sandbox: runs the programs: `Bubblewrap`, `SandboxFusion`, or `Unisolated`.
        program_seconds: time limit of all tests of one program together.
        max_tests: number of tests of a problem that are run, the first ones; None for all.
        partial: true: the reward is the share of tests that passed, and not 1 for all and else 0.

    Raises:
        ValueError: a limit that is not positive.
    """

    source: str = 'PRIME-RL/Eurus-2-RL-Data'
    test_split: str = 'validation'
    sandbox: Sandbox = Bubblewrap()
    program_seconds: float = 30.0
    max_tests: int | None = None
    partial: bool = False

    def __post_init__(self):
        if not 0 < self.program_seconds < math.inf:
            raise ValueError(f'program_seconds is {self.program_seconds}; expected a finite number above zero.')
        if self.max_tests is not None and self.max_tests < 1:
            raise ValueError(f'max_tests is {self.max_tests}; expected at least 1, or None for all.')

    @property
    def deadline(self) -> float:
        """Seconds, past the limits of the sandbox, so that the sandbox ends a program and says why."""
        return self.program_seconds + self.sandbox.longest_case + 5.0

    def load(self, split: str) -> Dataset:
        """Rows of 'train' or 'test' with `messages` and `answer`, the tests as JSON.

        Rows whose tests cannot be read are left out, with a warning that counts them; so is there one if no prompt
        mentions a block of code.

        Raises:
            ValueError: missing files or columns, an empty split, no row of code, or none with tests that can be read.
            CannotGrade: programs cannot be run in the sandbox, with what to do.
        """
        self.sandbox.check()
        columns = ('prompt', 'ability', 'reward_model')
        rows = load_rows(self.source, split, columns, test_split=self.test_split)
        where = lambda row: locate(self.source, split, row, test_split=self.test_split)
        check_columns(rows, columns, where(0))
        faults = []

        def readable():
            for messages, tests in read_verl(rows, where, ability='code'):
                if fault := _fault(tests):
                    faults.append(fault)
                else:
                    yield messages, tests

        problems = as_dataset(readable())
        if faults:
            left_out = f'{len(faults)} of {len(problems) + len(faults)} rows of code'
            message = f'{left_out} in {self.source!r} have unreadable tests'
            if not problems:
                raise ValueError(f'{message}. {faults[0]}')
            _logger.warning('%s and are left out. %s', message, faults[0])
        if not any('```' in m['content'] for messages in problems['messages'] for m in messages):
            _logger.warning(
                'No prompt in %r asks for a ```python block, in which programs are looked for.', self.source
            )
        return problems

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
