"""The device mesh, and the one table that maps logical axis names to mesh axes.

Parameters and activations name their axes by meaning ('embed', 'mlp', 'batch'); this file alone knows the mesh.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ('data', 'fsdp', 'context', 'tensor')

# Logical axis → mesh axis or axes. A logical axis that is not listed here is an error, not a replicated axis.
RULES: dict[str | None, str | tuple[str, ...] | None] = {
    None: None,
    'batch': ('data', 'fsdp', 'context'),  # sequences that are decoded
    'rows': ('data', 'fsdp'),  # packed sequences that are learnt from,
    'length': 'context',  # and the positions of such a row
    'layers': None,
    'embed': ('fsdp', 'context'),
    'vocab': 'tensor',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'head_dim': None,
    'mlp': 'tensor',
}

# Of the leading axes [M, Z, S] of a `Batch`.
BATCH_AXES = (None, 'rows', 'length')


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    *,
    context: int = 1,
    in_order: bool = False,
) -> Mesh:
    """Arranges all devices, or those given, in a mesh of `data` × `fsdp` × `context` × `tensor`.

    At most one size is −1: whatever is left. `in_order` keeps the devices' order; otherwise TPUs must be a cuboid, and
    neighbours among them are neighbours in the mesh.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = dict(zip(MESH_AXES, (data, fsdp, context, tensor), strict=True))
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f'mesh sizes must be positive, at most one of them -1 (what is left); got {sizes}')
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and count % fixed == 0:
        sizes[free[0]] = count // fixed
    if math.prod(sizes.values()) != count:
        raise ValueError(
            f'mesh {sizes} needs {fixed if not free else f"a multiple of {fixed}"} devices, but {count} '
            f'({devices[0].platform}) are there; change Compute.data, Compute.fsdp, Compute.context or Compute.tensor'
        )
    shape = tuple(sizes.values())
    if in_order:
        grid = np.reshape(devices, shape)
    else:  # an axis may be shorter than a side of the slice: 2 of the 4 × 4 × 4 chips of a TPU, say
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def split_devices(devices: Sequence[jax.Device], count: int) -> tuple[list[jax.Device], list[jax.Device]]:
    """All but the last `count` / P devices of each of P processes, and these last.

    Raises:
      ValueError: P does not divide `count`, a process would have no others, or has another number of devices.
    """
    processes = sorted({device.process_index for device in devices})
    of_each = [[device for device in devices if device.process_index == i] for i in processes]
    last, left = divmod(count, len(processes))
    if left or last >= min(map(len, of_each)) or len({*map(len, of_each)}) > 1:
        raise ValueError(
            f'Compute.rollout_devices = {count} of {len(devices)} devices in {len(processes)} processes; expected a '
            'multiple of the processes, fewer than there are, and as many devices in each. Change it, or leave it out'
        )
    return [x for of in of_each for x in of[:-last]], [x for of in of_each for x in of[-last:]]


def one_device_mesh() -> Mesh:
    """The mesh of one device, for programs that run without a mesh in context."""
    return make_mesh(devices=jax.local_devices()[:1])


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh in context (`jax.set_mesh`), be its devices of this machine or not; None without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def axis_size(axis: str, mesh: Mesh | None = None) -> int:
    """The number of devices over which a mesh, by default that in context, spreads a logical axis; 1 without one."""
    mesh, names = mesh or current_mesh(), RULES[axis]
    names = (names,) if isinstance(names, str) else names
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in names)


def shard_map(function: Callable, in_axes: Any, out_axes: Any) -> Callable:
    """`jax.shard_map` by logical axes: calls a function on each device's part of its arguments.

    Args:
      function: function of arrays, whose collectives name mesh axes.
      in_axes: tuple of the logical axes of each argument, see `RULES`; out_axes: those of the results.
    """
    mesh = current_mesh()
    is_axes = lambda x: isinstance(x, tuple) and all(axis is None or isinstance(axis, str) for axis in x)
    specs = lambda axes: jax.tree.map(partition_spec, axes, is_leaf=is_axes)
    return jax.shard_map(
        function,
        mesh=one_device_mesh() if mesh is None else mesh,
        in_specs=specs(in_axes),
        out_specs=specs(out_axes),
        check_vma=False,  # a kernel does not say over which mesh axes its results vary
    )


