"""The optimizer: sizes of its first steps, what is clipped, when the learning rate counts, where its state lives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import decoder_config

from troll_jax.checkpoint import Checkpoints
from troll_jax.models import decoder as decoders
from troll_jax.optimizer import adamw, apply_gradients, state_shapes
from troll_jax.settings import Compute
from troll_jax.sharding import make_mesh, named_sharding
from troll_jax.types import START, CriticState, TrainState

RATE = 3e-3


def steps(optimizer, params, gradients) -> list:
    """The change that each gradient makes to fixed parameters."""
    update, state, changes = jax.jit(optimizer.update), optimizer.init(params), []
    for gradient in gradients:
        change, state = update(gradient, state, params)
        changes.append(change)
    return changes


def test_the_first_step_is_the_learning_rate_against_the_sign():
    """Guards against a missing bias correction, a wrong sign, and a scale that depends on the gradient's."""
    params = {'a': jnp.ones(3), 'b': jnp.ones((2, 2))}
    gradient = {'a': jnp.array([1e-2, -3.0, 50.0]), 'b': -jnp.ones((2, 2))}
    (change,) = steps(adamw(RATE), params, [gradient])
    expected = jax.tree.map(lambda g: -RATE * jnp.sign(g), gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), change, expected)


def test_norms_and_biases_do_not_decay():
    """Guards weight decay that pulls the scales of norms to zero."""
    params = decoders.init(decoder_config(38, qkv_bias=True), jax.random.key(0))
    params = jax.tree.map(jnp.ones_like, params)
    nothing = jax.tree.map(jnp.zeros_like, params)
    (change,) = steps(adamw(RATE, weight_decay=0.1), params, [nothing])
    for path, x in jax.tree.leaves_with_path(change):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        expected = 0 if 'norm' in name or 'bias' in name else -RATE * 0.1
        np.testing.assert_allclose(x, expected, rtol=1e-5, err_msg=name)


def test_the_state_is_laid_out_alike_with_and_without_decay():
    """Guards checkpoints that another weight decay could not restore."""
    trees = [jax.tree.structure(adamw(RATE, weight_decay=x).init({'a': jnp.ones(2)})) for x in (0.0, 0.1)]
    assert trees[0] == trees[1]
    assert trees[0] == jax.tree.structure(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE)).init({'a': jnp.ones(2)})
    )


def test_the_learning_rate_rises_along_a_line_and_stays_or_falls():
    """Guards against a schedule that counts something other than updates, jumps, or falls unasked or below zero.

    Adam's step under a gradient that does not change is its learning rate."""
    params, gradient = {'a': jnp.ones(2)}, {'a': jnp.full(2, 0.5)}
    changes = steps(adamw(RATE, warmup_updates=4), params, [gradient] * 7)
    rates = [-float(change['a'][0]) for change in changes]
    np.testing.assert_allclose(rates, RATE * np.array([0.25, 0.5, 0.75, 1, 1, 1, 1]), rtol=1e-4)
    constant = [-float(change['a'][0]) for change in steps(adamw(RATE), params, [gradient] * 3)]
    np.testing.assert_allclose(constant, RATE, rtol=1e-4)
    cosine = 0.2 + 0.8 * (1 + np.cos(np.pi * np.array([0.25, 0.5, 0.75]))) / 2
    for settings, falling in [
        ({}, [0.75, 0.5, 0.25, 0, 0]),
        ({'final_fraction': 0.2}, [0.8, 0.6, 0.4, 0.2, 0.2]),
        ({'schedule': 'cosine', 'final_fraction': 0.2}, [*cosine, 0.2, 0.2]),
    ]:
        changes = steps(adamw(RATE, warmup_updates=2, decay_updates=4, **settings), params, [gradient] * 8)
        rates = [-float(change['a'][0]) for change in changes]
        np.testing.assert_allclose(rates, RATE * np.array([0.5, 1, 1, *falling]), rtol=1e-4)


@pytest.mark.parametrize(
    'settings', [{'schedule': 'cos'}, {'schedule': 'cosine'}, {'schedule': 'constant', 'decay_updates': 3}]
)
def test_a_schedule_that_would_do_nothing_is_an_error(settings):
    """Guards a rate that stays constant where a decay was asked for."""
    with pytest.raises(ValueError, match='schedule'):
        adamw(RATE, **settings)


def first_moment(optimizer, gradient) -> dict:
    """The gradient that Adam sees: (1 − b1) times it after one update."""
    _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
    (mu,) = [s.mu for s in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, 'mu')) if hasattr(s, 'mu')]
    return mu


@pytest.mark.parametrize('scale, clipped', [(0.1, False), (0.199, False), (0.201, True), (1e4, True)])
def test_gradients_are_clipped_by_their_global_norm(scale, clipped):
    """Guards against clipping by element or by array, and against clipping after the moments."""
    gradient = {'a': scale * jnp.array([3.0, 0.0]), 'b': scale * jnp.array([[4.0]])}  # of norm 5 · scale
    seen = first_moment(adamw(RATE, b1=0.0), gradient)
    factor = 1 / (5 * scale) if clipped else 1.0
    jax.tree.map(lambda got, g: np.testing.assert_allclose(got, factor * g, rtol=1e-6), seen, gradient)
    looser = first_moment(adamw(RATE, b1=0.0, clip_norm=1e6), gradient)
    jax.tree.map(lambda got, g: np.testing.assert_allclose(got, g, rtol=1e-6), looser, gradient)


