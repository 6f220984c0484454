"""The cost of a program on hardware that is not there, read off its jaxpr and what XLA compiles for that hardware.

XLA's own cost analysis counts the body of a loop once. Here FLOPs are counted on the jaxpr, with loops of known length
counted fully, and bytes on the compiled program, with the trip counts of its loops. What runs an unknown number of
times (a decode loop ends when all responses have, an update works through as many micro-batches as there are) is
counted apart, per iteration; a loop of unknown length inside of another counts as one round.

Kernels written in Pallas: FLOPs are those of the body times the grid, for splash attention without the blocks above the
diagonal, which its causal mask skips. cuDNN's attention counts as its products, of whole rows without what lies above
the diagonal. A kernel reads its operands and writes its results once, whatever it fetches again.
"""

import importlib.util
import math
import re
from collections import Counter
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.extend.core import ClosedJaxpr, Jaxpr

from troll_jax.sharding import platform


class Chip(NamedTuple):
    """One device: peak rates per second, as published."""

    flops: float  # bfloat16, dense
    memory: float  # bytes of HBM
    bandwidth: float  # bytes, of HBM
    interconnect: float  # bytes, of all links together; of a GPU those of NVLink, both ways


CHIPS = {
    'v4': Chip(275e12, 32e9, 1228e9, 300e9),
    'v5e': Chip(197e12, 16e9, 819e9, 200e9),
    'v5p': Chip(459e12, 95e9, 2765e9, 600e9),
    'v6e': Chip(918e12, 32e9, 1640e9, 448e9),
    'h100': Chip(989e12, 80e9, 3350e9, 900e9),
    'h200': Chip(989e12, 141e9, 4800e9, 900e9),
}

SHARE = 0.92  # of a device's memory that a run may take: what is left is the runtime's (XLA_PYTHON_CLIENT_MEM_FRACTION)
_ADAPTER = 2 * 50e9  # 400 Gb/s, both ways, of each GPU where there are several hosts; rings pass through all of them

# What XLA has to know of a GPU that is not there; on a machine that has one,
# `topologies.get_topology_for_devices(jax.devices()).target_config` says it.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  clock_rate_ghz: 1.98  cuda_compute_capability {{ major: 9 }}
  memory_bandwidth: {bandwidth:.0f}  l2_cache_size: {cache}  device_memory_size: {memory:.0f}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""
_GPUS = {'h100': ('NVIDIA H100 80GB HBM3', 50 * 2**20), 'h200': ('NVIDIA H200', 60 * 2**20)}  # name, bytes of L2


def describe(topology: str) -> tuple[Chip, list[jax.Device]]:
    """The kind of device, and devices to compile for, of a topology that need not be there.

    Args:
      topology: a generation of TPUs and the sides of a slice, such as v5e:4x4 or v5p:2x2x1; or a GPU and how many of
        them, such as h100:8, on several hosts h100:2x8.

    Raises:
      ValueError: an unknown topology, or a compiler that is not installed.
    """
    generation, _, size = topology.partition(':')
    if generation not in CHIPS:
        raise ValueError(f'the topology {topology!r} is not of a known generation; expected one of {", ".join(CHIPS)}')
    chip = CHIPS[generation]
    try:
        if generation not in _GPUS:
            return chip, topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
        if importlib.util.find_spec('jax_cuda13_plugin') is None:
            raise ValueError('the CUDA plugin is not installed')
        hosts, _, gpus = size.rpartition('x')
        hosts = int(hosts or 1)
        if int(gpus) not in range(1, 9):
            raise ValueError(f'{gpus} is not a number of GPUs on one host, 1 to 8')
        if hosts > 1:
            chip = chip._replace(interconnect=int(gpus) * _ADAPTER)
        name, cache = _GPUS[generation]
        # Without a GPU, XLA plans for 80 % of its memory; in a run, for all that JAX has set aside.
        memory = SHARE / 0.8 * chip.memory
        config = _HOPPER.format(name=name, cache=cache, memory=memory, bandwidth=chip.bandwidth)
        shape = f'1x{hosts}x{gpus}'
        return chip, topologies.get_topology_desc(platform='cuda', target_config=config, topology=shape).devices
    except Exception as error:  # whatever the compiler raises
        extra = 'cuda13-local' if generation in _GPUS else 'tpu'
        raise ValueError(
            f'no topology {topology!r}: {str(error).splitlines()[0]}. Expected a generation and the sides of a slice, '
            'such as v5e:4x4 or v5p:2x2x1, or a GPU and how many, such as h100:1, h100:8 or h100:2x8; and the '
            f'compiler: pip install "jax[{extra}]=={jax.__version__}"'
        ) from error


