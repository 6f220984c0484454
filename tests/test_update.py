"""The update on a tiny decoder: what must not matter does not, to float32, and what must be zero is zero."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from updates import (
    ADVANTAGES,
    CONFIG,
    KEPT,
    PACKED,
    PADDED,
    PROMPT,
    RESPONSE,
    ROWS,
    SCORING,
    SGD,
    all_log_probs,
    assert_same,
    assert_same_step,
    batch,
    nearby_params,
    policy_params,
    rollout,
    run,
    start,
    updater,
)

from troll_jax.learn import abstract_state, start_state
from troll_jax.models import decoder as decoders
from troll_jax.ops.aggregation import constant_length, sequence_mean, token_mean
from troll_jax.ops.categorical import entropy
from troll_jax.ops.losses import ppo_clip, troll
from troll_jax.ops.minibatch_losses import m2po
from troll_jax.ops.regions import sequence_region
from troll_jax.ops.regularisers import regularised
from troll_jax.ops.schedules import adaptive_bound
from troll_jax.ops.support import bucket_tail, default_tail
from troll_jax.packing import BatchShape, abstract_batch, make_layout
from troll_jax.sharding import make_mesh, place
from troll_jax.types import START, TrainState
from troll_jax.update import make_update, summarise_tokens

# Settings of an objective that the update must take as they come.
of_minibatch = functools.partial(m2po, budget=0.01)
troll_of_responses = functools.partial(troll, region=sequence_region)
troll_on_schedule = functools.partial(troll, bound=functools.partial(adaptive_bound, start=0.05, target=0.1))
AGGREGATIONS = (token_mean, sequence_mean, constant_length)


@functools.cache
def reference(objective=troll, aggregation=token_mean, tail_rule=default_tail):
    return run(updater(objective, tail_rule=tail_rule), nearby_params(), batch(aggregation=aggregation))


def test_gradient_is_that_of_the_written_out_loss():
    """Guards the shift by one, masks, temperature and the sign, by a reference without chunks, scan or supports."""
    data = rollout()
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
        return -jnp.sum(jnp.exp(log_probs - data.log_probs[rows, t]) * ADVANTAGES[rows]) / len(rows)

    value, gradient = jax.jit(jax.value_and_grad(loss))(policy_params())
    params, metrics = run(updater(), policy_params(), batch())
    np.testing.assert_allclose(metrics['loss'], value, atol=1e-6)
    assert_same(params, jax.tree.map(lambda p, g: p - g, policy_params(), gradient), atol=2e-6)
    np.testing.assert_allclose(metrics['gradient_norm'], optax.tree.norm(gradient), rtol=1e-5)


@pytest.mark.parametrize('aggregation', AGGREGATIONS)
@pytest.mark.parametrize('objective', [troll_of_responses, ppo_clip, regularised(of_minibatch, [])])
def test_packing_does_not_matter(objective, aggregation):
    """Guards the one global denominator, and sequences that see or share something with others of their row.

    A mean of means would weight tokens by the micro-batch they are in; with a region for a response its tokens belong
    together. The weights come with the batch, so one compiled program serves all aggregations.
    """
    for shape in PACKED:
        packed = batch(shape, aggregation)
        assert np.any(packed.segment_ids > 1), 'sequences were meant to share rows'
        got = run(updater(objective), nearby_params(), packed)
        assert_same_step(got, reference(objective, aggregation))


@pytest.mark.parametrize('shape', [BatchShape(2, 4, 8), BatchShape(8, 1, 8), BatchShape(4, 3, 8), PACKED[1]])
def test_micro_batches_do_not_matter(shape):
    """Guards the paper's objective, with micro-batches that are full, of one row, and left over."""
    assert_same_step(run(updater(), nearby_params(), batch(shape)), reference())


