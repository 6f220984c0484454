"""Problems in verl's schema, in which the TROLL paper's data sets come prepared.

A row has `data_source` (str), `prompt` (a list of {role, content}), `ability` (str), `reward_model` ({style,
ground_truth}, of which the latter is text, a number or a list of one of these) and `extra_info`. Prompts are complete:
instructions and system messages are part of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

    Messages = list[dict[str, str]]

VERL = ('data_source', 'prompt', 'ability', 'reward_model')
_ROLES = ('system', 'user', 'assistant')


def is_verl(columns: Sequence[str]) -> bool:
    return {'prompt', 'reward_model'} <= set(columns)


def choose_rows(
    rows: Dataset, locate: Callable[[int], str], *, ability: str | None = None, data_source: str | None = None
) -> Sequence[int]:
    """The numbers of rows of this `ability`, such as 'math' or 'code', in any case, and in whose `data_source` this
    regular expression is found, in any case. None or '' is for all.

    Raises:
        ValueError: a column is missing, or no row is left.
    """
    chosen = range(len(rows))
    for column, wanted, fits in (
        ('ability', ability, lambda value: str(value).lower() == ability.lower()),
        ('data_source', data_source, lambda value: re.search(data_source, str(value), re.IGNORECASE)),
    ):
        if not wanted:
            continue
        if column not in rows.column_names:
            raise ValueError(
                f'{locate(0)} has no column {column!r}, by which {wanted!r} is to be chosen; got {rows.column_names}. '
                f"Add it, or set {column} = '' for all rows."
            )
        values = rows[column][:]
        chosen = [row for row in chosen if fits(values[row])]
        if not chosen:
            raise ValueError(
                f'No row has {column} {wanted!r}; got {sorted(set(map(str, values)))[:20]} (first: {locate(0)}). '
                f'Change {column}, or the source.'
            )
    return chosen


def as_conversation(prompt: object, system_prompt: str | None, where: Callable[[], str]) -> Messages:
    """Checked messages. A system prompt takes the place of their own, or is put first; '' removes them."""
    messages = prompt if isinstance(prompt, list) else []
    if not messages or not all(
        isinstance(m, dict) and m.get('role') in _ROLES and isinstance(m.get('content'), str) and m['content'].strip()
        for m in messages
    ):
        raise ValueError(
            f'The prompt in {where()} is {repr(prompt)[:120]}; expected a list of {{role, content}} with a role of '
            f'{_ROLES} and a content that is not empty. Fix or drop that row.'
        )
    messages = [{'role': m['role'], 'content': m['content']} for m in messages]
    if system_prompt is not None:
        system = [{'role': 'system', 'content': system_prompt}] if system_prompt else []
        messages = [*system, *(m for m in messages if m['role'] != 'system')]
    return messages


def ground_truth(reward_model: object, where: Callable[[], str]) -> str:
    """The ground truth of a row as text."""
    truth = reward_model.get('ground_truth') if isinstance(reward_model, dict) else None
    if isinstance(truth, list) and len(truth) == 1:
        (truth,) = truth
    if type(truth) in (int, float, Decimal) and math.isfinite(truth):
        truth = str(truth)
    if not isinstance(truth, str) or not truth.strip():
        raise ValueError(
            f'The reward_model in {where()} is {repr(reward_model)[:120]}; expected {{style, ground_truth}} with a '
            'ground_truth that is text and not empty, a number, or a list of one. Fix or drop that row.'
        )
    return truth
