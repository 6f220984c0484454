"""Checkpoints: every bit comes back, on any mesh, and a damaged or foreign one says so instead of training on."""

import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from troll_jax.checkpoint import Checkpoints
from troll_jax.optimizer import adamw, state_shapes
from troll_jax.sharding import make_mesh, named_sharding
from troll_jax.types import START, Progress, TrainState

AXES = {
    'embedding': ('vocab', 'embed'),
    'layers': {'scale': ('layers', 'embed'), 'up': ('layers', 'embed', 'mlp')},
    'norm': ('head_dim',),
}
SIZES = {'vocab': 62, 'embed': 24, 'layers': 3, 'mlp': 46, 'head_dim': 5}


def shapes_on(mesh, optimizer=None, **sizes) -> TrainState:
    def shape(axes):
        size = tuple((SIZES | sizes)[axis] for axis in axes)
        return jax.ShapeDtypeStruct(size, jnp.float32, sharding=named_sharding(mesh, axes))

    params = jax.tree.map(shape, AXES, is_leaf=lambda x: isinstance(x, tuple))
    progress = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype, sharding=named_sharding(mesh, ())), START)
    return TrainState(progress, params, state_shapes(optimizer or adamw(), params))


def state_on(mesh, step: int) -> TrainState:
    """Parameters and moments without a zero or a repeated value; different ones for each step."""
    generator = np.random.default_rng(step)

    def draw(leaf):
        values = generator.normal(size=leaf.shape) if leaf.dtype == jnp.float32 else np.full(leaf.shape, 97)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    shapes = shapes_on(mesh)
    progress = Progress(np.int32(step), np.int32(8 * step), np.float32(0.1 * step), np.int32(2 * step))
    place = lambda x, leaf: jax.device_put(x, leaf.sharding)
    return TrainState(jax.tree.map(place, progress, shapes.progress), *jax.tree.map(draw, tuple(shapes[1:])))


def on_host(tree):
    """Copies that nothing done to the device's buffers can change."""
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)


def assert_same(got, expected) -> None:
    """Same structure, types and bits."""

    def check(path, a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)

    jax.tree.map_with_path(check, got, expected)


@pytest.fixture(scope='module')
def mesh():
    return make_mesh(1, 8, 1)


@pytest.fixture(scope='module')
def saved(mesh, tmp_path_factory):
    """A run's folder with checkpoints of steps 1 and 2. Tests copy it before they break it."""
    folder = tmp_path_factory.mktemp('run')
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state_on(mesh, 1))
        checkpoints.save(state_on(mesh, 2))
    return folder


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / 'run')
    return tmp_path / 'run'


def test_a_state_comes_back_bitwise(saved, mesh):
    """Guards against lost moments, a step or what schedules go by that is lost, and the state of another step."""
    assert jax.tree.leaves(state_on(mesh, 1).opt_state)[0] == 97  # the count of updates is not the step
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.steps == [1, 2]
        for step in (1, 2):
            assert_same(checkpoints.restore(shapes_on(mesh), step), state_on(mesh, step))
            assert isinstance(checkpoints.restore(shapes_on(mesh), step).progress, Progress)


@pytest.mark.parametrize('sizes', [(2, 2, 2), (8, 1, 1)])
def test_a_state_comes_back_on_another_mesh(saved, mesh, sizes):
    """Guards against arrays restored in the layout they were saved in, or whole on every device."""
    shapes = shapes_on(make_mesh(*sizes))
    with Checkpoints(saved) as checkpoints:
        restored = checkpoints.restore(shapes, 2)
    assert_same(restored, state_on(mesh, 2))
    for leaf, shape in zip(jax.tree.leaves(restored), jax.tree.leaves(shapes), strict=True):
        assert leaf.sharding == shape.sharding
        assert leaf.addressable_shards[0].data.shape == shape.sharding.shard_shape(shape.shape)
    if sizes == (2, 2, 2):
        assert restored.params['layers']['up'].addressable_shards[0].data.shape == (3, 12, 23)


def test_parameters_come_back_alone(saved, mesh):
    """Guards against an evaluation that has to know the optimizer, or to hold its moments."""
    other = make_mesh(2, 2, 2)
    with Checkpoints(saved) as checkpoints:
        params = checkpoints.restore_params(shapes_on(other).params, 1)
    assert_same(params, state_on(mesh, 1).params)
    assert params['embedding'].sharding == named_sharding(other, ('vocab', 'embed'))


def test_what_is_saved_is_what_was_passed(mesh, tmp_path):
    """Guards against a save in the background that reads buffers which the next update has already overwritten."""
    state = state_on(mesh, 1)
    expected = on_host(state)
    update = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        for _ in range(5):
            state = update(state)
    with Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(shapes_on(mesh), 1), expected)


def test_only_the_latest_are_kept(mesh, tmp_path):
    """Guards against a disk that fills up, and against keeping the first ones."""
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (9, 10, 20, 100):  # as numbers, not as text
            checkpoints.save(state_on(mesh, step))
    assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['100', '20']
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps == [20, 100]
        checkpoints.save(state_on(mesh, 101))
    assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['101']


def test_the_best_is_kept_besides(mesh, tmp_path):
    """Guards against the best model being removed, also by a later start, and the first of equally good ones kept."""
    for scores in ({1: 0.5, 2: 0.7, 3: 0.7}, {4: 0.6, 5: None, 6: 0.1}):
        with Checkpoints(tmp_path, keep=1, keep_best=True) as checkpoints:
            for step, score in scores.items():
                checkpoints.save(state_on(mesh, step), score)
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.steps == sorted({3, max(scores)})
            assert_same(checkpoints.restore(shapes_on(mesh), 3), state_on(mesh, 3))


