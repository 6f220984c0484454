"""GSM8K: grade-school word problems with a number for an answer (Cobbe et al. 2021, arXiv 2110.14168)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from troll_jax.data.tasks.interface import load_rows
from troll_jax.rewards.math import grade_math, last_boxed

if TYPE_CHECKING:
    from datasets import Dataset

INSTRUCTION = 'Reason step by step, and write the final answer, a number, in \\boxed{}.'

_NUMBER = r'(?:-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+)'
_FIRST_NUMBER = re.compile(rf'[\s$€£]*({_NUMBER})')
_LAST_NUMBER = re.compile(rf'(?<![\d.])({_NUMBER})(?!\d)')
# "$1,234.00", "18 dollars.": a number with a currency sign or a unit in words, which LaTeX reads as a product.
_NUMBER_WITH_UNIT = re.compile(
    rf'\s*(?P<sign>-?)\s*(?:\\?[$€£])?\s*(?P<number>{_NUMBER})\.?(?:\s*[A-Za-z][A-Za-z .]*)?\s*'
)


@dataclass(frozen=True)
class GSM8K:
    """Word problems of grade-school mathematics, graded by their final number.

    Args:
        source: an id on the Hugging Face hub, a folder with train* and test* files, or a path with `{split}` in it;
            parquet or jsonl with the columns `question` and `answer` (which ends in `#### number`).
        config: configuration on the hub; unused for local files.
        instruction: stands under every question; None for the bare question.
        system_prompt: content of a system message before it; None for none.
        deadline: seconds that one grading may take.
    """

    source: str = 'openai/gsm8k'
    config: str | None = 'main'
    instruction: str | None = INSTRUCTION
    system_prompt: str | None = None
    deadline: float | None = 5.0

    def load(self, split: str) -> Dataset:
        """Rows of 'train' or 'test' with `messages` and `answer`, a plain number: no commas, no unit.

        Raises:
            ValueError: missing files or columns, an empty split, or an answer without `#### number`.
        """
        from datasets import Dataset

        rows = load_rows(self.source, split, columns=('question', 'answer'), config=self.config)
        answers = [
            _final_number(answer, f'row {i} of {split!r} in {self.source!r}') for i, answer in enumerate(rows['answer'])
        ]
        messages = [self._messages(question) for question in rows['question']]
        return Dataset.from_dict({'messages': messages, 'answer': answers})

    def grade(self, response: str, answer: str) -> float:
        r"""1.0 if the last `\boxed{}` equals the answer; without a box, what follows `####`, or the last number."""
        final = last_boxed(response)
        if final is None and '\\boxed' not in response:
            numbers = _LAST_NUMBER.findall(response.rsplit('####', 1)[-1])
            final = (numbers[0] if '####' in response else numbers[-1]) if numbers else None
        if final is None:
            return 0.0
        plain = _NUMBER_WITH_UNIT.fullmatch(final)
        if plain:
            final = plain['sign'] + plain['number'].replace(',', '')
        return grade_math(rf'\boxed{{{final}}}', answer)

    def _messages(self, question: str) -> list[dict[str, str]]:
        content = question if self.instruction is None else f'{question}\n\n{self.instruction}'
        system = [] if self.system_prompt is None else [{'role': 'system', 'content': self.system_prompt}]
        return [*system, {'role': 'user', 'content': content}]


def _final_number(answer: object, where: str) -> str:
    _, mark, tail = str(answer).rpartition('####')
    number = _FIRST_NUMBER.match(tail) if mark else None
    if number is None:
        raise ValueError(
            f'The answer in {where} ends {str(answer)[-60:]!r}; expected it to end in "#### number". Fix or '
            'drop that row.'
        )
    return number[1].replace(',', '')
