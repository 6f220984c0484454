"""Reward terms, whose weighted sum is the reward of a response: `Method.rewards` names and weighs them.

A term is a function of a batch of responses, and gives a number for each.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from troll_jax.rewards import answers


class Responses(NamedTuple):
    """The input of a reward term."""

    texts: Sequence[str]  # [R]
    lengths: np.ndarray  # [R] int32, tokens
    max_length: int  # T, the limit of the length in tokens
    grades: np.ndarray  # [R] float32, by the task


RESERVED = {'mean', 'penalty', 'uniform_share', 'timeouts', 'crashes', 'errors'}  # in the log, under 'reward/'

RewardTerm = Callable[[Responses], np.ndarray]


def task_reward(responses: Responses) -> np.ndarray:
    """The task's own grade: is the answer right? [R]"""
    return responses.grades


def soft_overlong(responses: Responses, *, share: float = 0.2) -> np.ndarray:
    """DAPO's soft overlong punishment (arXiv 2503.14476, section 3.4): from 0 to −1 before the length limit.

        min( 0, (T − c − length) / c ),   c = share · T

    Args:
      responses: R of them.
      share: share of the length limit T over which the penalty grows; DAPO's is 4,096 of 20,480 tokens.

    Returns:
      [R] float32

    Raises:
      ValueError: `share` is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f'share is a part of the length limit, in (0, 1]; got {share}')
    room = share * responses.max_length
    return np.minimum(0, (responses.max_length - room - responses.lengths) / room).astype(np.float32)


def answer_format(responses: Responses, *, place: str = 'boxed') -> np.ndarray:
    r"""1 for a response whose answer has the form that was asked for, else 0; [R]

    Args:
      responses: R of them.
      place: 'boxed', '####' or 'Answer:', see `troll_jax.rewards.answers`.
    """
    return np.array([answers.answer_format(text, place) for text in responses.texts], np.float32)


def check_names(terms: Sequence[tuple[str, float, RewardTerm]]) -> None:
    """Raises a ValueError for terms without a name of their own in the log."""
    names = [name for name, *_ in terms]
    if not names or len(set(names)) < len(names) or set(names) & RESERVED:
        raise ValueError(f'rewards are named {names}; expected at least one, names that differ, and none of {RESERVED}')


def weigh(terms: Sequence[tuple[str, float, RewardTerm]], responses: Responses) -> tuple[np.ndarray, dict]:
    """The reward of each response, the weighted sum of its terms; and the terms by name, not weighted.

    Args:
      terms: name, weight and function of each.
      responses: R of them.

    Returns:
      [R] float32, and name → [R].

    Raises:
      ValueError: a term gives something else than one finite number for each response.
    """
    values = {name: np.asarray(term(responses), np.float32) for name, _, term in terms}
    for name, value in values.items():
        if value.shape != responses.lengths.shape or not np.all(np.isfinite(value)):
            bad = np.flatnonzero(~np.isfinite(value)) if value.shape == responses.lengths.shape else []
            what = f'{value[bad[0]]} for the response {responses.texts[bad[0]][:200]!r}' if len(bad) else value.shape
            raise ValueError(
                f'reward term {name!r} gave {what}; expected a finite number for each of {len(responses.lengths)}'
            )
    total = sum(np.float32(weight) * values[name] for name, weight, _ in terms)
    return total, values
