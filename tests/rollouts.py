"""Rollouts of a tiny decoder, which tests of the sampler share."""

import functools
import heapq

import jax
import jax.numpy as jnp
import numpy as np
from tiny import decoder_config

from troll_jax.models import decoder as decoders
from troll_jax.rollout import Sampler
from troll_jax.types import Prompts

VOCAB, PROMPT, RESPONSE, GROUP, KEPT, MASS = 38, 5, 7, 3, 11, 1 - 1e-5
CONFIG = decoder_config(VOCAB)
NEVER = VOCAB + 1  # a token that no model says
NO_LIMITS = np.full(8 * GROUP, RESPONSE)


@functools.cache
def policy_params(config=CONFIG):
    """A policy far from uniform whose choices depend on the prompt."""
    leaves, tree = jax.tree.flatten_with_path(decoders.abstract(config)[1])
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = lambda path, leaf, key: (1.0 if path[-1].key == 'scale' else 0.0) + 0.4 * jax.random.normal(key, leaf.shape)
    return jax.tree.unflatten(tree, [draw(*leaf, key) for leaf, key in zip(leaves, keys, strict=True)])


def some_prompts(batch: int = 4) -> Prompts:
    tokens = jax.random.randint(jax.random.key(1), (batch, PROMPT), 0, VOCAB)
    lengths = jnp.array([3, 5, 1, 4, 2, 5, 3, 4])[:batch]
    return Prompts(jnp.where(jnp.arange(PROMPT)[None] < lengths[:, None], tokens, 0), lengths)


def keys_of(batch: int = 4) -> jax.Array:
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(2), i))(jnp.arange(batch))


@functools.cache
def sampler(temperature=1.0, stop=(NEVER,), group=GROUP, config=CONFIG, **changes):
    return Sampler(
        config,
        samples_per_prompt=group,
        max_response_length=RESPONSE,
        temperature=temperature,
        stop_tokens=stop,
        support_size=KEPT,
        support_mass=MASS,
        **changes,
    )


@functools.cache
def rollout(temperature=1.0, stop=(NEVER,), group=GROUP, **changes):
    run = sampler(temperature, stop, group, **changes)
    return run(policy_params(), some_prompts(), keys_of())


def assert_same_responses(got, expected, rows=slice(None)):
    """The same tokens, lengths and ends, and up to rounding the same record."""
    for name in ('tokens', 'prompt_lengths', 'response_lengths', 'stop_token'):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name)[rows], err_msg=name)
    for name in ('log_probs', 'entropy'):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name)[rows], atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(got.support.tokens, expected.support.tokens[rows])
    np.testing.assert_allclose(got.support.log_probs, expected.support.log_probs[rows], atol=1e-5)


def responses(result) -> list[list[int]]:
    """The response tokens of every row, up to its length."""
    bounds = zip(result.tokens, result.prompt_lengths, result.response_lengths, strict=True)
    return [row[start : start + length].tolist() for row, start, length in bounds]


@functools.cache
def forward():
    """Jitted log-probabilities [R, S, V] of the next token, by the forward pass of training."""
    graphdef, _ = decoders.abstract(CONFIG)

    @functools.partial(jax.jit, static_argnames='temperature')
    def run(tokens, temperature=1.0):
        decoder = decoders.bind(graphdef, policy_params())
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return jax.nn.log_softmax(decoder(tokens, index, jnp.ones_like(tokens)) @ decoder.unembedding.T / temperature)

    return run


def steps_of_a_queue(lengths, slots: int) -> int:
    """Steps until all are done if every slot that becomes free takes the next one at once."""
    ends = [0] * slots
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + int(length))
    return max(ends)
