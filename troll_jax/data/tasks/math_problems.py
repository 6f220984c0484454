r"""Mathematics with an answer that can be checked: DAPO-Math, Eurus-2-RL and the sets of MATH-Eval.

They differ in where they come from, and are one class: problems in verl's schema, answers in `\boxed{}`, math-verify.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING

from troll_jax.data.tasks.interface import (
    as_dataset,
    as_messages,
    check_asked_for,
    check_columns,
    check_questions,
    load_rows,
    locate,
)
from troll_jax.data.tasks.verl import is_verl, read_verl
from troll_jax.rewards.answers import check_places
from troll_jax.rewards.math import grade_math

if TYPE_CHECKING:
    from datasets import Dataset

INSTRUCTION = 'Reason step by step, and write the final answer in \\boxed{}.'

BENCHMARKS = {
    'MATH500': r'(^|/)math.?500',  # not another set's Minerva_MATH500
    'AMC': r'amc',
    'AIME24': r'aime.*24',
    'AIME25': r'aime.*25',
    'OMNI-MATH': r'omni',
    'OlympiadBench': r'olympiad',
    'Minerva': r'minerva',
}
"""The sets of MATH-Eval, and patterns of their `data_source`."""


@dataclass(frozen=True)
class MathProblems:
    """Mathematical problems, graded by their final answer.

    Args:
        source: an id on the Hugging Face hub, with a folder of it if need be (owner/name/folder), a local folder with
            train* and test* files, or a path with `{split}` in it; parquet or jsonl, in verl's schema or with the
            columns that `question` and `answer` name.
        config: configuration on the hub; unused for local files.
        test_split: the source's name of the split for testing.
        question, answer: columns of data that is not in verl's schema.
        instruction: text under the question of such data; prompts in verl's schema are complete. None for none.
        system_prompt: content of the system message, instead of the data's own; '' for none, None for the data's.
        ability: only rows of this `ability` (verl's schema); None for all.
        data_source: only rows in whose `data_source` this regular expression is found, in any case; None or '' for all.
        places: markers of the final answer, see `rewards.answers.find_answer`.
        deadline: time limit of one grading, in seconds.
    """

    source: str
    config: str | None = None
    test_split: str = 'test'
    question: str = 'problem'
    answer: str = 'answer'
    instruction: str | None = INSTRUCTION
    system_prompt: str | None = None
    ability: str | None = None
    data_source: str | None = None
    places: tuple[str, ...] = ('boxed', '####', 'Answer:')
    deadline: float | None = 5.0

    def __post_init__(self) -> None:
        check_places(self.places)

    def load(self, split: str) -> Dataset:
        """Rows of 'train' or 'test' with `messages` and `answer`.

        Raises:
            ValueError: missing files or columns, nothing left of a split, or a row without a prompt or an answer.
        """
        columns = (self.question, self.answer)
        rows = load_rows(self.source, split, columns, config=self.config, test_split=self.test_split)
        where = lambda row: locate(self.source, split, row, test_split=self.test_split)
        if is_verl(rows.column_names):
            problems = read_verl(
                rows, where, ability=self.ability, data_source=self.data_source, system_prompt=self.system_prompt
            )
        else:
            if self.ability or self.data_source:
                raise ValueError(
                    f'{where(0)} has the columns {rows.column_names}; expected the schema of verl (prompt, '
                    'reward_model, ability, data_source) to choose by ability or data_source. Set both to None, or '
                    'change the source.'
                )
            check_columns(rows, columns, where(0))
            check_questions(rows[self.question], self.question, where)
            problems = (
                (as_messages(text, self.instruction, self.system_prompt), self._truth(answer, partial(where, row)))
                for row, (text, answer) in enumerate(zip(rows[self.question], rows[self.answer], strict=True))
            )
        loaded = as_dataset(problems)
        check_asked_for(loaded['messages'], self.places, where(0))
        return loaded

    def _truth(self, answer: object, where: Callable[[], str]) -> str:
        number = type(answer) in (int, float, Decimal) and math.isfinite(answer)
        if not number and not (isinstance(answer, str) and answer.strip()):
            raise ValueError(
                f'The {self.answer!r} in {where()} is {repr(answer)[:120]}; expected LaTeX or a number. Fix or drop '
                'that row.'
            )
        return str(answer).strip()

    def grade(self, response: str, answer: str) -> float:
        """1.0 if the response's final answer is the same as the reference, else 0.0."""
        return grade_math(response, answer, self.places)


@dataclass(frozen=True)
class DAPOMath(MathProblems):
    """DAPO-Math (Yu et al. 2025, arXiv 2503.14476) as the TROLL paper prepared it: 16,893 train, 1,024 held out.

    Assumed, as the repository could not be looked at: at its root it has the splits train and test in verl's schema. If
    it has not, the error lists what is there; then bind `source` and `test_split`.
    """

    source: str = 'philippbecker/troll_data'


@dataclass(frozen=True)
class EurusMath(MathProblems):
    """The mathematics of Eurus-2-RL (Cui et al. 2025, arXiv 2502.01456): 455,261 train, 1,024 held out."""

    source: str = 'PRIME-RL/Eurus-2-RL-Data'
    test_split: str = 'validation'
    ability: str | None = 'math'


@dataclass(frozen=True)
class MathEval(MathProblems):
    """One benchmark of MATH-Eval, for evaluation. The TROLL paper takes the mean of 32 samples for AMC, AIME24 and
    AIME25, and one sample for the rest.

    Assumed, as the repository could not be looked at: OMNI-MATH is a parquet file of its own, the others are another,
    in which `data_source` tells them apart, both in verl's schema. If it is laid out otherwise, the errors list files,
    columns or values of `data_source`; then these can be bound of single benchmarks, as in `AMC.source =
    'owner/name/amc'` and `AMC.data_source = ''`.

    Args:
        source: see `MathProblems`; None for the benchmark's file in `philippbecker/troll_data`, which is read from the
            hub; for a machine without network, download it and name the file here.
        benchmark: a name in `BENCHMARKS`.
        data_source: None for what `BENCHMARKS` has for the benchmark, '' for all rows.
    """

    source: str | None = None
    benchmark: str = 'MATH500'

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.benchmark not in BENCHMARKS:
            raise ValueError(f'benchmark is {self.benchmark!r}; expected one of {list(BENCHMARKS)}.')
        if self.source is None:
            file = 'omni-math-aligned-deduplicated' if self.benchmark == 'OMNI-MATH' else 'others-aligned'
            object.__setattr__(self, 'source', f'hf://datasets/philippbecker/troll_data/{file}.parquet')
        if self.data_source is None:
            object.__setattr__(self, 'data_source', BENCHMARKS[self.benchmark])
