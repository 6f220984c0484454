"""GSM8K: grade-school word problems with a number for an answer (Cobbe et al. 2021, arXiv 2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from troll_jax.data.tasks.interface import as_dataset, as_messages, check_columns, check_questions, load_rows, locate
from troll_jax.data.tasks.verl import is_verl, read_verl
from troll_jax.rewards.answers import NUMBER, check_places
from troll_jax.rewards.math import grade_math

if TYPE_CHECKING:
    from datasets import Dataset

INSTRUCTION = 'Reason step by step, and write the final answer, a number, in \\boxed{}.'

_FIRST_NUMBER = re.compile(rf'[\s$€£]*({NUMBER})')


@dataclass(frozen=True)
class GSM8K:
    """Word problems of grade-school mathematics, graded by their final number.

    Args:
        source: an id on the Hugging Face hub, a folder with train* and test* files, or a path with `{split}` in it;
            parquet or jsonl, in verl's schema or with the columns `question` and `answer`, which ends in `#### number`.
        config: configuration on the hub; unused for local files.
        instruction: text under every question; None for the bare question. Prompts in verl's schema are complete.
        system_prompt: content of the system message; None for the data's own, if it has one.
        places: markers of the final answer, see `rewards.answers.find_answer`.
        deadline: time limit of one grading, in seconds.
    """

    source: str = 'openai/gsm8k'
    config: str | None = 'main'
    instruction: str | None = INSTRUCTION
    system_prompt: str | None = None
    places: tuple[str, ...] = ('boxed', '####', 'last number')
    deadline: float | None = 5.0

    def __post_init__(self) -> None:
        check_places(self.places)

    def load(self, split: str) -> Dataset:
        """Rows of 'train' or 'test' with `messages` and `answer`, a plain number: no commas, no unit.

        Raises:
            ValueError: missing files or columns, an empty split, a question that is not text, or an answer without
                `#### number`.
        """
        columns = ('question', 'answer')
        rows = load_rows(self.source, split, columns, config=self.config)
        where = lambda row: locate(self.source, split, row)
        bare = is_verl(rows.column_names)
        if bare:
            problems = read_verl(rows, where, system_prompt=self.system_prompt)
        else:
            check_columns(rows, columns, where(0))
            check_questions(rows['question'], 'question', where)
            messages = (as_messages(question, self.instruction, self.system_prompt) for question in rows['question'])
            problems = zip(messages, rows['answer'], strict=True)
        return as_dataset(
            (messages, _final_number(str(answer), bare, partial(where, row)))
            for row, (messages, answer) in enumerate(problems)
        )

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
