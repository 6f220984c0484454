"""Prompts: rows of a task as token arrays, and the order in which steps take them."""

from __future__ import annotations

import datetime
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)

LONG_PROMPTS = ('drop', 'cut')

# Today's date for templates (Llama 3.2, SmolLM3), or a run that resumes tomorrow would see other prompts. It is the
# one that Llama's template writes where it cannot ask.
_DATE = datetime.date(2024, 7, 26)
_TODAY = re.compile(r'strftime_now\(\s*(?P<quote>["\'])(?P<format>.*?)(?P=quote)\s*\)')


@dataclass(frozen=True)
class PromptSet:
    """Tokenized prompts with their reference answers, padded on the right."""

    tokens: np.ndarray  # [n, P] int32
    lengths: np.ndarray  # [n] int32, between 1 and P
    answers: list[str]  # n
    texts: list[str]  # n, the prompts as the chat template rendered them
    dropped: int = 0  # prompts that were too long and left out
    cut: int = 0  # prompts that were too long and shortened

    def __len__(self) -> int:
        return len(self.answers)

    def content(self) -> tuple[list, list]:
        """Tokens and answers as plain lists."""
        return [row[:length].tolist() for row, length in zip(self.tokens, self.lengths, strict=True)], self.answers


def distinct_rows(rows: Dataset, *, repeated: bool) -> Dataset:
    """The rows with each problem (messages and answer) once; `repeated` leaves them all in and only says so.

    Data sets are published with every problem up to a hundred times; in training a batch should not hold one twice.
    """
    seen, first = set(), []
    for i, problem in enumerate(zip(rows['messages'], rows['answer'], strict=True)):
        key = hash(repr(problem))
        if key not in seen:
            first.append(i)
        seen.add(key)
    if len(first) == len(rows):
        return rows
    what = 'stay, and count as more samples of it' if repeated else 'are left out'
    _logger.warning('%d of %d rows repeat a problem; they %s', len(rows) - len(first), len(rows), what)
    return rows if repeated else rows.select(first)


def hold_out(rows: Dataset, count: int, split: str) -> Dataset:
    """So many rows for split 'test', and the others for 'train': the same ones in every run."""
    if count >= len(rows):
        raise ValueError(f'Experiment.held_out = {count} of {len(rows)} rows leaves nothing to train on; lower it')
    order = np.random.default_rng(0).permutation(len(rows))
    return rows.select(np.sort(order[:count] if split == 'test' else order[count:]))


def encode_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    template_arguments: Mapping[str, Any] | None = None,
    long_prompts: str = 'drop',
) -> PromptSet:
    """Renders every row's messages with the chat template, ready for the response to begin, and tokenizes them.

    The template alone decides on special tokens: the tokenizer adds none, so there is one BOS at most. Templates that
    ask for today's date are told the same one on every day.

    Prompts longer than `max_length` are dropped or cut, with one warning for all of them. The beginning of the last
    user's words is cut off: a template's end must remain, or the model would not know that it is to answer, and a
    question and the form asked of the answer mostly come last.

    Args:
        dataset: columns `messages` and `answer`.
        tokenizer: one with a chat template and a padding token.
        max_length: P, tokens.
        template_arguments: passed to the chat template, e.g. {'enable_thinking': False}.
        long_prompts: 'drop' or 'cut'. One that is too long without any of the user's words is dropped in any case.

    Raises:
        ValueError: no rows, a template or a tokenizer that fails, an argument that no template mentions, an empty
            prompt, a doubled BOS, every prompt is too long, or `long_prompts` is neither.
    """
    if len(dataset) == 0:
        raise ValueError('The data set has no rows; expected at least one prompt. Check its source and split.')
    if long_prompts not in LONG_PROMPTS:
        raise ValueError(f'long_prompts is {long_prompts!r}; expected one of {LONG_PROMPTS}.')

    def render(conversations):
        texts = render_chats(conversations, tokenizer, template_arguments=template_arguments)
        return texts, tokenize(texts, tokenizer)

    texts, encoded = render(list(dataset['messages']))
    lengths = np.array([len(ids) for ids in encoded], np.int32)
    bos = tokenizer.bos_token_id
    for row, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f'The prompt of row {row} has no tokens: {dataset[row]["messages"]!r}. Drop that row.')
        if bos is not None and ids[:2] == [bos, bos]:
            raise ValueError(
                f'The prompt of row {row} begins with two BOS tokens: {texts[row][:80]!r}; expected one. The chat '
                'template and the message both write it; take it out of one.'
            )

    too_long = np.flatnonzero(lengths > max_length)
    if len(too_long):
        summary = (
            f'{len(too_long)} of {len(encoded)} prompts are longer than max_length = {max_length} tokens; the longest '
            f'has {lengths.max()}'
        )
        if long_prompts == 'cut':
            for row in too_long:
                if (shorter := _cut(dataset[int(row)]['messages'], render, max_length)) is not None:
                    texts[row], encoded[row] = shorter
                    lengths[row] = len(encoded[row])
    kept = np.flatnonzero(lengths <= max_length)
    dropped = len(encoded) - len(kept)
    cut = len(too_long) - dropped
    if len(kept) == 0:
        raise ValueError(f'{summary}. No prompt is left; raise max_length.')
    if len(too_long):
        _logger.warning('%s. %d of them are dropped, %d are cut.', summary, dropped, cut)
    tokens = np.full((len(kept), max_length), tokenizer.pad_token_id, np.int32)
    for i, row in enumerate(kept):
        tokens[i, : lengths[row]] = encoded[row]
    answers = list(dataset['answer'])
    return PromptSet(
        tokens=tokens,
        lengths=lengths[kept],
        answers=[answers[row] for row in kept],
        texts=[texts[row] for row in kept],
        dropped=dropped,
        cut=cut,
    )


