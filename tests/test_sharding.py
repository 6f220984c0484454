"""The mesh and the table from logical axes to its axes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from troll_jax.optimizer import adamw, state_shapes
from troll_jax.sharding import MESH_AXES, RULES, constrain, make_mesh, named_sharding, partition_spec


@pytest.mark.parametrize(
    'sizes, expected',
    [
        ((1, 8, 1), (1, 8, 1)),
        ((2, 2, 2), (2, 2, 2)),
        ((1, -1, 1), (1, 8, 1)),
        ((-1, 2, 2), (2, 2, 2)),
        ((4, 1, -1), (4, 1, 2)),
        ((2, -1, 4), (2, 1, 4)),
    ],
)
def test_mesh_sizes(sizes, expected):
    """Guards the order of the axes and the size that is worked out."""
    mesh = make_mesh(*sizes)
    assert mesh.axis_names == MESH_AXES and tuple(mesh.shape.values()) == (*expected[:2], 1, expected[2])
    assert {device.id for device in mesh.devices.flat} == set(range(8))


def test_all_devices_are_in_fsdp_by_default():
    assert dict(make_mesh().shape) == {'data': 1, 'fsdp': 8, 'context': 1, 'tensor': 1}


@pytest.mark.parametrize(
    'sizes, match',
    [
        (
            (2, 2, 1),
            r"'fsdp': 2, 'context': 1, 'tensor': 1} needs 4 devices, but 8 \(cpu\) are there; change Compute",
        ),
        ((1, 16, 1), 'needs 16 devices, but 8'),
        ((3, -1, 1), "'fsdp': -1.* needs a multiple of 3 devices, but 8"),
        ((1, -1, 16), 'needs a multiple of 16 devices, but 8'),
        ((-1, -1, 1), 'at most one of them -1'),
        ((0, -1, 1), "must be positive.*'data': 0"),
        ((-2, -2, 2), 'must be positive'),
    ],
)
def test_a_mesh_that_does_not_fit_names_its_numbers(sizes, match):
    """Guards against a mesh over some of the devices, of which the others would idle, and against sign tricks."""
    with pytest.raises(ValueError, match=match):
        make_mesh(*sizes)


def test_partition_specs():
    assert partition_spec(('rows', 'length', None)) == PartitionSpec(('data', 'fsdp'), 'context', None)
    assert partition_spec(('layers', 'embed', 'mlp')) == PartitionSpec(None, ('fsdp', 'context'), 'tensor')
    assert partition_spec(()) == PartitionSpec()
    mesh = make_mesh(2, 2, 2)
    assert named_sharding(mesh, ('vocab', 'embed')).shard_shape((62, 34)) == (31, 17)
    assert named_sharding(mesh, ('batch', 'head_dim')).shard_shape((12, 5)) == (3, 5)


def test_every_rule_names_axes_of_the_mesh():
    """Guards against a typo in the table, which would only show when that axis is first used."""
    for axis in RULES:
        named_sharding(make_mesh(2, 2, 2), (axis,))


def test_an_unknown_logical_axis_is_an_error():
    """Guards against a mistyped name that quietly replicates a parameter on every device."""
    with pytest.raises(KeyError, match='embedding'):
        partition_spec(('vocab', 'embedding'))
    with jax.set_mesh(make_mesh()), pytest.raises(KeyError, match='hidden'):
        jax.jit(lambda x: constrain(x, 'batch', 'hidden'))(jnp.ones((8, 3)))


def test_constrain_lays_out_by_logical_axes():
    with jax.set_mesh(make_mesh(2, 2, 2)):
        y = jax.jit(lambda x: constrain(2 * x, 'batch', 'mlp'))(jnp.ones((12, 6)))
    assert y.addressable_shards[0].data.shape == (3, 3) and jnp.all(y == 2)


def test_constrain_without_a_mesh_does_nothing():
    """Guards the use of the library in a notebook, with no mesh and sizes that nothing divides."""
    x = jnp.ones((7, 5))
    assert constrain(x, 'batch', 'mlp') is x
    text = jax.jit(lambda x: constrain(x, 'batch', 'mlp')).lower(x).as_text()
    assert 'sharding' not in text


def test_moments_are_sharded_like_their_parameters():
    """Guards against replicated moments, which take twice the memory of the parameters on every device."""
    mesh = make_mesh(2, 2, 2)
    shape = lambda size, axes: jax.ShapeDtypeStruct(size, jnp.float32, sharding=named_sharding(mesh, axes))
    params = {'up': shape((3, 34, 46), ('layers', 'embed', 'mlp')), 'norm': {'scale': shape((34,), ('embed',))}}
    optimizer = adamw(warmup_updates=5)  # with a schedule, whose count is part of the state
    shapes = state_shapes(optimizer, params)

    by_name = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(shapes)}
    moments = {name: leaf for name, leaf in by_name.items() if '.mu' in name or '.nu' in name}
    counts = [leaf for name, leaf in by_name.items() if name not in moments]
    assert len(moments) == 4 and len(counts) == 2
    for name, leaf in moments.items():
        param = params['up'] if 'up' in name else params['norm']['scale']
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (param.shape, param.dtype, param.sharding), name
    assert all(leaf.shape == () and leaf.sharding.is_fully_replicated for leaf in counts)

    # The real state takes that layout, and an update keeps it.
    values = jax.tree.map(lambda leaf: jax.device_put(jnp.ones(leaf.shape), leaf.sharding), params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    state = jax.jit(optimizer.init, out_shardings=shardings)(values)
    _, state = jax.jit(optimizer.update)(values, state, values)
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
