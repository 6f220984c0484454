"""The update on a tiny decoder: what must not matter does not, to float32, and what must be zero is zero.

Gradients are read off the parameters: with plain gradient descent at rate one, the change is the gradient.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from troll_jax.models import decoder as decoders
from troll_jax.models.head import sparse_head
from troll_jax.ops.categorical import entropy
from troll_jax.ops.losses import constant_length, ppo_clip, sequence_mean, token_mean, troll
from troll_jax.ops.support import sparsify
from troll_jax.sharding import make_mesh, named_sharding
from troll_jax.types import Batch, TrainState
from troll_jax.update import make_update, minibatches, response_mask

VOCAB, PROMPT, RESPONSE, ROWS, KEPT, MASS = 38, 3, 5, 8, 11, 1 - 1e-5
AGGREGATIONS = (token_mean, sequence_mean, constant_length)
CONFIG = decoders.DecoderConfig(
    vocab_size=VOCAB,
    width=12,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=6,
    mlp_width=22,
    rope_theta=1e4,
    norm_eps=1e-6,
    tied_embeddings=False,
    compute_dtype='float32',
)


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
def batch() -> Batch:
    """Rows of every kind: full, one token, shorter prompts; advantages of both signs and zero."""
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
        one = lambda row, token: (row[token], sparsify(row, token, max_tokens=KEPT, mass=MASS))
        return jax.vmap(jax.vmap(one))(log_probs, sampled)

    old_log_probs, old = record(policy_params())
    advantages = jnp.array([1.0, -0.5, 0.3, 0.0, -1.2, 0.8, -0.1, 2.0])
    return Batch(tokens, prompt_lengths, response_lengths, advantages, old_log_probs, old)


@functools.cache
def updater(objective=troll, aggregation=token_mean, micro_batches=1, head_chunk=1024, rate=1.0):
    return make_update(
        CONFIG,
        optax.sgd(rate),
        objective=objective,
        aggregation=aggregation,
        temperature=1.0,
        max_tokens=KEPT,
        mass=MASS,
        micro_batches=micro_batches,
        head_chunk=head_chunk,
    )


def run(update, params, data: Batch, rate=1.0):
    """New parameters and metrics, in numpy. The parameters that go in survive."""
    params = jax.tree.map(jnp.copy, params)
    state, metrics = update(TrainState(jnp.int32(0), params, optax.sgd(rate).init(params)), data)
    return jax.tree.map(np.asarray, (state.params, metrics))


def assert_same(one, other, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5), one, other)


def assert_same_step(one, other):
    """New parameters and metrics: gradients equal to 1e-6 of their norm."""
    (params, metrics), (expected, expected_metrics) = one, other
    norm = max(1.0, expected_metrics['gradient_norm'])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * norm, rtol=0), params, expected)
    assert_same(metrics, expected_metrics, atol=1e-5)


@functools.cache
def reference(objective=troll, aggregation=token_mean):
    return run(updater(objective, aggregation), nearby_params(), batch())


def test_gradient_is_that_of_the_written_out_loss():
    """Guards the shift by one, masks, temperature and the sign, by a reference without chunks, scan or supports."""
    data = batch()

    rows, at, t = (
        np.array(x)
        for x in zip(
            *[
                (row, start + t, t)
                for row, (start, length) in enumerate(zip(data.prompt_lengths, data.response_lengths, strict=True))
                for t in range(length)
            ],
            strict=True,
        )
    )

    def loss(params):
        log_probs = all_log_probs(params, data.tokens)[rows, at - 1, data.tokens[rows, at]]
        return -jnp.sum(jnp.exp(log_probs - data.old_log_probs[rows, t]) * data.advantages[rows]) / len(rows)

    value, gradient = jax.jit(jax.value_and_grad(loss))(policy_params())
    params, metrics = run(updater(), policy_params(), data)
    np.testing.assert_allclose(metrics['loss'], value, atol=1e-6)
    assert_same(params, jax.tree.map(lambda p, g: p - g, policy_params(), gradient), atol=2e-6)
    np.testing.assert_allclose(metrics['gradient_norm'], optax.tree.norm(gradient), rtol=1e-5)


@pytest.mark.parametrize(
    ('objective', 'aggregation', 'parts'),
    [
        (troll, token_mean, 2),
        (troll, token_mean, 8),
        (ppo_clip, token_mean, 4),
        (ppo_clip, sequence_mean, 8),
        (ppo_clip, constant_length, 4),
    ],
)
def test_micro_batches_do_not_matter(objective, aggregation, parts):
    """Guards the one global denominator: a mean of means would weight rows by the micro-batch they are in."""
    got = run(updater(objective, aggregation, micro_batches=parts), nearby_params(), batch())
    assert_same_step(got, reference(objective, aggregation))


def test_aggregations_differ():
    """Guards a mode that is accepted and not applied."""
    losses = [reference(ppo_clip, aggregation)[1]['loss'] for aggregation in AGGREGATIONS]
    assert min(abs(losses[i] - losses[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3


@pytest.mark.parametrize('chunk', [7, 40])
def test_chunks_of_the_head_do_not_matter(chunk):
    """Guards the padding of the last chunk and the order in which chunks are put together: 40 tokens in all."""
    assert_same_step(run(updater(head_chunk=chunk), nearby_params(), batch()), reference())


@pytest.mark.parametrize(('shape', 'objective'), [((8, 1, 1), ppo_clip), ((2, 2, 2), troll)])
def test_mesh_does_not_matter(shape, objective):
    """Guards every sum over a sharded axis: rows, parameters, vocabulary; the state keeps its layout."""
    mesh = make_mesh(*shape)
    _, shapes = decoders.abstract(CONFIG, mesh)
    with jax.set_mesh(mesh):
        put = lambda x: jax.device_put(x, named_sharding(mesh, ('batch', *[None] * (x.ndim - 1))))
        # By way of numpy: a shard on the first device could share the memory that the update consumes.
        params = jax.tree.map(lambda p, leaf: jax.device_put(np.array(p), leaf.sharding), nearby_params(), shapes)
        state = TrainState(jnp.int32(0), params, optax.sgd(1.0).init(params))
        state, metrics = updater(objective, head_chunk=16)(state, jax.tree.map(put, batch()))
    assert_same_step(jax.tree.map(np.asarray, (state.params, metrics)), reference(objective))
    for param, leaf in zip(jax.tree.leaves(state.params), jax.tree.leaves(shapes), strict=True):
        assert param.sharding.is_equivalent_to(leaf.sharding, param.ndim)


def test_padding_does_not_matter():
    """Guards masks taken from token ids or from values: what stands past a response may be anything."""
    data, mask = batch(), response_mask(batch())
    spoil = lambda x, value: jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, value)
    valid = jnp.arange(PROMPT + RESPONSE)[None] < (data.prompt_lengths + data.response_lengths)[:, None]
    spoiled = data._replace(
        tokens=jnp.where(valid, data.tokens, 17),
        old_log_probs=spoil(data.old_log_probs, jnp.nan),
        old=data.old._replace(tokens=spoil(data.old.tokens, 0), log_probs=spoil(data.old.log_probs, 0.0)),
    )
    assert_same_step(run(updater(), nearby_params(), spoiled), reference())


@pytest.mark.parametrize('objective', [troll, ppo_clip])
def test_batch_without_tokens_changes_nothing(objective):
    """Guards 0/0: zero loss, a zero gradient, and metrics without NaN."""
    empty = batch()._replace(response_lengths=jnp.zeros(ROWS, jnp.int32))
    params, metrics = run(updater(objective), nearby_params(), empty)
    jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(np.asarray, nearby_params()))
    assert metrics['loss'] == 0 and metrics['gradient_norm'] == 0 and metrics['skipped'] == 0
    assert all(np.isfinite(value) for value in metrics.values()), metrics


def test_gradient_that_is_not_finite_skips_the_step():
    """Guards the run against one bad reward: parameters and moments stay, to the bit, and the log says so."""
    optimizer = optax.adam(1e-2)
    update = make_update(
        CONFIG,
        optimizer,
        objective=ppo_clip,
        aggregation=token_mean,
        temperature=1.0,
        max_tokens=KEPT,
        mass=MASS,
        micro_batches=2,
    )
    params = nearby_params()
    state = TrainState(jnp.int32(3), params, optimizer.init(params))
    before = jax.tree.map(np.array, state)
    bad = batch()._replace(advantages=batch().advantages.at[2].set(jnp.nan))
    after, metrics = update(jax.tree.map(jnp.copy, state), bad)
    assert metrics['skipped'] == 1
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, after), before)
    after, metrics = update(jax.tree.map(jnp.copy, state), batch())
    assert metrics['skipped'] == 0
    assert any(
        np.any(np.asarray(a) != b) for a, b in zip(*map(jax.tree.leaves, (after.params, before.params)), strict=True)
    )


def test_first_update_of_troll_and_clip_is_the_same():
    """Guards the comparison of the two: from the policy that sampled, they differ in nothing."""
    one, metrics = run(updater(troll), policy_params(), batch())
    other, _ = run(updater(ppo_clip), policy_params(), batch())
    assert_same(one, other, atol=2e-6)
    assert metrics['kl_max'] < 1e-5 and metrics['projected_share'] == 0 and metrics['solver_evaluations'] == 0
    np.testing.assert_allclose(metrics['ratio_max'], 1, atol=1e-4)


def test_metrics():
    """Guards what the log shows, against the definitions, off-policy."""
    data, mask = batch(), np.asarray(response_mask(batch()))
    _, metrics = reference()
    log_probs = jax.jit(all_log_probs)(nearby_params(), data.tokens)
    at = np.minimum(np.asarray(data.prompt_lengths)[:, None] + np.arange(RESPONSE), PROMPT + RESPONSE - 1)
    log_probs = np.take_along_axis(np.asarray(log_probs), at[:, :, None] - 1, axis=1)
    sampled = np.take_along_axis(np.asarray(data.tokens), at, axis=1)
    ratios = np.exp(np.take_along_axis(log_probs, sampled[..., None], axis=2)[..., 0] - data.old_log_probs)
    np.testing.assert_allclose(metrics['ratio_max'], ratios[mask].max(), rtol=1e-4)
    entropies = jax.vmap(entropy)(jnp.asarray(log_probs[mask]))
    np.testing.assert_allclose(metrics['entropy'], entropies.mean(), rtol=1e-4)
    assert 0 < metrics['kl_mean'] <= metrics['kl_p99'] <= metrics['kl_max']
    assert 0 < metrics['projected_share'] < 1 and metrics['clipped_share'] == 0
    assert metrics['regression'] > 0 and 0 < metrics['tail_mass'] < 1
    assert 2 <= metrics['solver_evaluations'] <= 16 and metrics['unconverged_share'] == 0
    _, clip_metrics = reference(ppo_clip)
    assert 0 < clip_metrics['clipped_share'] < 1 and clip_metrics['projected_share'] == 0
    for name in ('entropy', 'kl_mean', 'kl_max', 'ratio_max', 'tail_mass'):
        np.testing.assert_allclose(clip_metrics[name], metrics[name], rtol=1e-6)


def test_second_update_does_not_compile():
    """Guards shapes and weak types that change from the first state to the second."""
    update = make_update(
        CONFIG, optax.sgd(0.1), objective=ppo_clip, aggregation=token_mean, temperature=1.0, max_tokens=KEPT, mass=MASS
    )
    params = jax.tree.map(jnp.copy, nearby_params())
    state = TrainState(jnp.int32(0), params, optax.sgd(0.1).init(params))
    for advantages in (batch().advantages, -batch().advantages, batch().advantages):
        state, _ = update(state, batch()._replace(advantages=advantages))
    assert update._cache_size() == 1


def test_minibatches_partition_the_prompts():
    """Guards groups: every response is in exactly one minibatch, next to the other samples of its prompt."""
    rows = 30
    data = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), batch())
    data = data._replace(advantages=jnp.arange(rows, dtype=jnp.float32), prompt_lengths=jnp.repeat(jnp.arange(10), 3))
    parts = list(minibatches(data, 5, 3))
    assert len(parts) == 5
    assert sorted(np.concatenate([part.advantages for part in parts]).tolist()) == list(range(rows))
    for part in parts:
        groups = np.asarray(part.prompt_lengths).reshape(-1, 3)
        assert groups.shape == (2, 3) and np.all(groups == groups[:, :1])
        np.testing.assert_array_equal(part.advantages // 3, part.prompt_lengths)
        assert part.old.tokens.shape == (6, RESPONSE, KEPT)


@pytest.mark.parametrize(('temperature', 'chunk'), [(1.0, 5), (0.7, 11)])
def test_head_equals_the_whole_softmax(temperature, chunk):
    """Guards the chunked head against the plain one: values, and gradients through what it recomputes."""
    keys = jax.random.split(jax.random.key(2), 4)
    hidden, unembedding = jax.random.normal(keys[0], (11, 6)), jax.random.normal(keys[1], (VOCAB, 6))
    tokens = jax.random.randint(keys[2], (11,), 0, VOCAB)
    old_log_probs = jax.nn.log_softmax(jax.random.normal(keys[3], (11, VOCAB)))
    old = jax.vmap(functools.partial(sparsify, max_tokens=KEPT, mass=0.9))(old_log_probs, tokens)

    def chunked(hidden, unembedding):
        out = sparse_head(
            hidden,
            unembedding,
            tokens,
            old,
            temperature=temperature,
            max_tokens=KEPT,
            mass=0.9,
            chunk=chunk,
            dtype='float32',
        )
        listed = jnp.where(out.new.tokens >= 0, out.new.log_probs, 0.0)
        return jnp.sum(out.log_probs) + jnp.sum(out.entropy) + jnp.sum(listed**2) + jnp.sum(out.tail_mass), out

    def whole(hidden, unembedding, listed_tokens):
        log_probs = jax.nn.log_softmax(hidden @ unembedding.T / temperature)
        at = lambda tokens: jnp.take_along_axis(log_probs, tokens, axis=1)
        listed = jnp.where(listed_tokens >= 0, at(jnp.maximum(listed_tokens, 0)), 0.0)
        tail = 1 - jnp.sum(jnp.where(listed_tokens >= 0, jnp.exp(listed), 0.0), axis=1)
        entropies = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=1)
        total = jnp.sum(at(tokens[:, None])) + jnp.sum(entropies) + jnp.sum(listed**2) + jnp.sum(tail)
        return total, (log_probs, entropies, tail)

    run_chunked = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True))
    (value, out), gradients = run_chunked(hidden, unembedding)
    run_whole = jax.jit(jax.value_and_grad(whole, argnums=(0, 1), has_aux=True))
    (expected, (log_probs, entropies, tail)), expected_gradients = run_whole(hidden, unembedding, out.new.tokens)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_same(gradients, expected_gradients, atol=1e-4)
    np.testing.assert_allclose(out.log_probs, log_probs[jnp.arange(11), tokens], atol=1e-5)
    np.testing.assert_allclose(out.entropy, entropies, atol=1e-5)
    np.testing.assert_allclose(out.tail_mass, tail, atol=1e-5)
    np.testing.assert_array_equal(out.old.tokens, out.new.tokens)
    assert out.new.tokens.shape == (11, 2 * KEPT) and jnp.any(out.new.tokens >= 0, axis=1).all()


def test_no_array_of_all_logits():
    """Guards memory, by the compiler's own count: the gradient of the head must not grow with tokens × vocabulary."""
    tokens, width, size, chunk = 128, 8, 1009, 8
    old_tokens = jnp.zeros((tokens, KEPT), jnp.int32)

    def loss(hidden, unembedding):
        out = sparse_head(
            hidden,
            unembedding,
            jnp.zeros(tokens, jnp.int32),
            batch().old._replace(tokens=old_tokens, log_probs=jnp.zeros((tokens, KEPT))),
            temperature=1.0,
            max_tokens=KEPT,
            mass=1.0,
            chunk=chunk,
            dtype='float32',
        )
        return jnp.sum(out.log_probs) + jnp.sum(out.entropy)

    shapes = jax.ShapeDtypeStruct((tokens, width), jnp.float32), jax.ShapeDtypeStruct((size, width), jnp.float32)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * size * 4