def render_chats(
    conversations: list[list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool = True,
    template_arguments: Mapping[str, Any] | None = None,
) -> list[str]:
    """Conversations as the chat template writes them, on every day with the same date.

    Raises:
        ValueError: the template fails, or mentions one of the arguments nowhere.
    """
    template_arguments = dict(template_arguments or {})
    unused = [name for name in template_arguments if name not in str(tokenizer.chat_template)]
    if unused:
        raise ValueError(f'The chat template does not mention {unused}, so they would change nothing; remove them.')
    try:
        template = _TODAY.sub(lambda call: repr(_DATE.strftime(call['format'])), tokenizer.get_chat_template())
        return tokenizer.apply_chat_template(
            conversations,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **template_arguments,
        )
    except Exception as error:  # whatever a template does
        raise ValueError(
            f'The chat template fails on the prompts ({type(error).__name__}: {error}). Correct it, or set '
            'chat_template_from to a model whose template fits.'
        ) from error


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of texts, and no special token that they do not spell out. Raises a ValueError if one fails."""
    try:
        return tokenizer(texts, add_special_tokens=False)['input_ids']
    except Exception as error:  # of many kinds, such as a character that the vocabulary cannot spell
        if len(texts) > 1:  # which text it is
            for text in texts:
                tokenize([text], tokenizer)
        raise ValueError(
            f'The tokenizer fails on the prompt {texts[0][:120]!r} ({type(error).__name__}: {error}); expected text '
            'that it has tokens for. Fix or drop that row, or use the tokenizer of another model.'
        ) from error


def _cut(messages: list[dict[str, str]], render: Callable, max_length: int) -> tuple[str, list[int]] | None:
    """Text and tokens of a prompt with as much of the end of the last user's words as fits; None if nothing does."""
    turn = max((i for i, message in enumerate(messages) if message['role'] == 'user'), default=None)
    if turn is None:
        return None
    words = messages[turn]['content']
    fits, best = len(words), None  # bisection over where the words begin: at `fits`, the prompt is short enough
    too_early = 0
    while fits - too_early > 1:
        start = (too_early + fits) // 2
        conversation = [*messages[:turn], {**messages[turn], 'content': words[start:]}, *messages[turn + 1 :]]
        (text,), (tokens,) = render([conversation])
        if len(tokens) <= max_length:
            fits, best = start, (text, tokens)
        else:
            too_early = start
    return best


def batch_indices(n: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
    """Indices of the prompts of a step, of n: [batch_size] int64. A pure function, so resuming needs no iterator state.

    Every epoch is a permutation of its own, drawn from (seed, epoch), and batches walk through one after the other. A
    batch may end one epoch and begin the next, so that no prompt is ever left out.

    Raises:
        ValueError: batch_size is not between 1 and n.
    """
    if not 1 <= batch_size <= n:
        raise ValueError(
            f'batch_size is {batch_size} and there are {n} prompts; expected 1 <= batch_size <= {n}. Lower batch_size '
            'or load more prompts.'
        )
    first_epoch, start = divmod(step * batch_size, n)
    order = np.concatenate(
        [np.random.default_rng([seed, epoch]).permutation(n) for epoch in (first_epoch, first_epoch + 1)]
    )
    return order[start : start + batch_size]