def test_one_program_for_all_lengths():
    """Guards against a compilation for each number of micro-batches, and against computing those that are empty."""
    update, shape = updater(ppo_clip), BatchShape(8, 1, 13)
    run(update, nearby_params(), batch(shape))
    compiled = update._cache_size()
    short = rollout()._replace(response_lengths=np.ones(ROWS, np.int32))
    got = run(update, nearby_params(), batch(shape, data=short))
    assert update._cache_size() == compiled
    assert_same_step(got, run(update, nearby_params(), batch(data=short)))
    used = [np.any(batch(shape, data=data).segment_ids > 0, axis=(1, 2)).sum() for data in (short, rollout())]
    assert used[0] < used[1] < 8


def test_aggregations_differ():
    """Guards a mode that is accepted and not applied."""
    losses = [reference(ppo_clip, aggregation)[1]['loss'] for aggregation in AGGREGATIONS]
    assert min(abs(losses[i] - losses[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3


@pytest.mark.parametrize('chunk', [7, 40])
def test_chunks_of_the_head_do_not_matter(chunk):
    """Guards the padding of the last chunk and the order in which chunks are put together: 64 positions in all."""
    assert_same_step(run(updater(head_chunk=chunk), nearby_params(), batch()), reference())


MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1), (4, 1, 2), (2, 4, 1), (1, 4, 2), (2, 1, 4), (1, 2, 4), (2, 2, 2)]
MESHES += [(1, 1, 1), (1, 2, 2)]  # what they leave of eight devices is 'context'


@functools.cache
def on_mesh(mesh_shape, objective):
    """An update that any mesh of eight devices divides, of packed rows; and its shapes. Some devices copy KV heads."""
    config = dataclasses.replace(CONFIG, vocab_size=40, width=16, heads=8, kv_heads=2, mlp_width=24, head_dim=4)
    params = jax.tree.map(lambda p: 0.5 * p, decoders.init(config, jax.random.key(3)))
    tail_rule = bucket_tail if objective is ppo_clip else default_tail
    update = make_update(config, SGD, objective, SCORING._replace(tail_rule=tail_rule, head_chunk=16))
    data = batch(BatchShape(2, 8, 8))
    if mesh_shape is None:
        return run(update, params, data), None
    mesh = make_mesh(*mesh_shape, context=8 // np.prod(mesh_shape))
    _, shapes = decoders.abstract(config, mesh)
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda p, leaf: jax.device_put(np.array(p), leaf.sharding), params, shapes)
        state = start(params, SGD)._replace(params=params)
        state, log = update(state, place(data, mesh))
    return jax.tree.map(np.asarray, (state.params, log.metrics)), (shapes, state.params)


@pytest.mark.parametrize(
    ('shape', 'objective'),
    [(mesh, ppo_clip) for mesh in MESHES]
    + [(mesh, objective) for mesh in [(2, 2, 2), (1, 2, 2)] for objective in (troll_of_responses, of_minibatch)],
)
def test_mesh_does_not_matter(shape, objective):
    """Guards every sum over a sharded axis: rows, their length, parameters, vocabulary; the state keeps its layout."""
    got, (shapes, params) = on_mesh(shape, objective)
    assert_same_step(got, on_mesh(None, objective)[0])
    matrices = 0
    for param, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(shapes), strict=True):
        assert param.sharding.is_equivalent_to(leaf.sharding, param.ndim)
        if param.size > 100:  # all but the scales of norms: what a device holds falls with all axes but data
            assert param.addressable_shards[0].data.size * 8 == param.size * shape[0]
            matrices += 1
    assert matrices == 9


def test_padding_does_not_matter():
    """Guards masks taken from token ids or from values: what stands at prompts and at padding may be anything."""
    data = batch(PACKED[1])
    learnt, real = data.loss_weights > 0, data.segment_ids > 0
    spoil = lambda x, value, where: np.where(where.reshape(*where.shape, *[1] * (x.ndim - 3)), x, value)
    spoiled = data._replace(
        tokens=spoil(data.tokens, 17, real),
        positions=spoil(data.positions, 3, real),
        advantages=spoil(data.advantages, 1e9, learnt),
        old_log_probs=spoil(data.old_log_probs, np.nan, learnt),
        old=data.old._replace(
            tokens=spoil(data.old.tokens, 0, learnt), log_probs=spoil(data.old.log_probs, np.nan, learnt)
        ),
    )
    assert_same_step(run(updater(), nearby_params(), spoiled), reference())