class TooLarge(Exception):
    """The compiler has given up on a program that takes more memory than there is: so many GB, on each device."""

    def __init__(self, gb: float):
        self.gb = gb


def compile_program(traced):
    """Compiles a traced program for the devices of the mesh in context. Raises `TooLarge`."""
    # Of several implementations of a kernel the first will do: there is no device on which to time them.
    options = {'xla_gpu_autotune_level': '0'} if platform() == 'gpu' else None
    try:
        return traced.lower().compile(options)
    except jax.errors.JaxRuntimeError as error:
        # The compiler gives up where temporaries alone are more than there is, and says how much.
        asked = re.search(r'temporaries \(([\d.]+)G\)', str(error))
        if asked is None:
            raise
        raise TooLarge(float(asked[1])) from None


def bytes_needed(compiled: jax.stages.Compiled) -> int:
    """The device memory of a program, at its peak, with its arguments and results; what is donated counts once."""
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return needed + memory.output_size_in_bytes - memory.alias_size_in_bytes


class Cost(NamedTuple):
    """The work of one device."""

    bytes: float  # moved between memory and compute
    collectives: Counter  # bytes by kind of collective
    launches: int = 0  # kernels of a GPU; of a TPU instructions of about the same size
    # Loops of unknown length that are entered, and branches: at each, a GPU's host waits at least once to see what is
    # to be launched next.
    host_waits: int = 0


def add_iterations(once: Cost, per_iteration: Cost, iterations: int) -> Cost:
    """The cost of a program whose loop of unknown length runs this often."""
    collectives = Counter(once.collectives)
    for kind, size in per_iteration.collectives.items():
        collectives[kind] += iterations * size
    add = lambda name: getattr(once, name) + iterations * getattr(per_iteration, name)
    return Cost(add('bytes'), collectives, add('launches'), add('host_waits'))


def divide(cost: Cost, parts: int) -> Cost:
    """The cost of one of several equal parts."""
    collectives = Counter({kind: size / parts for kind, size in cost.collectives.items()})
    return Cost(cost.bytes / parts, collectives, round(cost.launches / parts), cost.host_waits / parts)


def count_flops(jaxpr: Jaxpr, devices: int) -> tuple[float, float]:
    """FLOPs of the matrix products on all devices: once, and per iteration of loops of unknown length.

    Args:
      jaxpr: jaxpr of the whole program; what is below `jax.shard_map` is one device's part.
      devices: number of devices of the mesh.
    """
    once = per_iteration = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if not (equation.outvars or equation.effects):
            continue  # a leftover of differentiation, which compilers drop
        if name == 'dot_general':
            (contracting, _), _ = params['dimension_numbers']
            contracted = math.prod(equation.invars[0].aval.shape[axis] for axis in contracting)
            once += 2 * math.prod(equation.outvars[0].aval.shape) * contracted
            continue
        if name == 'while':
            body = count_flops(params['body_jaxpr'].jaxpr, devices)
            per_iteration += sum(body)
            continue
        if name in ('dot_product_attention_fwd_wrapper', 'dot_product_attention_bwd_wrapper'):  # cuDNN's, causal
            batch, length, heads, head_dim = equation.invars[0].aval.shape
            keys, products = equation.invars[1].aval.shape[1], 2 if 'fwd' in name else 5
            # With a part of the queries, all keys: the mask is not the kernel's own.
            once += products * batch * heads * length * (length + 1 if keys == length else 2 * keys) * head_dim
            continue
        repeats = {'scan': params.get('length'), 'shard_map': devices}.get(name, 1)
        if name == 'pallas_call':
            grid = params['grid_mapping'].grid
            repeats = math.prod(grid)
            if params['name'].startswith('splash'):
                # Blocks are square. If there are more keys than queries (`context`), these are the last of their rows.
                queries, keys = (grid[-1], grid[-3]) if 'dkv' in params['name'] else grid[-2:]
                repeats = repeats * (2 * keys - queries + 1) / (2 * keys)
        inner = [count_flops(sub, devices) for sub in sub_jaxprs(params)]
        if name == 'cond':
            inner = [max(inner)]
        once += repeats * sum(fixed for fixed, _ in inner)
        per_iteration += repeats * sum(looped for _, looped in inner)
    return once, per_iteration


