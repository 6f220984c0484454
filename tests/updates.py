"""A policy of a tiny decoder, responses that it sampled, and updates on them.

Gradients are read off the parameters: with plain gradient descent at rate one, the change is the gradient.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny import decoder_config

from troll_jax.models import decoder as decoders
from troll_jax.ops.aggregation import token_mean
from troll_jax.ops.categorical import entropy
from troll_jax.ops.losses import troll
from troll_jax.ops.support import default_tail, sparsify
from troll_jax.packing import BatchShape, batch_shape, make_batch, make_layout
from troll_jax.score import Scoring
from troll_jax.types import START, Batch, Rollout, TrainState
from troll_jax.update import make_update

VOCAB, PROMPT, RESPONSE, ROWS, KEPT, MASS = 38, 3, 5, 8, 11, 1 - 1e-5
CONFIG = decoder_config(VOCAB)
SGD = optax.sgd(1.0)
SCORING = Scoring(temperature=1.0, tail_rule=default_tail, support_size=KEPT, support_mass=MASS)


def noise(seed: int, scale: float):
    """Normal numbers in the form of the parameters."""
    leaves, tree = jax.tree.flatten(decoders.abstract(CONFIG)[1])
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree, [scale * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    )


@functools.cache
def policy_params():
    """A policy far from uniform, of sizes at which rounding stays small: embeddings near one, products too."""
    factors = {'embedding': 3.0, 'lm_head': 1.5, 'scale': 0.3}
    params = jax.tree.map_with_path(lambda path, p: factors.get(path[-1].key, 1.0) * p, noise(0, 0.3))
    return jax.tree.map_with_path(lambda path, p: 1 + p if path[-1].key == 'scale' else p, params)


@functools.cache
def nearby_params():
    """The policy when it has moved on: some tokens are outside of the trust region, some inside."""
    return jax.tree.map(jnp.add, policy_params(), noise(9, 0.03))


def all_log_probs(params, tokens) -> jax.Array:
    """[R, S, V] of the next token."""
    decoder = decoders.bind(decoders.abstract(CONFIG)[0], params)
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return jax.nn.log_softmax(decoder(tokens, index, jnp.ones_like(tokens)) @ decoder.unembedding.T)


@functools.cache
def rollout() -> Rollout:
    """Responses of every kind: full, one token, after shorter prompts. In numpy, as `make_batch` takes them."""
    tokens = jax.random.randint(jax.random.key(1), (ROWS, PROMPT + RESPONSE), 1, VOCAB)
    prompt_lengths = jnp.array([3, 1, 2, 3, 3, 2, 1, 3])
    response_lengths = jnp.array([5, 1, 4, 2, 5, 3, 5, 1])
    valid = jnp.arange(PROMPT + RESPONSE)[None] < (prompt_lengths + response_lengths)[:, None]
    tokens = jnp.where(valid, tokens, 0)

    @jax.jit
    def record(params):
        log_probs = all_log_probs(params, tokens)
        at = jnp.minimum(prompt_lengths[:, None] + jnp.arange(RESPONSE)[None], PROMPT + RESPONSE - 1)
        log_probs = jnp.take_along_axis(log_probs, at[:, :, None] - 1, axis=1)
        sampled = jnp.take_along_axis(tokens, at, axis=1)
        one = lambda row, token: (row[token], entropy(row), sparsify(row, token, support_size=KEPT, support_mass=MASS))
        return jax.vmap(jax.vmap(one))(log_probs, sampled)

    cut = jnp.full(ROWS, -1)
    return jax.tree.map(np.asarray, Rollout(tokens, prompt_lengths, response_lengths, cut, *record(policy_params())))


ADVANTAGES = np.array([1.0, -0.5, 0.3, 0.0, -1.2, 0.8, -0.1, 2.0], np.float32)
PADDED = batch_shape(ROWS, PROMPT + RESPONSE)  # a row for each response
# Rows of 13 tokens for sequences of at most 8: micro-batches of 1, 2 and 3 rows, the last ones partly or quite empty.
PACKED = [BatchShape(8, 1, 13), BatchShape(4, 2, 13), BatchShape(2, 3, 13)]


def batch(shape: BatchShape = PADDED, aggregation=token_mean, advantages=ADVANTAGES, data=None) -> Batch:
    data = rollout() if data is None else data
    weights = np.asarray(aggregation(data.response_lengths, RESPONSE))
    return make_batch(data, advantages, weights, make_layout(data, shape))


@functools.cache
def updater(objective=troll, head_chunk=1024, optimizer=SGD, tail_rule=default_tail):
    return make_update(CONFIG, optimizer, objective, SCORING._replace(tail_rule=tail_rule, head_chunk=head_chunk))


def run(update, params, data: Batch):
    """New parameters and metrics, in numpy. The parameters that go in survive."""
    state, log = update(start(params, SGD), data)
    return jax.tree.map(np.asarray, (state.params, log.metrics))


def start(params, optimizer) -> TrainState:
    """The state of a run that begins with a copy of these parameters."""
    params = jax.tree.map(jnp.copy, params)
    progress = jax.tree.map(jnp.asarray, START)
    return TrainState(progress, params, optimizer.init(params))


def assert_same(one, other, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5), one, other)


def assert_same_step(one, other):
    """New parameters and metrics: gradients equal to 1e-6 of their norm."""
    (params, metrics), (expected, expected_metrics) = one, other
    norm = max(1.0, expected_metrics['gradient_norm'])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * norm, rtol=0), params, expected)
    for name, expected in expected_metrics.items():  # rounding may cost a token one evaluation more or less
        assert_same(metrics[name], expected, atol=0.1 if name.startswith('evaluations') else 1e-5)
