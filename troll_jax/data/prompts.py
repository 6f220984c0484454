"""Prompts: rows of a task as token arrays, and the order in which steps take them."""

from __future__ import annotations

import datetime
import logging
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from troll_jax.data.tasks.interface import ROWS_AT_A_TIME
from troll_jax.types import Prompts

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    Messages = Sequence[Mapping[str, str]]

_logger = logging.getLogger(__name__)

LONG_PROMPTS = ('drop', 'cut')

# Today's date for templates (Llama 3.2, SmolLM3), or a run that resumes tomorrow would see other prompts. It is the
# one that Llama's template writes where it cannot ask. A macro, because templates may call nothing else of ours.
_DATE = datetime.datetime(2024, 7, 26)
_FIXED_DATE = (
    '{%- macro strftime_now(format) -%}{{ format'
    + ''.join(
        f" | replace('%{code}', '{_DATE.strftime(f'%{code}')}')"
        for code in ('-d', '-m', *'aAbBcdDeFHIjmMpRSTuUwWxXyYZ')
    )
    + ' }}{%- endmacro +%}'
)
_MARKS = '\U00100000', '\U00100001'  # for private use, around what looks like a special token and is text


@dataclass(frozen=True)
class PromptSet:
    """Tokenized prompts with their reference answers. `prompts[rows]` are some of them, padded."""

    tokens: np.ndarray  # [tokens of all prompts] int32, one prompt behind the other
    lengths: np.ndarray  # [n] int32, between 1 and P
    answers: list[str]  # n
    max_length: int  # P
    dropped: int = 0  # prompts that were too long and left out
    cut: int = 0  # prompts that were too long and shortened
    levels: np.ndarray | None = None  # [n] int, of difficulty
    rows: Dataset | None = None  # n, with `messages` and further columns; for reward terms

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, rows: np.ndarray | slice) -> Prompts:
        """Prompts in numpy, with zeros on the right."""
        positions, lengths = np.arange(self.max_length), self.lengths[rows]
        is_token = positions < lengths[:, None]
        places = np.where(is_token, self._starts[rows, None] + positions, 0)
        return Prompts(np.where(is_token, self.tokens[places], 0), lengths)

    def hashes(self) -> set[int]:
        """Hashes of the distinct prompts, to be compared in this process."""
        return {hash(tokens.tobytes()) for tokens in np.split(self.tokens, self._starts[1:])}

    def decode(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The text of every prompt as the model reads it, with special tokens."""
        return tokenizer.batch_decode(np.split(self.tokens, self._starts[1:]), skip_special_tokens=False)

    @property
    def content(self) -> tuple:
        """All that decides what a run learns from the prompts."""
        further = set(self.rows.column_names if self.rows is not None else ()) - {'messages'}
        return self.tokens, self.lengths, self.answers, self.levels, *(self.rows[name][:] for name in sorted(further))

    def columns(self, rows: np.ndarray) -> dict[str, list]:
        """The columns of some rows, `messages`, `answer` and further ones, see `rows`."""
        found = {'messages': [()] * len(rows)} if self.rows is None else self.rows[rows]
        return found | {'answer': [self.answers[i] for i in rows]}

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths


def distinct_rows(rows: Dataset, *, repeated: bool) -> Dataset:
    """The rows with each problem (messages and answer) once; `repeated` leaves them all in and only says so.

    Data sets are published with every problem up to a hundred times; in training a batch should not hold one twice.
    """
    seen, first = set(), []
    problems = chain.from_iterable(zip(x['messages'], x['answer'], strict=True) for x in rows.iter(ROWS_AT_A_TIME))
    for i, problem in enumerate(problems):
        key = hash(repr(problem))
        if key not in seen:
            first.append(i)
        seen.add(key)
    if len(first) == len(rows):
        return rows
    what = 'stay, and count as more samples of it' if repeated else 'are left out'
    _logger.warning('%d of %d rows repeat a problem; they %s', len(rows) - len(first), len(rows), what)
    return rows if repeated else rows.select(first)


def hold_out(rows: Dataset, count: float, split: str) -> Dataset:
    """So many rows, or such a share below 1, for split 'test', and the others for 'train': the same in every run."""
    count = count if count >= 1 else max(1, round(count * len(rows)))
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

    The template alone decides on special tokens. The tokenizer adds none, so there is one BOS at most, and what looks
    like one in a message is text, so no problem can end the user's turn. Templates that ask for today's date are told
    the same one on every day.

    Prompts longer than `max_length` are dropped or cut, with one warning for all of them. The beginning of the last
    user's words is cut off: a template's end must remain, or the model would not know that it is to answer, and a
    question and the form asked of the answer mostly come last.

    Args:
        dataset: columns `messages`, `answer` and, for a curriculum, `level`; further ones are kept for reward terms.
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

    def render(conversations: Sequence[Messages]) -> list[tuple[str, list[int]]]:
        texts = render_chats(conversations, tokenizer, template_arguments=template_arguments)
        return list(zip(texts, tokenize(texts, tokenizer), strict=True))

    bos = tokenizer.bos_token_id
    tokens, lengths, answers, levels, kept = array('i'), [], [], [], []
    too_long = longest = cut = 0
    for start in range(0, len(dataset), ROWS_AT_A_TIME):
        batch = dataset[start : start + ROWS_AT_A_TIME]
        for i, (text, ids) in enumerate(render(batch['messages'])):
            row, messages = start + i, batch['messages'][i]
            if not ids:
                raise ValueError(f'The prompt of row {row} has no tokens: {messages!r}. Drop that row.')
            if bos is not None and ids[:2] == [bos, bos]:
                raise ValueError(
                    f'The prompt of row {row} begins with two BOS tokens: {text[:80]!r}; expected one. The chat '
                    'template and the message both write it; take it out of one.'
                )
            longest = max(longest, len(ids))
            if len(ids) > max_length:
                too_long += 1
                shorter = _cut(messages, render, max_length) if long_prompts == 'cut' else None
                if shorter is None:
                    continue
                ids = shorter
                cut += 1
            tokens.extend(ids)
            kept.append(row)
            lengths.append(len(ids))
            answers.append(batch['answer'][i])
            if 'level' in batch:
                levels.append(batch['level'][i])
    if too_long:
        summary = (
            f'{too_long} of {len(dataset)} prompts are longer than max_length = {max_length} tokens; the longest has '
            f'{longest}'
        )
        if not lengths:
            raise ValueError(f'{summary}. No prompt is left; raise max_length.')
        _logger.warning('%s. %d of them are dropped, %d are cut.', summary, too_long - cut, cut)
    tokens, lengths = np.frombuffer(tokens, np.int32), np.array(lengths, np.int32)
    levels = np.array(levels) if levels else None
    rows = dataset.select(kept) if len(kept) < len(dataset) else dataset
    rows = rows.select_columns([name for name in rows.column_names if name not in ('answer', 'level')])
    return PromptSet(tokens, lengths, answers, max_length, too_long - cut, cut, levels, rows)


def render_chats(
    conversations: Sequence[Messages],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool = True,
    template_arguments: Mapping[str, Any] | None = None,
) -> list[str]:
    """Conversations as the chat template writes them, on every day with the same date.

    What looks like a special token in a message stands between marks, by which `tokenize` knows that it is text; not so
    in messages of the assistant, which writes special tokens.

    Raises:
        ValueError: the template fails, or mentions one of the arguments nowhere.
    """
    template_arguments = dict(template_arguments or {})
    unused = [name for name in template_arguments if name not in str(tokenizer.chat_template)]
    if unused:
        raise ValueError(f'The chat template does not mention {unused}, so they would change nothing; remove them.')
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special = '|'.join(map(re.escape, sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)))
    special = re.compile(special or '(?!)')  # which is nowhere

    def mark(message: Mapping[str, str]) -> Mapping[str, str]:
        if message['role'] == 'assistant':
            return message
        words = message['content'].translate(dict.fromkeys(map(ord, _MARKS)))  # they are ours alone
        return {**message, 'content': special.sub(r'{}\g<0>{}'.format(*_MARKS), words)}

    try:
        return tokenizer.apply_chat_template(
            [list(map(mark, messages)) for messages in conversations],
            chat_template=_FIXED_DATE + tokenizer.get_chat_template(),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **template_arguments,
        )
    except Exception as error:  # whatever a template does
        raise ValueError(
            f'The chat template fails on the prompts ({type(error).__name__}: {error}). Correct it, or set '
            'chat_template_from to a model whose template fits.'
        ) from error


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of texts from `render_chats`, and no special token that the template did not write.

    Raises:
        ValueError: the tokenizer fails on a text, or cannot spell a special token as text.
    """
    is_marked = [_MARKS[0] in text for text in texts]
    plain = iter(_tokenize([text for text, marked in zip(texts, is_marked, strict=True) if not marked], tokenizer))
    return [
        _tokenize_marked(text, tokenizer) if marked else next(plain)
        for text, marked in zip(texts, is_marked, strict=True)
    ]


def _tokenize_marked(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    tokens = []
    for i, part in enumerate(re.split('{}(.*?){}'.format(*_MARKS), text, flags=re.DOTALL)):
        is_quoted = i % 2 == 1
        ids = _tokenize([part], tokenizer, split_special_tokens=is_quoted)[0] if part else []
        if is_quoted and tokenizer.convert_tokens_to_ids(part) in ids:
            raise ValueError(f'The tokenizer cannot spell {part!r} as text, in {text[:120]!r}. Drop that row.')
        tokens += ids
    return tokens


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, **options: bool) -> list[list[int]]:
    if not texts:
        return []
    try:
        return tokenizer(texts, add_special_tokens=False, **options)['input_ids']
    except Exception as error:  # of many kinds, such as a character that the vocabulary cannot spell
        if len(texts) > 1:  # which text it is
            for text in texts:
                _tokenize([text], tokenizer, **options)
        raise ValueError(
            f'The tokenizer fails on the prompt {texts[0][:120]!r} ({type(error).__name__}: {error}); expected text '
            'that it has tokens for. Fix or drop that row, or use the tokenizer of another model.'
        ) from error


def _cut(messages: Messages, render: Callable, max_length: int) -> list[int] | None:
    """Tokens of a prompt with as much of the end of the last user's words as fits; None if nothing does."""
    turn = max((i for i, message in enumerate(messages) if message['role'] == 'user'), default=None)
    if turn is None:
        return None
    words = messages[turn]['content']
    fits, best = len(words), None  # bisection over where the words begin: at `fits`, the prompt is short enough
    too_early = 0
    while fits - too_early > 1:
        start = (too_early + fits) // 2
        conversation = [*messages[:turn], {**messages[turn], 'content': words[start:]}, *messages[turn + 1 :]]
        ((_, ids),) = render([conversation])
        if len(ids) <= max_length:
            fits, best = start, ids
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


def draw_indices(
    prompts: PromptSet, batch_size: int, *, seed: int, draw: int, level: Callable[[int], float] | None
) -> np.ndarray:
    """Indices of the prompts of a draw, see `batch_indices`: of all, or of those up to `level(draw)`.

    Raises:
        ValueError: the prompts have no levels, or there are fewer than batch_size.
    """
    if level is None:
        return batch_indices(len(prompts), batch_size, seed=seed, step=draw)
    if prompts.levels is None:
        raise ValueError(
            'Sampling.level is set, but the prompts have no levels; set it to None, or the levels of a task.'
        )
    known = np.flatnonzero(prompts.levels <= level(draw))
    if len(known) < batch_size:
        raise ValueError(
            f'Sampling.level is {level(draw)} at draw {draw}, which {len(known)} prompts do not exceed, and batch_size '
            f'is {batch_size}; expected as many prompts. Lower it, or begin at a higher level.'
        )
    return known[batch_indices(len(known), batch_size, seed=seed, step=draw)]
