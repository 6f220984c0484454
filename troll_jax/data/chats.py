"""Conversations as tokens, and which of them an assistant wrote: data for supervised fine-tuning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from troll_jax.data.prompts import render_chats, tokenize

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)


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
        max_length: tokens of the longest chat; longer ones are dropped, with one warning for all of them.
        stop_tokens: tokens that end a response.
        where: the place of a row, for an error.
        template_arguments: passed to the chat template.

    Raises:
        ValueError: a row that is no conversation or has no words of the assistant, a template or tokenizer that fails
            on one, a template that begins an assistant's turn otherwise than a prompt ends or ends it with no stop
            token, or no chat that is short enough.
    """
    conversations = _conversations(rows, where)
    turns = [
        (row, messages[:i], messages[i])
        for row, (messages, first) in enumerate(conversations)
        for i in range(first, len(messages))
        if messages[i]['role'] == 'assistant'
    ]
    places = [row for row, _, _ in turns]

    def each(function: Callable[[list], list], items: list, places: list[int]) -> list:
        """function(items); a ValueError names the row of the item that it cannot take."""
        try:
            return function(items)
        except ValueError:
            for item, row in zip(items, places, strict=True):
                try:
                    function([item])
                except ValueError as error:
                    raise ValueError(f'{where(row)}: {error}') from error
            raise

    def render(some: list, add_generation_prompt: bool) -> list[str]:
        settings = {'template_arguments': template_arguments, 'add_generation_prompt': add_generation_prompt}
        return each(lambda some: render_chats(some, tokenizer, **settings), some, places)

    prompts = render([before for _, before, _ in turns], True)
    ends = render([[*before, message] for _, before, message in turns], False)
    pieces, begins = [], []  # texts before and of each turn; whether it begins a chat
    for turn, (row, prompt, end) in enumerate(zip(places, prompts, ends, strict=True)):
        if not end.startswith(prompt):
            raise ValueError(
                f'The chat template ends a prompt with {prompt[-40:]!r} and renders the answer to it otherwise, in '
                f'{where(row)}: {end[-80:]!r}. Expected that the prompt goes on; change template_arguments, or the '
                'template.'
            )
        so_far = ends[turn - 1] if turn and places[turn - 1] == row else None
        begins.append(so_far is None or not prompt.startswith(so_far))
        pieces += [prompt if begins[-1] else prompt[len(so_far) :], end[len(prompt) :]]
    encoded = each(lambda some: tokenize(some, tokenizer), pieces, [row for row in places for _ in range(2)])

    chats: list[list[tuple[list[int], list[bool]]]] = [[] for _ in conversations]
    for row, is_first, before, words in zip(places, begins, encoded[::2], encoded[1::2], strict=True):
        end = max((i + 1 for i, token in enumerate(words) if token in stop_tokens), default=0)
        if not end:
            raise ValueError(
                f'The chat template ends a turn of the assistant with {tokenizer.decode(words[-3:])!r}, in '
                f'{where(row)}; expected one of {tokenizer.convert_ids_to_tokens(sorted(stop_tokens))}, or no response '
                'would ever end. Set chat_template_from to a model whose template fits, or eos_token.'
            )
        if is_first:
            chats[row].append(([], []))
        tokens, learnt = chats[row][-1]
        if not (before or tokens):
            raise ValueError(f'Nothing comes before the words of the assistant in {where(row)}; add a message.')
        tokens += before + words
        learnt += [False] * len(before) + [True] * end + [False] * (len(words) - end)

    if changed := sum(len(of_row) > 1 for of_row in chats):
        _logger.warning(
            'the chat template changes earlier turns: %d conversations make several chats, one for each way in which '
            'the model sees the turns before',
            changed,
        )
    lengths = np.array([len(tokens) for of_row in chats for tokens, _ in of_row])
    if too_long := np.sum(lengths > max_length):
        summary = (
            f'{too_long} of {len(lengths)} chats are longer than max_length = {max_length} tokens; the longest has'
        )
        if too_long == len(lengths):
            raise ValueError(f'{summary} {lengths.max()}. No chat is left; raise max_length.')
        _logger.warning('%s %d. They are dropped.', summary, lengths.max())
    as_chat = lambda tokens, learnt: Chat(np.array(tokens, np.int32), np.array(learnt, bool))
    return [[as_chat(*chat) for chat in of_row if len(chat[0]) <= max_length] for of_row in chats]


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
    for row, (prompt, completion) in enumerate(found):
        for message in chain(*(part if isinstance(part, list) else [part] for part in (prompt, completion))):
            fields = message if isinstance(message, dict) else {}
            role, content = fields.get('role'), fields.get('content')
            if not (isinstance(role, str) and isinstance(content, str) and (role != 'assistant' or content.strip())):
                raise ValueError(
                    f'{where(row)} has the message {repr(message)[:120]}; expected text for role and content, not '
                    'empty if it is of the assistant. Fix or drop that row.'
                )
        if not any(message['role'] == 'assistant' for message in completion):
            raise ValueError(
                f'{where(row)} has nothing to learn, but the roles {[message["role"] for message in completion]}; '
                'expected some words of the assistant. Fix or drop that row.'
            )
    # In a column all messages have the same fields, and those that one lacks are None.
    plain = lambda messages: [{key: x for key, x in message.items() if x is not None} for message in messages]
    return [(plain([*prompt, *completion]), len(prompt)) for prompt, completion in found]
