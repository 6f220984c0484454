"""Reward terms, whose weighted sum is the reward of a response: `Method.rewards` names and weighs them.

A term is a function of a batch of responses, and gives a number for each.
"""

import traceback
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from troll_jax.ops.needs import by_name, needs
from troll_jax.rewards import answers as final_answers


class Responses(NamedTuple):
    """The input of a reward term."""

    texts: Sequence[str]  # [R]
    lengths: np.ndarray  # [R] int32, tokens
    max_length: int  # T, the limit of the length in tokens
    grades: np.ndarray  # [R] float32, by the task
    tokens: Sequence[np.ndarray] = ()  # [R] of [length] int32, with the one that ended the response
    prompts: Sequence[Sequence[Mapping[str, str]]] = ()  # [R] lists of {role, content}
    answers: Sequence[str] = ()  # [R], of the task
    columns: Mapping[str, Sequence] = MappingProxyType({})  # further columns of the task's rows, [R] each


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
    return np.array([final_answers.answer_format(text, place) for text in responses.texts], np.float32)


def trl_reward(responses: Responses, *, function: Callable[..., Any], conversational: bool = True) -> np.ndarray:
    """A reward function as TRL's trainers call it: `function(prompts, completions, completion_ids, **columns)`; [R]

    It is given by name what it takes of these. Columns are the task's `answer`, and those that the task keeps. None
    instead of a number, for a response that it does not apply to, adds nothing to the reward.

    Args:
      responses: R of them.
      function: the function, or an object that is called.
      conversational: prompts and completions are lists of messages; False: text, that of the prompt's last message.

    Raises:
      ValueError: it needs something else.
    """
    completions, prompts = responses.texts, responses.prompts
    if conversational:
        completions = [[{'role': 'assistant', 'content': text}] for text in completions]
    else:
        prompts = [messages[-1]['content'] for messages in prompts]
    inputs = {'prompts': prompts, 'completions': completions, 'completion_ids': [x.tolist() for x in responses.tokens]}
    try:
        inputs = by_name(function, inputs | {'answer': responses.answers} | dict(responses.columns))
    except ValueError as error:
        raise ValueError(f'{error}; the `columns` of a task name further ones of its rows') from error
    rewards = function(**inputs)
    return np.array([0.0 if reward is None else reward for reward in rewards], np.float32)


def read_rows(terms: Sequence[tuple[str, float, RewardTerm]]) -> bool:
    """True if terms may read prompts, answers or columns: all but those of this repository that do not."""
    return any(getattr(term, 'func', term) not in (task_reward, soft_overlong, answer_format) for *_, term in terms)


def check_names(terms: Sequence[tuple[str, float, RewardTerm]]) -> None:
    """Raises a ValueError for terms without a name of their own in the log, and for those of TRL by themselves."""
    names = [name for name, *_ in terms]
    if not names or len(set(names)) < len(names) or set(names) & RESERVED:
        raise ValueError(f'rewards are named {names}; expected at least one, names that differ, and none of {RESERVED}')
    if of_trl := [name for name, _, term in terms if needs(term, 'completions')]:
        raise ValueError(f'the rewards {of_trl} take completions; expected @trl_reward, and each as its `function`')


def weigh(terms: Sequence[tuple[str, float, RewardTerm]], responses: Responses) -> tuple[np.ndarray, dict]:
    """The reward of each response, the weighted sum of its terms; and the terms by name, not weighted.

    Args:
      terms: name, weight and function of each.
      responses: R of them.

    Returns:
      [R] float32, and name → [R].

    Raises:
      ValueError: a term fails, or gives something else than one finite number for each response.
    """
    values = {name: _evaluate(name, term, responses) for name, _, term in terms}
    for name, value in values.items():
        if value.shape != responses.lengths.shape or not np.all(np.isfinite(value)):
            bad = np.flatnonzero(~np.isfinite(value)) if value.shape == responses.lengths.shape else []
            what = f'{value[bad[0]]} for the response {responses.texts[bad[0]][:200]!r}' if len(bad) else value.shape
            raise ValueError(
                f'reward term {name!r} gave {what}; expected a finite number for each of {len(responses.lengths)}'
            )
    total = sum(np.float32(weight) * values[name] for name, weight, _ in terms)
    return total, values


def _evaluate(name: str, term: RewardTerm, responses: Responses) -> np.ndarray:
    """The values of a term. Raises a ValueError with the first response that it fails on."""
    try:
        return np.asarray(term(responses), np.float32)
    except Exception as error:  # whatever a function of a user's does
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f'reward term {name!r} raised {type(error).__name__}: {error}, at {at.filename}:{at.lineno}, for '
            f'{_first_failing(term, responses)}; mend it, or let it give 0 there'
        ) from error


def _first_failing(term: RewardTerm, responses: Responses) -> str:
    of_each = ('texts', 'lengths', 'grades', 'tokens', 'prompts', 'answers')
    for i, text in enumerate(responses.texts):
        one = slice(i, i + 1)
        columns = {name: column[one] for name, column in responses.columns.items()}
        alone = responses._replace(columns=columns, **{name: getattr(responses, name)[one] for name in of_each})
        try:
            np.asarray(term(alone), np.float32)
        except Exception:
            return f'the response {text[:200]!r}'
    return f'{len(responses.texts)} responses together, and for none of them alone'