@pytest.mark.parametrize('objective', [troll, ppo_clip, of_minibatch])
def test_batch_without_tokens_changes_nothing(objective):
    """Guards 0/0: zero loss, a zero gradient, and metrics without NaN."""
    empty = batch(data=rollout()._replace(response_lengths=np.zeros(ROWS, np.int32)))
    params, metrics = run(updater(objective), nearby_params(), empty)
    jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(np.asarray, nearby_params()))
    assert metrics['loss'] == 0 and metrics['gradient_norm'] == 0 and metrics['skipped'] == 0
    assert all(np.isfinite(value) for value in metrics.values()), metrics


def test_gradient_that_is_not_finite_skips_the_step():
    """Guards the run against one bad reward: parameters and moments stay, to the bit, and the log says so."""
    optimizer = optax.adam(1e-2)
    update = updater(ppo_clip, optimizer=optimizer)
    params = nearby_params()
    state = start(params, optimizer)
    before = jax.tree.map(np.array, state)
    bad = batch(advantages=np.where(np.arange(ROWS) == 2, np.nan, ADVANTAGES))
    after, log = update(jax.tree.map(jnp.copy, state), bad)
    assert log.metrics['skipped'] == 1
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, after[1:]), before[1:])
    after, log = update(jax.tree.map(jnp.copy, state), batch())
    assert log.metrics['skipped'] == 0
    assert any(
        np.any(np.asarray(a) != b) for a, b in zip(*map(jax.tree.leaves, (after.params, before.params)), strict=True)
    )


def test_first_update_of_troll_and_clip_is_the_same():
    """Guards the comparison of the two: from the policy that sampled, they differ in nothing."""
    one, metrics = run(updater(troll), policy_params(), batch())
    other, _ = run(updater(ppo_clip), policy_params(), batch())
    assert_same(one, other, atol=2e-6)
    assert metrics['kl_max'] < 1e-5 and metrics['projected_share'] == 0 and metrics['evaluations_max'] == 1
    np.testing.assert_allclose(metrics['ratio_max'], 1, atol=1e-4)


def test_metrics():
    """Guards what the log shows, against the definitions, off-policy."""
    data = rollout()
    mask = np.arange(RESPONSE) < data.response_lengths[:, None]
    _, metrics = reference()
    log_probs = jax.jit(all_log_probs)(nearby_params(), data.tokens)
    at = np.minimum(np.asarray(data.prompt_lengths)[:, None] + np.arange(RESPONSE), PROMPT + RESPONSE - 1)
    log_probs = np.take_along_axis(np.asarray(log_probs), at[:, :, None] - 1, axis=1)
    sampled = np.take_along_axis(np.asarray(data.tokens), at, axis=1)
    ratios = np.exp(np.take_along_axis(log_probs, sampled[..., None], axis=2)[..., 0] - data.log_probs)
    np.testing.assert_allclose(metrics['ratio_max'], ratios[mask].max(), rtol=1e-4)
    entropies = jax.vmap(entropy)(jnp.asarray(log_probs[mask]))
    np.testing.assert_allclose(metrics['entropy_mean'], entropies.mean(), rtol=1e-4)
    assert 0 < metrics['kl_mean'] <= metrics['kl_p99'] <= metrics['kl_max']
    assert 0 < metrics['projected_share'] < 1 and 'clipped_share' not in metrics
    assert metrics['regression_mean'] > 0 and 0 < metrics['tail_mass_mean'] < 1
    assert 2 <= metrics['evaluations_max'] <= 16 and metrics['unconverged_share'] == 0
    assert metrics['kl_projected_max'] <= 0.05 * (1 + 1e-5) < metrics['kl_unprojected_max']
    assert 0 < metrics['weight_p01'] < 1 == metrics['weight_max']
    np.testing.assert_allclose(metrics['eta_max'], 1 / metrics['weight_p01'] - 1, rtol=1e-5)  # of 26 tokens: the least
    _, clip_metrics = reference(ppo_clip)
    assert 0 < clip_metrics['clipped_share'] < 1 and 'projected_share' not in clip_metrics
    for name in ('entropy_mean', 'kl_mean', 'kl_p50', 'kl_max', 'ratio_max', 'tail_mass_mean'):
        np.testing.assert_allclose(clip_metrics[name], metrics[name], rtol=1e-6)