def test_weights_decay_only_if_asked():
    """Guards against optax's default of 1e-4, which the paper does not use, and a decay that must be known before."""
    params, gradient = {'a': jnp.array([2.0, -4.0])}, {'a': jnp.zeros(2)}
    (change,) = steps(adamw(RATE), params, [gradient])
    np.testing.assert_array_equal(change['a'], [0, 0])
    (change,) = steps(adamw(RATE, weight_decay=0.1), params, [gradient])
    np.testing.assert_allclose(change['a'], -RATE * 0.1 * params['a'], rtol=1e-6)
    injected = optax.inject_hyperparams(lambda decay: adamw(RATE, weight_decay=decay))(decay=0.1)
    (later,) = steps(injected, params, [gradient])
    np.testing.assert_array_equal(later['a'], change['a'])


@pytest.mark.parametrize('knob', [{'b1': 0.5}, {'b2': 0.5}])
def test_each_decay_reaches_its_moment(knob):
    """Guards against a knob that nothing reads: the second of two unlike gradients moves differently."""
    params, gradients = {'a': jnp.ones(1)}, [{'a': jnp.array([0.9])}, {'a': jnp.array([0.1])}]
    b1, b2 = knob.get('b1', 0.9), knob.get('b2', 0.999)
    mu = (b1 * (1 - b1) * 0.9 + (1 - b1) * 0.1) / (1 - b1**2)
    nu = (b2 * (1 - b2) * 0.81 + (1 - b2) * 0.01) / (1 - b2**2)
    change = steps(adamw(RATE, **knob), params, gradients)[1]
    np.testing.assert_allclose(change['a'], [-RATE * mu / np.sqrt(nu)], rtol=1e-3)


def test_updates_do_not_recompile():
    """Guards against a count or a learning rate that is a Python number, new in every update."""
    optimizer = adamw(RATE, warmup_updates=3)
    update = jax.jit(optimizer.update)
    params = {'a': jnp.ones(3)}
    state = jax.jit(optimizer.init)(params)
    for i in range(5):
        _, state = update({'a': jnp.full(3, float(i))}, state, params)
    assert update._cache_size() == 1


def test_the_first_moment_can_be_rounded():
    """Guards a knob that nothing reads, and a second moment in bfloat16, which updates of 0.1 % would not change."""
    params = {'a': jnp.ones(3)}
    state = adamw(mu_dtype='bfloat16').init(params)
    assert first_moment(adamw(mu_dtype='bfloat16'), params)['a'].dtype == jnp.bfloat16
    assert sorted(str(leaf.dtype) for leaf in jax.tree.leaves(state) if leaf.ndim) == ['bfloat16', 'float32']


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def placed(optimizer):
    """Shapes of the optimizer's state on eight devices, a fresh state, and the jitted step."""
    params = {'a': jax.device_put(jnp.arange(48.0).reshape(3, 16), named_sharding(make_mesh(), ('layers', 'embed')))}
    layout = like(params)
    shapes = state_shapes(optimizer, layout)
    opt_state = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))(params)
    step = jax.jit(
        lambda *arguments: apply_gradients(optimizer, *arguments, lambda _: (layout, shapes)), donate_argnums=1
    )
    return shapes, CriticState(params, opt_state), step


def memory_kinds(state) -> list[str]:
    return [leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)]


def test_an_offloaded_state_gives_the_same_steps_and_stays_on_the_host(tmp_path):
    """Guards against a state that comes back to the device after the first update (which then compiles again), whose
    sharding is lost on the way, that a checkpoint puts elsewhere, or that a skipped step changes."""
    wrapped = optax.chain(adamw(RATE, warmup_updates=2), optax.scale(0.5))
    (_, state, step), (shapes, on_host, host_step) = (
        placed(Compute(offload_optimizer=offload).place_optimizer(wrapped)) for offload in (False, True)
    )
    kinds = ['device', 'pinned_host', 'pinned_host', 'device']  # the counts stay
    assert memory_kinds(shapes) == memory_kinds(on_host.opt_state) == kinds
    assert 'pinned_host' not in memory_kinds(state)
    for i, factor in enumerate([1.0, np.inf, 1.0, 1.0]):
        gradients = jax.tree.map(lambda x, i=i, factor=factor: factor * jnp.cos(i * x), state.params)
        before = jax.device_get(on_host.params)
        state, metrics = step(gradients, state)
        on_host, _ = host_step(gradients, on_host)
        assert memory_kinds(on_host.opt_state) == kinds
        assert np.array_equal(before['a'], on_host.params['a']) == metrics['skipped'] == (factor > 1)
        jax.tree.map(np.testing.assert_array_equal, state, on_host)
    assert host_step._cache_size() == step._cache_size() == 1
    moments = [leaf for leaf in jax.tree.leaves(on_host.opt_state) if leaf.ndim]
    assert all(leaf.addressable_shards[0].data.shape == (3, 2) for leaf in moments)

    whole = TrainState(jax.tree.map(jnp.asarray, START)._replace(step=jnp.int32(4)), *on_host)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(whole)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        restored = checkpoints.restore(like(whole)._replace(opt_state=shapes), 4)
    assert memory_kinds(restored.opt_state) == kinds
    jax.tree.map(np.testing.assert_array_equal, restored, whole)
