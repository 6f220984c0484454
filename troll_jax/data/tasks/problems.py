"""Problems from rows of one's own, and those that a function of one's own grades."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from troll_jax.data.tasks.interface import as_dataset, as_messages, check_columns, find_column, load_rows, locate
from troll_jax.data.tasks.verl import as_conversation, choose_rows, ground_truth, is_verl
from troll_jax.ops.needs import by_name

if TYPE_CHECKING:
    from datasets import Dataset

QUESTIONS = ('prompt', 'question', 'problem')
ANSWERS = ('answer', 'solution')


@dataclass(frozen=True)
class Problems:
    """Questions with their answers; subclasses grade.

    Args:
        source: an id on the Hugging Face hub, with a folder of it if need be (owner/name/folder), a local folder with
            train* and test* files, a path with `{split}` in it, or a file; parquet, jsonl, json or csv, in verl's
            schema or with the columns that `question` and `answer` name. A file is the train split and the test split:
            hold out rows of it by `Experiment.held_out`.
        config: configuration on the hub; unused for local files.
        test_split: the source's name of the split for testing.
        question: column with text or with a conversation; None: the first of `QUESTIONS` that there is. In verl's
            schema it is always `prompt`, and the answer in `reward_model`.
        answer: column with the answer; None: the first of `ANSWERS` that there is.
        instruction: text under a question that is text; conversations are complete. None for none.
        system_prompt: content of the system message, instead of the data's own; '' for none, None for the data's.
        ability: only rows of this `ability` (verl's schema); None for all.
        data_source: only rows in whose `data_source` this regular expression is found, in any case; None or '' for all.
        columns: further columns of the rows that reward terms read, see `rewards.terms.Responses.columns`.
        deadline: time limit of one grading, in seconds.
    """

    source: str
    config: str | None = None
    test_split: str = 'test'
    question: str | None = None
    answer: str | None = None
    instruction: str | None = None
    system_prompt: str | None = None
    ability: str | None = None
    data_source: str | None = None
    columns: tuple[str, ...] = ()
    deadline: float | None = 5.0

    def load(self, split: str) -> Dataset:
        """Rows of 'train' or 'test' with `messages`, `answer` and the further columns.

        Raises:
            ValueError: missing files or columns, nothing left of a split, or a row without a prompt or an answer.
        """
        from datasets import concatenate_datasets

        columns = (self.question or QUESTIONS, self.answer or ANSWERS)
        wanted, others = (*columns, *self.columns), (*self.columns, *self._others)
        rows = load_rows(self.source, split, wanted, others=others, config=self.config, test_split=self.test_split)
        place = partial(locate, self.source, split, test_split=self.test_split)
        in_verls = is_verl(rows.column_names)
        if in_verls:
            chosen = choose_rows(rows, place, ability=self.ability, data_source=self.data_source)
            question, answer = 'prompt', 'reward_model'
        elif self.ability or self.data_source:
            raise ValueError(
                f'{place(0)} has the columns {rows.column_names}; expected the schema of verl (prompt, reward_model, '
                'ability, data_source) to choose by ability or data_source. Set both to None, or change the source.'
            )
        else:
            chosen = range(len(rows))
            question, answer = (
                find_column(rows.column_names, names) or (names if isinstance(names, str) else ' or '.join(names))
                for names in columns
            )
        check_columns(rows, (question, answer, *self.columns), place(0))
        rows, where = rows.select(chosen), lambda row: place(chosen[row])
        messages = (
            self._messages(words, question, partial(where, row), is_chat=in_verls)
            for row, words in enumerate(rows[question])
        )
        loaded = as_dataset(zip(messages, self._references(rows, answer, where), strict=True))
        self._check(loaded, where(0))
        further = [name for name in self.columns if name not in loaded.column_names]
        return concatenate_datasets([loaded, rows.select_columns(further)], axis=1) if further else loaded

    _others = ()  # columns that are read where they are there

    def _messages(self, words: object, column: str, where: Callable[[], str], *, is_chat: bool) -> list[dict[str, str]]:
        if is_chat or isinstance(words, list):
            return as_conversation(words, self.system_prompt, where)
        if not isinstance(words, str) or not words.strip():
            raise ValueError(
                f'The {column!r} in {where()} is {repr(words)[:120]}; expected text that is not empty. Fix or drop '
                'that row.'
            )
        return as_messages(words, self.instruction, self.system_prompt)

    def _references(self, rows: Dataset, column: str, where: Callable[[int], str]) -> Iterator[str]:
        """What each row is graded by, as text."""
        for row, answer in enumerate(rows[column]):
            answer = ground_truth(answer, partial(where, row)) if column == 'reward_model' else answer
            yield self._reference(answer, column, partial(where, row))

    def _reference(self, answer: object, column: str, where: Callable[[], str]) -> str:
        """What a row with this answer is graded by; of the column 'reward_model' it is the ground truth."""
        raise NotImplementedError

    def _check(self, loaded: Dataset, where: str) -> None:
        """Looks at what was loaded; `where` is the place of the first row."""


@dataclass(frozen=True)
class ScoredProblems(Problems):
    """Problems that a function grades which has the form of verl's `compute_score`, in workers under a deadline.

    It is given by name what it takes of `solution_str`, the response, `ground_truth`, as it is in the data,
    `data_source` and `extra_info`; of data that is not in verl's schema `extra_info` has the further columns. It
    returns a number, a dictionary with the number as `score`, or a list that begins with it.

    Args:
        score: the function; a module's, so that workers can import it.

    Raises:
        ValueError: it takes something else.
    """

    score: Callable[..., Any] = field(kw_only=True)

    _others = ('data_source', 'extra_info')

    def __post_init__(self) -> None:
        by_name(self.score, dict.fromkeys(('solution_str', 'ground_truth', 'data_source', 'extra_info')))

    def _references(self, rows: Dataset, column: str, where: Callable[[int], str]) -> Iterator[str]:
        for i, row in enumerate(rows):
            truth = row[column]
            if column == 'reward_model':
                truth = truth.get('ground_truth') if isinstance(truth, dict) else None
            if truth is None:
                raise ValueError(f'{where(i)} has no answer, but {column} = {row[column]!r}. Fix or drop that row.')
            inputs = {
                'ground_truth': truth,
                'data_source': row.get('data_source', self.source),
                'extra_info': row.get('extra_info') or {name: row[name] for name in self.columns},
            }
            yield json.dumps(inputs, ensure_ascii=False, default=str)

    def grade(self, response: str, answer: str) -> float:
        """What the function gives."""
        result = self.score(**by_name(self.score, {'solution_str': response, **json.loads(answer)}))
        if isinstance(result, dict):
            result = result['score']
        return float(result[0] if isinstance(result, (list, tuple)) else result)