def test_quantiles_are_those_of_the_tokens_that_count():
    """Guards nearest ranks over a mask: padding that counts as zero or as infinite, and a rank that is one off.

    One loop finds those of all values: on a GPU each loop is some thirty launches.
    """
    rng = np.random.default_rng(0)
    summarise = jax.jit(summarise_tokens)
    for shape, share in [((2, 8, 25), 0.6), ((1, 3, 5), 0.5), ((1, 1, 4), 1.0)]:
        values, mask = np.maximum(rng.normal(size=shape), 0).astype(np.float32), rng.random(shape) < share
        spoiled = np.where(mask, values, np.nan)
        metrics = summarise({'ratio': spoiled, 'constrained': values > 0}, mask)
        kept = values[mask]
        for suffix, quantile in [('p01', 0.01), ('p50', 0.5), ('p99', 0.99), ('max', 1.0)]:
            rank = round(quantile * (kept.size - 1))  # numpy's 'nearest' rounds a tie to even as well
            assert metrics[f'ratio_{suffix}'] == np.sort(kept)[rank] == np.quantile(kept, quantile, method='nearest')
        np.testing.assert_allclose(metrics['ratio_mean'], kept.mean(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(metrics['constrained_share'], np.mean(kept > 0), rtol=1e-6)
        assert summarise.lower({'ratio': values, 'kl': values}, mask).as_text().count('stablehlo.while') == 1
        assert metrics.keys() == {
            'constrained_share',
            'ratio_mean',
            *(f'ratio_{x}' for x in ('p01', 'p50', 'p99', 'max')),
        }


@pytest.mark.parametrize('objective', [troll, ppo_clip])
def test_flags_of_tokens(objective):
    """Guards what is said of single tokens: padding that is counted, rows shuffled by micro-batches, shares apart."""
    data = rollout()
    mask = np.arange(RESPONSE) < data.response_lengths[:, None]
    at = np.minimum(np.asarray(data.prompt_lengths)[:, None] + np.arange(RESPONSE), PROMPT + RESPONSE - 1)
    sampled = np.take_along_axis(np.asarray(data.tokens), at, axis=1)
    shapes = (PADDED, PACKED[1] if objective is troll else PACKED[0])
    logs = [updater(objective)(start(nearby_params(), SGD), batch(shape))[1] for shape in shapes]
    flags = [make_layout(data, shape).gather(np.asarray(log.flags)) for shape, log in zip(shapes, logs, strict=True)]
    for log, found in zip(logs, flags, strict=True):
        assert np.sum(log.flags) == np.sum(found)
        np.testing.assert_array_equal(found > 0, mask)
        np.testing.assert_array_equal(found, flags[0])
    constrained, name = flags[0] == 2, 'projected_share' if objective is troll else 'clipped_share'
    assert 0 < constrained.sum() < mask.sum()
    for share in (name, 'constrained_share'):
        np.testing.assert_allclose(constrained.sum(), mask.sum() * logs[0].metrics[share], rtol=1e-5)
    probs = np.exp(data.log_probs)
    for low, high in zip((0, 0.05, 0.5, 0.95), ('0.05', '0.5', '0.95', '1'), strict=True):
        inside = constrained & (probs > low) & (probs <= float(high) + 1e-6)
        share = logs[0].metrics[f'constrained_up_to_{high}_share']
        np.testing.assert_allclose(inside.sum(), mask.sum() * share, rtol=1e-5)
    if objective is ppo_clip:
        log_probs = np.asarray(jax.jit(all_log_probs)(nearby_params(), data.tokens))
        log_probs = np.take_along_axis(np.take_along_axis(log_probs, at[:, :, None] - 1, axis=1), sampled[..., None], 2)
        ratio, advantages = np.exp(log_probs[..., 0] - data.log_probs), ADVANTAGES[:, None]
        clipped = (advantages > 0) & (ratio > 1.2) | (advantages < 0) & ((ratio < 0.8) | (ratio > 10))
        np.testing.assert_array_equal(constrained, mask & clipped)


def test_options_change_the_update():
    """Guards a region or tail rule that is accepted and not applied."""
    losses = [
        reference()[1]['loss'],
        reference(troll_of_responses)[1]['loss'],
        reference(tail_rule=bucket_tail)[1]['loss'],
    ]
    assert min(abs(losses[i] - losses[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-4


@pytest.mark.parametrize('objective', [ppo_clip, troll_on_schedule])
def test_second_update_does_not_compile(objective, caplog):
    """Guards shapes and weak types that change from the first state to the second, and a bound that is a constant.

    Progress counts updates and adds up the share of tokens that was projected, which is what a schedule goes by.
    """
    small, mesh = optax.sgd(0.01), make_mesh(devices=jax.devices()[:1])
    update, shares = updater(objective, optimizer=small), []
    with jax.set_mesh(mesh), jax.log_compiles():
        shapes = abstract_state(CONFIG, small, mesh)
        on_mesh = lambda x, like: jax.device_put(np.array(x), like.sharding)
        state = start_state(jax.tree.map(on_mesh, nearby_params(), shapes.params), small, shapes)
        for sign in (1, -1, 1):
            state, log = update(state, place(batch(advantages=sign * ADVANTAGES), mesh))
            shares.append(float(log.metrics.get('projected_share', 0.0)))
    assert len(re.findall(r'Compiling \S*update\b', caplog.text)) == 1
    assert state.progress.step == 0 and state.progress.updates == 3
    np.testing.assert_allclose(state.progress.projected, sum(shares), rtol=1e-6)


def test_a_schedule_moves_the_bound():
    """Guards progress on its way to the objective: after many projected tokens the region is wider."""
    state = start(nearby_params(), SGD)
    _, log = updater(troll_on_schedule)(jax.tree.map(jnp.copy, state), batch())
    np.testing.assert_allclose(log.metrics['loss'], reference()[1]['loss'], rtol=1e-4)  # the start is 0.05
    later = state.progress._replace(updates=jnp.int32(10), projected=jnp.float32(5.0))
    bound = float(adaptive_bound(later, start=0.05, target=0.1))
    assert bound > 0.3
    _, log = updater(troll_on_schedule)(state._replace(progress=later), batch())
    expected = run(updater(functools.partial(troll, bound=bound)), nearby_params(), batch())[1]
    np.testing.assert_allclose(log.metrics['loss'], expected['loss'], rtol=1e-4)
    np.testing.assert_allclose(log.metrics['kl_projected_max'], bound, rtol=1e-3)
    assert log.metrics['weight_mean'] > reference()[1]['weight_mean'] + 0.05


@pytest.mark.parametrize('objective', [troll, ppo_clip])
def test_no_array_of_tokens_by_vocabulary(objective):
    """Guards the memory of a whole update, forward and backward: no more logits than those of one chunk of the head."""
    vocabulary, chunk, shape = 4096, 8, BatchShape(2, 4, 32)
    config = dataclasses.replace(CONFIG, vocab_size=vocabulary)
    update = make_update(config, SGD, objective, SCORING._replace(head_chunk=chunk))
    _, params = decoders.abstract(config)
    progress = jax.eval_shape(lambda: START)
    state = TrainState(progress, params, jax.eval_shape(SGD.init, params))
    text = update.lower(state, abstract_batch(shape, KEPT)).compile().as_text()
    found = re.findall(r'\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]', text)
    sizes = {tuple(int(n) for n in dims.split(',')) for dims in found}
    largest = max(np.prod(size) for size in sizes if CONFIG.width not in size)  # of what is no weight
    assert largest == chunk * vocabulary
