"""Conversations as tokens, and which of them an assistant wrote: data for supervised fine-tuning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from troll_jax.data.prompts import render_chats, tokenize

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)

LONG_CHATS = ('drop', 'cut')


class Chat(NamedTuple):
    """A conversation, or a part of one, that ends with words of the assistant."""

    tokens: np.ndarray  # [length] int32
    learnt: np.ndarray  # [length] bool: the assistant's words and the end of the turn; never the first token


def encode_chats(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    stop_tokens: Collection[int],
    where: Callable[[int], str],
    template_arguments: Mapping[str, Any] | None = None,
    long_chats: str = 'drop',
) -> list[list[Chat]]:
    """The chats of each row, with the assistant's turns as the model would have to write them.

    What comes before a turn is rendered as a prompt, ready for the response to begin, and the turn is what the template
    adds when its message follows. Both are tokenized on their own, as in sampling. A turn is learnt up to the token
    that ends it; what a template writes between two turns is not.

    Turns share a chat as long as the template writes later prompts as a continuation. Some templates change earlier
    turns (Qwen3's leaves out what was thought): such a turn begins a chat of its own, behind its own prompt.

    Args:
        rows: a column `messages`, lists of {role, content}, of which all of the assistant's are learnt; or `prompt` and
            `completion`, lists of such messages of which those of the completion are learnt, or the words of a user
            and of the assistant.
        tokenizer: one with a chat template.
        max_length: tokens of the longest chat.
        stop_tokens: tokens that end a response.
        where: the place of a row, for an error.
        template_arguments: passed to the chat template.
        long_chats: treatment of longer chats: 'drop', or 'cut', at the end.

    Raises:
        ValueError: a row that is no conversation or has no words of the assistant, a template or tokenizer that fails
            on one, a template that begins an assistant's turn otherwise than a prompt ends or ends it with no stop
            token, or no chat that is short enough.
    """
    conversations = _conversations(rows, where)
    turns = [
        (row, messages, i)
        for row, (messages, first) in enumerate(conversations)
        for i, message in enumerate(messages)
        if i >= first and message['role'] == 'assistant'
    ]
    places = [row for row, _, _ in turns]

    def render(conversations: list, **prompt: bool) -> list[str]:
        several = lambda some: render_chats(some, tokenizer, template_arguments=template_arguments, **prompt)
        return _explained(several, conversations, places, where)

    prompts = render([messages[:i] for _, messages, i in turns])
    ends = render([messages[: i + 1] for _, messages, i in turns], add_generation_prompt=False)
    pieces, begins, so_far = [], [], None  # two pieces for each turn; whether a turn begins a chat; the chat's text
    for turn, (row, prompt, end) in enumerate(zip(places, prompts, ends, strict=True)):
        if not end.startswith(prompt):
            raise ValueError(
                f'The chat template ends a prompt with {prompt[-40:]!r} and renders the answer to it otherwise, in '
                f'{where(row)}: {end[-80:]!r}. Expected that the prompt goes on; change template_arguments, or the '
                'template.'
            )
        begins.append(turn == 0 or row != places[turn - 1] or not prompt.startswith(so_far))
        pieces += [prompt if begins[-1] else prompt[len(so_far) :], end[len(prompt) :]]
        so_far = end
    encoded = _explained(lambda some: tokenize(some, tokenizer), pieces, np.repeat(places, 2), where)

    chats: list[list[list]] = [[] for _ in conversations]
    for turn, row in enumerate(places):
        before, words = encoded[2 * turn : 2 * turn + 2]
        end = max((i + 1 for i, token in enumerate(words) if token in stop_tokens), default=None)
        if end is None:
            raise ValueError(
                f'The chat template ends a turn of the assistant with {pieces[2 * turn + 1][-20:]!r}, in {where(row)}; '
                f'expected one of the tokens {tokenizer.convert_ids_to_tokens(sorted(stop_tokens))}, or responses '
                'would never end. Set chat_template_from to a model whose template fits, or eos_token.'
            )
        if begins[turn]:
            if not before:
                raise ValueError(f'Nothing comes before the words of the assistant in {where(row)}; add a message.')
            chats[row].append([[], []])
        tokens, learnt = chats[row][-1]
        tokens += before + words
        learnt += [False] * len(before) + [True] * end + [False] * (len(words) - end)
    return _shorten(chats, max_length, cut=long_chats == 'cut')


def _shorten(chats: list[list[list]], max_length: int, *, cut: bool) -> list[list[Chat]]:
    """Drops chats that are too long, or cuts them and drops those of which nothing is left to learn."""
    changed = sum(max(len(of_row) - 1, 0) for of_row in chats)
    if changed:
        _logger.warning(
            'the chat template changes earlier turns: %d conversations make %d chats, each with the turns before it as '
            'the template shows them to the model',
            *(len(chats), len(chats) + changed),
        )
    lengths = [len(tokens) for of_row in chats for tokens, _ in of_row]
    room = max_length if cut else None
    kept = [
        [
            Chat(np.array(tokens[:room], np.int32), np.array(learnt[:room], bool))
            for tokens, learnt in of_row
            if (len(tokens) <= max_length or cut) and any(learnt[:room])
        ]
        for of_row in chats
    ]
    if too_long := sum(length > max_length for length in lengths):
        dropped = len(lengths) - sum(map(len, kept))
        summary = (
            f'{too_long} of {len(lengths)} chats are longer than max_length = {max_length} tokens; the longest has '
            f'{max(lengths)}'
        )
        if dropped == len(lengths):
            raise ValueError(f'{summary}. No chat is left; raise max_length.')
        _logger.warning('%s. %d of them are dropped, %d are cut.', summary, dropped, too_long - dropped)
    return kept


def _conversations(rows: Dataset, where: Callable[[int], str]) -> list[tuple[list[dict[str, str]], int]]:
    """The messages of each row, and how many of them come before those that are learnt."""
    as_list = lambda words, role: [{'role': role, 'content': words}] if isinstance(words, str) else words
    if 'messages' in rows.column_names:
        found = [([], messages) for messages in rows['messages'][:]]
    elif {'prompt', 'completion'} <= set(rows.column_names):
        pairs = zip(rows['prompt'][:], rows['completion'][:], strict=True)
        found = [(as_list(prompt, 'user'), as_list(completion, 'assistant')) for prompt, completion in pairs]
    else:
        raise ValueError(
            f"{where(0)} has the columns {rows.column_names}; expected 'messages', or 'prompt' and 'completion'. "
            'Rename the columns.'
        )
    for row, parts in enumerate(found):
        if problem := _problem(*parts):
            raise ValueError(f'{where(row)} {problem}. Fix or drop that row.')
    # In a column all messages have the same fields, and those that one lacks are None.
    plain = lambda messages: [{key: x for key, x in message.items() if x is not None} for message in messages]
    return [(plain([*prompt, *completion]), len(prompt)) for prompt, completion in found]


def _problem(prompt: Any, completion: Any) -> str | None:
    """What is wrong with a row's messages, None if nothing is."""
    for messages in (prompt, completion):
        if not isinstance(messages, list):
            return f'has {repr(messages)[:120]} for messages; expected a list of {{role, content}}'
        for message in messages:
            texts = [message.get(key) for key in ('role', 'content')] if isinstance(message, dict) else [None]
            if not all(isinstance(text, str) for text in texts):
                return f'has the message {repr(message)[:120]}; expected text for role and content'
            if texts[0] == 'assistant' and not texts[1].strip():
                return 'has a message of the assistant without words; expected some'
    if not any(message['role'] == 'assistant' for message in completion):
        return f'has no words of the assistant to learn, but the roles {[m["role"] for m in completion]}; expected some'
    return None


def _explained(
    function: Callable[[list], list], items: list, places: Sequence[int], where: Callable[[int], str]
) -> list:
    """function(items); a ValueError names the row of the item that it cannot take."""
    try:
        return function(items)
    except ValueError:
        for item, row in zip(items, places, strict=True):
            try:
                function([item])
            except ValueError as error:
                raise ValueError(f'{where(int(row))}: {error}') from error
        raise
