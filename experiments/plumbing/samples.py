"""Samples of a training step, and the tokens that its updates held back."""

from collections.abc import Sequence

import numpy as np
from tokenizers.decoders import DecodeStream

from troll_jax.collect import Experience
from troll_jax.learn import Learner, Updated
from troll_jax.types import Rollout

_ANSWER = 1000  # characters of a reference answer that are kept: some are test cases


def token_flags(learner: Learner, rollout: Rollout, updates: Sequence[Updated]) -> np.ndarray:
    """[R, T] of the responses' tokens: 0 not in the loss, 1 in the loss, 2 and constrained by the update.

    A response is in one minibatch, so one update of the step has seen it: its flags are those of that update.
    """
    return learner.to_responses(rollout, [update.policy.flags for update in updates])


def token_table(flags: np.ndarray, rollout: Rollout, tokenizer, rows: int = 20) -> list[dict]:
    """The tokens that a step's updates projected or clipped most, and how often they saw them."""
    at = np.minimum(rollout.prompt_lengths[:, None] + np.arange(flags.shape[1]), rollout.tokens.shape[1] - 1)
    tokens = np.take_along_axis(rollout.tokens, at, axis=1)
    seen, constrained = (np.bincount(tokens[flags >= least], minlength=tokens.max() + 1) for least in (1, 2))
    most = np.argsort(-constrained, kind='stable')[:rows]
    return [
        {'token': int(i), 'text': tokenizer.decode([i]), 'constrained': int(constrained[i]), 'seen': int(seen[i])}
        for i in most
        if constrained[i]
    ]


def describe_samples(
    count: int,
    experience: Experience,
    flags: np.ndarray | None,
    advantages: np.ndarray,
    minibatches: int,
    tokenizer,
) -> list[dict]:
    """All responses to some prompts of a step, as they are written to `samples.jsonl`.

    Args:
      count: number of prompts. They are spread over the step, because without a lag its first update is at the policy
        that sampled, where nothing is constrained.
      experience: graded responses of the step.
      flags: [R, T] see `token_flags`; None: only the critic has learnt.
      advantages: [R, T]
      minibatches: number of updates of the step.
      tokenizer: tokenizer of the model.

    Returns:
      For each prompt its text, `answer`, `update` (from 1, that has seen its responses) and `responses`: `text` with
      the stop token, `reward`, `rewards` by term, `advantage` (mean over the tokens), `tokens`, `truncated`, and the
      [start, end) in the text of each token that was `constrained`.
    """
    rollout, (prompts, samples) = experience.rollout, experience.rewards.shape

    def response(i: int) -> dict:
        group, start, length = divmod(i, samples), rollout.prompt_lengths[i], rollout.response_lengths[i]
        tokens = rollout.tokens[i, start : start + length]
        constrained = [] if flags is None else np.flatnonzero(flags[i, :length] == 2)
        text, spans = token_spans(tokens, tokenizer)
        return {
            'text': text,
            'reward': float(experience.rewards[group]),
            'rewards': {name: float(values[group]) for name, values in (experience.terms or {}).items()},
            'advantage': float(advantages[i, :length].mean()),
            'tokens': int(length),
            'truncated': not rollout.stopped[i],
            'constrained': [spans[at] for at in constrained],
        }

    def prompt(group: int) -> dict:
        first = group * samples
        answer = '' if experience.answers is None else str(experience.answers[group])
        return {
            'prompt': tokenizer.decode(rollout.tokens[first, : rollout.prompt_lengths[first]]),
            'answer': answer[:_ANSWER],
            'update': group * minibatches // prompts + 1,
            'responses': [response(i) for i in range(first, first + samples)],
        }

    # The last of equal parts: a single prompt is the last of the step.
    return [prompt((part + 1) * prompts // min(count, prompts) - 1) for part in range(min(count, prompts))]


def token_spans(tokens: np.ndarray, tokenizer) -> tuple[str, list[list[int]]]:
    """The text of tokens, and the [start, end) of each in it.

    A character whose bytes are spread over several tokens belongs to each of them.
    """
    stream, ends, end = DecodeStream(skip_special_tokens=False), [], 0
    for token in tokens:
        end += len(stream.step(tokenizer.backend_tokenizer, int(token)) or '')
        ends.append(end)
    text = tokenizer.decode(tokens)
    starts = np.minimum([0, *ends[:-1]], len(text))
    # Bytes that are no character are only given back at the end.
    complete = np.array([*ends[:-1], len(text)])
    ends = complete[np.minimum(np.searchsorted(complete, starts, side='right'), len(complete) - 1)]
    return text, np.stack([starts, ends], axis=1).tolist()


def in_markdown(prompts: Sequence[dict]) -> str:
    """Samples for a tracker: constrained tokens in ⟦brackets⟧."""
    parts = []
    for prompt in prompts:
        parts += [f'**update {prompt["update"]}**, answer', _code(prompt['answer']), _code(prompt['prompt'])]
        for response in prompt['responses']:
            parts += [caption(response), _code(in_brackets(response['text'], response['constrained']))]
    return '\n\n'.join(parts)


def caption(response: dict) -> str:
    """One line of numbers about a response."""
    terms = ', '.join(f'{name} {value:.3g}' for name, value in response['rewards'].items())
    return (
        f'reward {response["reward"]:.3g}{f" ({terms})" if len(response["rewards"]) > 1 else ""} · advantage '
        f'{response["advantage"]:+.3g} · {response["tokens"]} tokens{", truncated" if response["truncated"] else ""} · '
        f'{len(response["constrained"])} constrained'
    )


def in_brackets(text: str, spans: Sequence[Sequence[int]]) -> str:
    """A text with ⟦brackets⟧ around spans of it."""
    return ''.join(f'⟦{part}⟧' if marked else part for part, marked in split(text, spans))


def split(text: str, spans: Sequence[Sequence[int]]) -> list[tuple[str, bool]]:
    """A text in parts, each with whether it is one of the spans, which are in order."""
    parts, done = [], 0
    for start, end in spans:
        start = max(start, done)
        if end > start:
            parts += [(text[done:start], False), (text[start:end], True)]
            done = end
    return [part for part in [*parts, (text[done:], False)] if part[0]]


def _code(text: str) -> str:
    return '\n'.join('    ' + line for line in text.splitlines())