def platform() -> str:
    """The platform of the mesh in context; without a mesh, this machine's."""
    mesh = current_mesh()
    return jax.default_backend() if mesh is None else mesh.abstract_device.platform


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of an array whose axes have these logical names."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def named_sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """The layout of an array, in the words that XLA has for its results: a program that returns it takes it again."""

    def names(of: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        left = tuple(name for name in of if name != 'context' or mesh.shape[name] > 1) if isinstance(of, tuple) else of
        return left[0] if isinstance(left, tuple) and len(left) == 1 else left

    return NamedSharding(mesh, PartitionSpec(*map(names, partition_spec(axes))))


def place(tree: Any, mesh: Mesh, axes: Sequence[str | None] = BATCH_AXES) -> Any:
    """Puts host arrays onto the mesh, each process what its own devices hold.

    Args:
      tree: numpy arrays that are the same on every process.
      axes: logical names of their leading axes; the others are not sharded.
    """

    def put(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        sharding = named_sharding(mesh, (*axes, *[None] * (x.ndim - len(axes))))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def fetch(tree: Any) -> Any:
    """The whole arrays in the memory of every host, as numpy. What is on the host already may differ between them."""

    def whole(x: jax.Array | np.ndarray | float) -> np.ndarray:
        here = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
        return np.asarray(x) if here else multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


def gather(tree: Any, mesh: Mesh) -> Any:
    """What each process passes in, numbers or arrays of one shape, as [processes, …] in numpy. All processes call it.

    It runs on this mesh alone: other devices may be busy with a program that other processes have not started yet.
    """
    if jax.process_count() == 1:
        return jax.tree.map(lambda x: np.asarray(x)[None], tree)
    devices = Mesh(mesh.devices.ravel(), 'device')
    _, of_process = np.unique([device.process_index for device in devices.devices], return_index=True)

    def rows(x: np.ndarray) -> np.ndarray:
        shape, sharding = (devices.size, *np.shape(x)), NamedSharding(devices, PartitionSpec('device'))
        return fetch(jax.make_array_from_callback(shape, sharding, lambda _: np.asarray(x)[None]))[of_process]

    with jax.set_mesh(devices):
        return jax.tree.map(rows, tree)


def send(tree: Any, shardings: Any) -> Any:
    """Arrays in these layouts on other devices of the same processes, as `jax.device_put` sends those of one process.

    Between several processes the devices that have an array exchange it first, until each of a process holds all that
    this process's others need, and those copy it: one array at a time, for which there must be room.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    return jax.tree.map(lambda x, to: jax.block_until_ready(_send(x, to)), tree, shardings)