def sub_jaxprs(params: dict) -> list[Jaxpr]:
    """The programs inside of an equation with these parameters: bodies of loops, branches, kernels."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr))
    return [getattr(leaf, 'jaxpr', leaf) for leaf in leaves if isinstance(leaf, Jaxpr | ClosedJaxpr)]


def bytes_kept(jaxpr: Jaxpr) -> int:
    """Bytes of what one scan of a program stacks, the most of all: in an update what its layers keep for the gradient.

    On all devices; below `jax.shard_map` on one.
    """
    most = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'scan':
            stacked = (x.aval for x in equation.outvars[equation.params['num_carry'] :])
            most = max(most, sum(x.size * x.dtype.itemsize for x in stacked))
        most = max([most, *map(bytes_kept, sub_jaxprs(equation.params))])
    return most


_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$')
_ARRAY = re.compile(r'\b(pred|bf16|[fsuc]\d+\w*)\[([\d,]*)\](\{[^{}]*\})?')  # dtype, sizes, layout
_COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
# What moves no bytes of its own: names for what is there already.
_FREE = {
    *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'iota'),
    *('while', 'call', 'conditional'),
}


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str


def count_rematerialised(text: str) -> int:
    """Counts the instructions that XLA computes a second time, because the program did not fit otherwise."""
    return len(re.findall(r'^\s+(?:ROOT )?%[\w.\-]*\.remat[\w.]* = (?!.* parameter\()', text, re.MULTILINE))


def program_cost(text: str) -> tuple[Cost, Cost]:
    """Cost of a compiled program, `compiled.as_text()`: once, and per iteration of loops of unknown length.

    Every instruction that is not fused into another is a launch, reads its operands and writes its result. What a TPU's
    compiler keeps in VMEM does not count. Else this is an upper bound of the bytes that have to move: what a cache
    holds from one instruction to the next counts too.
    """
    computations, entry = {}, ''
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif computations and (found := _INSTRUCTION.match(line)):
            current.append(_Instruction(*found.groups()))
    once, looped = Cost(0.0, Counter()), Cost(0.0, Counter())
    # Computations that run a known number of times, and those below a loop of unknown length.
    for name, count, unknown in _runs(computations, entry, 1, False):
        total = looped if unknown else once
        cost = _cost(computations, name)
        total = add_iterations(total, cost, count)
        once, looped = (once, total) if unknown else (total, looped)
    return once, looped


def _runs(computations, name: str, count: int, unknown: bool):
    """Yields (computation, how often it runs, whether below a loop of unknown length) from `name` on, loops inside."""
    yield name, count, unknown
    for instruction in computations[name]:
        rest = instruction.rest
        if instruction.opcode == 'while':
            trips = _trip_count(computations, rest)
            body = re.search(r'body=%?([\w.\-]+)', rest)[1]
            yield from _runs(computations, body, count * (trips or 1), unknown or trips is None)
        elif instruction.opcode in ('call', 'conditional'):
            for callee in _called(rest):
                yield from _runs(computations, callee, count, unknown)


def _cost(computations, name: str) -> Cost:
    """The cost of one computation without its loops; collectives also of those that are fused into others."""
    moved, launches, host_waits = 0.0, 0, 0
    sizes = {instruction.name: _bytes(instruction.shape, in_vmem=False) for instruction in computations[name]}
    for instruction in computations[name]:
        is_loop = instruction.opcode == 'while' and _trip_count(computations, instruction.rest) is None
        host_waits += is_loop or instruction.opcode == 'conditional'
        if instruction.opcode in _FREE or instruction.opcode.endswith('-done'):
            continue
        launches += 1
        names = _operands(instruction)
        operands = [sizes.get(operand, 0) for operand in names]
        result = sizes[instruction.name]
        if instruction.opcode in ('copy-start', 'slice-start'):
            ends = _ARRAY.findall(instruction.shape)[:2]  # of the source all, of the target what is moved
            moved += _array_bytes(*ends[1][:2]) * sum('S(1)' not in layout for *_, layout in ends)
            continue
        in_place = _opcodes(computations, instruction) & {'dynamic-update-slice', 'scatter'}
        if in_place or 'output_to_operand_aliasing' in instruction.rest:
            # In place: the operand of the result's size stays where it is.
            large = result if result in operands else max(operands)
            small = {name for name in names if sizes.get(name) != large} & sizes.keys()
            moved += 2 * sum(_bytes_read(computations, [instruction], name, sizes[name]) for name in small)
        else:
            read = (_bytes_read(computations, [instruction], name, sizes[name]) for name in set(names) & sizes.keys())
            moved += sum(read) + result
    collectives = Counter()
    # The parts of a collective that is spread over several instructions share a channel.
    for kind, size in dict(_collectives(computations, name)).values():
        collectives[kind] += size
    return Cost(moved, collectives, launches, host_waits)


def _opcodes(computations, instruction: _Instruction) -> set[str]:
    """The opcodes of an instruction, with all that is fused into it."""
    fused = _called(instruction.rest) if instruction.opcode == 'fusion' else []
    inside = (_opcodes(computations, inner) for name in fused for inner in computations[name])
    return {instruction.opcode}.union(*inside)


def _bytes_read(computations, instructions: list[_Instruction], name: str, size: int) -> int:
    """The bytes of an array that these instructions read: of what they only take slices of, the slices."""
    total = 0
    for user in instructions:
        operands = _operands(user)
        if name not in operands:
            continue
        if user.opcode in ('dynamic-slice', 'gather', 'slice') and name not in operands[1:]:
            total += _bytes(user.shape)
        elif user.opcode == 'bitcast':
            total += _bytes_read(computations, instructions, user.name, size) or size  # 0: it is the result
        elif user.opcode == 'fusion':
            for position in (i for i, operand in enumerate(operands) if operand == name):
                inner = computations[_called(user.rest)[0]]
                parameter = next(x for x in inner if x.opcode == 'parameter' and x.rest.startswith(f'{position})'))
                total += _bytes_read(computations, inner, parameter.name, size)
        else:
            return size
    return min(total, size)


def _collectives(computations, name: str):
    """Yields (channel, (kind, bytes))."""
    sizes = {instruction.name: _bytes(instruction.shape) for instruction in computations[name]}
    for instruction in computations[name]:
        kind = instruction.opcode.removesuffix('-start')
        if kind in _COLLECTIVES:
            operands = sum(sizes.get(operand, 0) for operand in _operands(instruction))
            # The larger side: a gather's result, a scatter's operand. A start's result holds its operand, too.
            result = sizes[instruction.name] - (operands if instruction.opcode.endswith('-start') else 0)
            channel = re.search(r'channel_id=(\d+)', instruction.rest)
            yield channel[1] if channel else instruction.name, (kind, max(result, operands))
        elif instruction.opcode not in ('while', 'call', 'conditional'):
            for callee in _called(instruction.rest):
                if callee in computations:
                    yield from _collectives(computations, callee)


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r'%([\w.\-]+)', instruction.rest.split('), ')[0])


def _called(rest: str) -> list[str]:
    """The computations that an instruction names."""
    attributes = 'calls|to_apply|branch_computations|true_computation|false_computation'
    lists = re.findall(rf'(?:{attributes})=(\{{[^}}]*\}}|%?[\w.\-]+)', rest)
    return [name for names in lists for name in re.findall(r'[\w.\-]+', names)]


def _trip_count(computations, rest: str) -> int | None:
    """Rounds of a loop, if the program says so or its condition is `i < constant`, counted from 0 in ones."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest):
        return int(known[1])
    instructions = computations[re.search(r'condition=%?([\w.\-]+)', rest)[1]]
    constants = [found[1] for i in instructions if i.opcode == 'constant' and (found := re.match(r'(\d+)\)', i.rest))]
    simple = all(i.opcode in ('parameter', 'get-tuple-element', 'constant', 'compare', 'fusion') for i in instructions)
    return int(constants[0]) if simple and len(constants) == 1 else None


def _bytes(shape: str, in_vmem: bool = True) -> int:
    """The bytes of an array or a tuple of arrays, as a compiled program writes its shape.

    Args:
      in_vmem: false: without those that a TPU keeps in its fast memory, which the compiler marks S(1).
    """
    found = _ARRAY.findall(shape)
    return sum(_array_bytes(dtype, sizes) for dtype, sizes, layout in found if in_vmem or 'S(1)' not in layout)


def _array_bytes(dtype: str, sizes: str) -> int:
    bits = 8 if dtype == 'pred' else int(re.search(r'\d+', dtype)[0])
    return math.prod(int(n) for n in sizes.split(',') if n) * bits // 8


class Bound(NamedTuple):
    """The least time that a chip can need, and why."""

    seconds: float
    limit: str  # 'compute', 'memory' or 'network'


def roofline(chip: Chip, flops: float, cost: Cost) -> Bound:
    """The time of what takes longest if all of it overlaps; `flops` of one device."""
    times = {
        'compute': flops / chip.flops,
        'memory': cost.bytes / chip.bandwidth,
        'network': sum(cost.collectives.values()) / chip.interconnect,
    }
    limit = max(times, key=times.get)
    return Bound(times[limit], limit)