def test_a_step_that_is_there_is_left_alone(run, mesh):
    """Guards against an error at the end of a run whose last step was also a periodic one."""
    with Checkpoints(run) as checkpoints:
        other = state_on(mesh, 7)
        checkpoints.save(other._replace(progress=other.progress._replace(step=jnp.int32(2))))
        for _ in range(2):  # the second while the first is still being written
            checkpoints.save(state_on(mesh, 3))
    with Checkpoints(run) as checkpoints:
        assert checkpoints.steps == [2, 3]
        for step in (2, 3):
            assert_same(checkpoints.restore(shapes_on(mesh), step), state_on(mesh, step))


def test_an_unknown_step_lists_those_there_are(saved, mesh, tmp_path):
    with Checkpoints(saved) as checkpoints, pytest.raises(ValueError, match=r'no checkpoint of step 3 .* \[1, 2\]'):
        checkpoints.restore(shapes_on(mesh), 3)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=r'no checkpoint of step 1 .* \[\]'):
        checkpoints.restore_params(shapes_on(mesh).params, 1)


def test_a_checkpoint_of_another_model_or_optimizer_names_the_array(saved, mesh):
    """Guards against arrays cut, padded or cast to fit, as Orbax does if it is let, and silently fresh moments."""
    wider, without_norm = shapes_on(mesh, mlp=48), shapes_on(mesh)
    del without_norm.params['norm']
    halved = shapes_on(mesh, adamw(mu_dtype='bfloat16'))
    with Checkpoints(saved) as checkpoints:
        for restore, match in [
            (partial(checkpoints.restore, wider), r'params/layers/up is \(3, 24, 46\), expected \(3, 24, 48\)'),
            (partial(checkpoints.restore_params, without_norm.params), r'params/norm is \(5,\), expected None'),
            (partial(checkpoints.restore, shapes_on(mesh, optax.sgd(1.0))), r'opt_state/.* is .*, expected None'),
            (partial(checkpoints.restore, halved), r'opt_state/.* is float32, expected bfloat16'),
        ]:
            with pytest.raises(ValueError, match=match) as error:
                restore(2)
            assert 'another model or optimizer' in str(error.value) and 'damaged' not in str(error.value)


def arrays(folder) -> list:
    """The files of arrays. Which holds what, and what is left of earlier writes, depends on timing."""
    return [path for path in folder.rglob('d/*') if path.is_file()]


def cut(*paths) -> None:
    for path in paths:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def unlink(*paths) -> None:
    for path in paths:
        path.unlink()


@pytest.mark.parametrize(
    'damage',
    [
        lambda step: (step / 'params' / '_METADATA').unlink(),
        lambda step: cut(step / 'params' / '_METADATA'),
        lambda step: (step / 'params' / 'manifest.ocdbt').unlink(),
        lambda step: cut(*arrays(step / 'params')),
        lambda step: unlink(*arrays(step / 'opt_state')),
        lambda step: shutil.rmtree(step / 'opt_state'),
    ],
    ids=['no metadata', 'cut metadata', 'no manifest', 'cut arrays', 'no arrays', 'no moments'],
)
def test_a_damaged_checkpoint_says_what_to_do_and_that_works(run, mesh, tmp_path, damage):
    """Guards against a run that restarts from noise or from zero, or dies with a message of the storage layer."""
    damage(run / 'checkpoints' / '2')
    with Checkpoints(run) as checkpoints:
        with pytest.raises(ValueError, match=r'checkpoints/2 cannot be read.*Move that folder away.*step 1\.') as error:
            checkpoints.restore(shapes_on(mesh), 2)
        assert 'another model' not in str(error.value)
        assert_same(checkpoints.restore(shapes_on(mesh), 1), state_on(mesh, 1))

    (run / 'checkpoints' / '2').rename(tmp_path / 'away')
    with Checkpoints(run) as checkpoints:
        assert checkpoints.steps == [1]
        checkpoints.save(state_on(mesh, 2))
    with Checkpoints(run) as checkpoints:
        assert_same(checkpoints.restore(shapes_on(mesh), 2), state_on(mesh, 2))


def test_the_only_checkpoint_being_damaged_leaves_the_start(run, mesh):
    shutil.rmtree(run / 'checkpoints' / '1')
    cut(*arrays(run / 'checkpoints' / '2' / 'params'))
    with Checkpoints(run) as checkpoints, pytest.raises(ValueError, match='resume from the start'):
        checkpoints.restore(shapes_on(mesh), 2)


def test_an_interrupted_save_is_not_a_checkpoint(run, mesh):
    """Guards against resuming from half a checkpoint, a leftover that blocks its step, and leftovers that pile up."""
    folder, suffix = run / 'checkpoints', '.orbax-checkpoint-tmp'  # what a killed save leaves behind
    (folder / '2' / 'params').rename(folder / '2' / f'params{suffix}')
    (folder / '2').rename(folder / f'2{suffix}')
    shutil.copytree(folder / f'2{suffix}', folder / f'3{suffix}')
    with Checkpoints(run) as checkpoints:
        assert checkpoints.steps == [1]
        checkpoints.save(state_on(mesh, 2))
    assert sorted(path.name for path in folder.iterdir()) == ['1', '2']
    with Checkpoints(run) as checkpoints:
        assert_same(checkpoints.restore(shapes_on(mesh), 2), state_on(mesh, 2))
