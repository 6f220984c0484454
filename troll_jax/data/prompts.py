"""From rows of a task to token arrays, and which rows a step takes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptSet:
    """Tokenized prompts with their reference answers, padded on the right."""

    tokens: np.ndarray  # [n, P] int32
    lengths: np.ndarray  # [n] int32, between 1 and P
    answers: list[str]  # n
    texts: list[str]  # n, the prompts as the chat template rendered them

    def __len__(self) -> int:
        return len(self.answers)


def encode_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    template_arguments: Mapping[str, Any] | None = None,
) -> PromptSet:
    """Renders every row's messages with the chat template, ready for the response to begin, and tokenizes them.

    The template alone decides on special tokens: the tokenizer adds none, so there is one BOS at most. Prompts longer
    than `max_length` are dropped, with one warning for all of them.

    Args:
        dataset: columns `messages` and `answer`.
        tokenizer: with a chat template and a padding token.
        max_length: P, tokens.
        template_arguments: passed to the chat template, e.g. {'enable_thinking': False}.

    Raises:
        ValueError: no rows, a template argument that the template does not mention, an empty prompt, a doubled BOS, or
            every prompt is too long.
    """
    if len(dataset) == 0:
        raise ValueError('The data set has no rows; expected at least one prompt. Check its source and split.')
    template_arguments = dict(template_arguments or {})
    unused = [name for name in template_arguments if name not in str(tokenizer.chat_template)]
    if unused:
        raise ValueError(f'The chat template does not mention {unused}, so they would change nothing; remove them.')
    texts = tokenizer.apply_chat_template(
        list(dataset['messages']), tokenize=False, add_generation_prompt=True, **template_arguments
    )
    encoded = tokenizer(texts, add_special_tokens=False)['input_ids']
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

    kept = np.flatnonzero(lengths <= max_length)
    if len(kept) < len(encoded):
        summary = (
            f'{len(encoded) - len(kept)} of {len(encoded)} prompts are longer than max_length = {max_length} tokens; '
            f'the longest has {lengths.max()}'
        )
        if len(kept) == 0:
            raise ValueError(f'{summary}. No prompt is left; raise max_length.')
        _logger.warning('%s. They are dropped.', summary)
    tokens = np.full((len(kept), max_length), tokenizer.pad_token_id, np.int32)
    for i, row in enumerate(kept):
        tokens[i, : lengths[row]] = encoded[row]
    answers = list(dataset['answer'])
    return PromptSet(
        tokens=tokens,
        lengths=lengths[kept],
        answers=[answers[row] for row in kept],
        texts=[texts[row] for row in kept],
    )


def batch_indices(n: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
    """Which of n prompts step `step` takes: [batch_size] int64. A pure function, so resuming needs no iterator state.

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