def _send(x: jax.Array, to: NamedSharding) -> jax.Array:
    processes = sorted({device.process_index for device in to.device_set})
    by_id = sorted(x.sharding.device_set, key=lambda device: device.id)
    senders = np.array([[device for device in by_id if device.process_index == i] for i in processes])
    # On each device of a process the rows of the target mesh that are this process's; or all, if processes share a row.
    rows = 1 if to.mesh.size // len(processes) % to.mesh.shape['tensor'] else len(processes)
    mesh = Mesh(senders.T.reshape(-1, rows, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        held = jax.device_put(x, NamedSharding(mesh, to.spec)).addressable_shards[0]
    first = [at.indices(size)[0] for at, size in zip(held.index, x.shape, strict=True)]

    def part(index: tuple[slice, ...]) -> jax.Array:
        bounds = [at.indices(size)[:2] for at, size in zip(index, x.shape, strict=True)]
        return held.data[tuple(slice(begin - i, end - i) for (begin, end), i in zip(bounds, first, strict=True))]

    with jax.set_mesh(make_mesh(devices=[held.device])):
        return jax.make_array_from_callback(x.shape, to, part)


class SampleParts(NamedTuple):
    """How the processes of a mesh share the samples of each prompt: of n parts, sample g belongs to part g % n."""

    shards: np.ndarray  # [n, E / n] int, the shards of the batch in whose rows a part is
    here: np.ndarray  # [n] bool, whether a device of this process has one of them

    @property
    def held(self) -> list[int]:
        """The parts that this process holds."""
        return np.flatnonzero(self.here).tolist()

    def index(self, rows: np.ndarray) -> np.ndarray:
        """The places of responses [R] among those that this process holds; −1: it does not."""
        group, part = np.divmod(rows, len(self.here))
        return np.where(self.here[part], group * len(self.held) + np.cumsum(self.here)[part] - 1, -1)


def sample_parts(mesh: Mesh, samples: int, process: int | None = None) -> SampleParts:
    """The parts of G samples of a prompt: as many as divide samples, processes and shards of the batch.

    Args:
      mesh: the devices.
      samples: G. As every part has as many of each prompt, parts are equal whichever prompts are in a minibatch.
      process: whose parts are `here`; None: this one.
    """
    process = jax.process_index() if process is None else process
    count = axis_size('rows', mesh)
    owners = [sorted({device.process_index for device in of}) for of in mesh.devices.reshape(count, -1)]
    parts = math.gcd(samples, count, len({device.process_index for device in mesh.devices.flat}))
    shards = np.array(sorted(range(count), key=owners.__getitem__)).reshape(parts, -1)
    return SampleParts(shards, np.array([any(process in owners[e] for e in part) for part in shards]))


def place_parts(tree: Any, mesh: Mesh, parts: SampleParts) -> Any:
    """Puts the rows of a batch onto the mesh.

    Args:
      tree: numpy arrays [M, Z', …], on each process the rows of its parts.
      mesh: the devices.
      parts: whose rows lie where.

    Returns:
      Arrays [M, Z, …].
    """
    held = parts.shards[parts.here].ravel().tolist()

    def put(x: np.ndarray) -> jax.Array:
        rows = x.shape[1] // len(held)  # of a shard
        shape = x.shape[0], parts.shards.size * rows, *x.shape[2:]

        def rows_of(index: tuple[slice, ...]) -> np.ndarray:
            begin = held.index((index[1].start or 0) // rows) * rows
            return x[:, begin : begin + rows, *index[2:]]

        return jax.make_array_from_callback(shape, named_sharding(mesh, BATCH_AXES), rows_of)

    return jax.tree.map(put, tree)


@jax.jit
def checksum(tree: Any) -> jax.Array:
    """[] uint32: a hash of the bits of all numbers and of their places. The same on any mesh.

    The sum, modulo 2³², of the finaliser of MurmurHash3 of each: a sum of the bits alone would not tell two numbers
    that change places, nor two equal changes that cancel each other.
    """

    def of_array(i: int, x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}').astype(jnp.uint32)
        steps = [math.prod(x.shape[axis + 1 :]) % 2**32 for axis in range(x.ndim)]
        place = sum(jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(n) for axis, n in enumerate(steps))
        mixed = bits + (place + np.uint32(i)) * np.uint32(0x9E3779B9)  # 2³² over the golden ratio: places lie far apart
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
        return jnp.sum(mixed, dtype=jnp.uint32)

    return sum(of_array(i, x) for i, x in enumerate(jax.tree.leaves(tree)))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks the compiler to lay `x` out by its logical axes. Without a mesh in context (`jax.set_mesh`): nothing."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(axes)))


def constrain_like(tree: Any, shapes: Callable[[jax.sharding.AbstractMesh], Any]) -> Any:
    """`constrain` for a whole tree, whose shardings `shapes` returns for the mesh in context."""
    mesh = current_mesh()
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, jax.tree.map(lambda x: x.sharding, shapes(mesh)))
