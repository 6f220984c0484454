"""GSM8K: grade-school word problems with a number for an answer (Cobbe et al. 2021, arXiv 2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from troll_jax.data.tasks.problems import Problems
from troll_jax.rewards.answers import NUMBER, check_places
from troll_jax.rewards.math import grade_math

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

    def _reference(self, answer: object, column: str, where: Callable[[], str]) -> str:
        """The number behind `####`, or in verl's schema at the beginning; no commas, no unit."""
        _, mark, tail = str(answer).rpartition('####')
        number = _FIRST_NUMBER.match(tail) if mark or column == 'reward_model' else None
        if number is None:
            raise ValueError(
                f'The answer in {where()} ends {str(answer)[-60:]!r}; expected it to end in "#### number". Fix or drop '
                'that row.'
            )
        return number[1].replace(',', '')

    def grade(self, response: str, answer: str) -> float:
        """1.0 if the final answer is the reference, else 0.0: of the last box, else behind `####`, else a number."""
        return grade_math(response, answer, self.places)
