"""Says whether an experiment fits a TPU slice or GPUs, and how fast it could be there, without them.

    python -m experiments.plan configs/qwen3_0_6b_gsm8k_troll.gin --topology v5e:2x4 h100:1 h100:8 ['binding = value' …]

Compiles the programs that `experiments.train` would run on the devices, ahead of time for each topology, and prints per
device what the compiler says of memory, and what must at least be computed, moved and sent. The bound on time is that
of a perfect overlap: a run takes longer. Three more columns say what a GPU loses between kernels: how many it launches,
how often it makes the host wait (at every loop of unknown length and every branch), both per step for decoding and per
call for all else, and how many instructions are computed again because the program did not fit otherwise.

Neither weights nor data are read; of `Experiment.model` only config.json, and folders of `configs/models` hold those of
the paper's models. The compilers come with `pip install "jax[tpu,cuda13-local]"`, and neither needs its device;
attention by cuDNN, which a GPU takes for bfloat16, also needs `pip install --no-deps nvidia-cudnn-cu13`.
"""

import argparse
import dataclasses
import inspect
import json
import math
import os
import time
from collections.abc import Sequence
from functools import partial

os.environ['JAX_PLATFORMS'] = 'cpu'  # the topologies are not devices of this machine
os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}

import gin  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from experiments.command import run_command  # noqa: E402
from experiments.config import CONFIG_HELP, Experiment, files_and_bindings, parse  # noqa: E402
from experiments.train import check_sizes, train  # noqa: E402
from troll_jax.learn import make_learner  # noqa: E402
from troll_jax.packing import batch_shape  # noqa: E402
from troll_jax.planning import (  # noqa: E402
    Chip,
    TooLarge,
    add_iterations,
    bytes_needed,
    compile_program,
    count_flops,
    count_rematerialised,
    describe,
    program_cost,
    roofline,
)
from troll_jax.rollout import PREFILL_CHUNK, make_sampler  # noqa: E402
from troll_jax.sharding import make_mesh, named_sharding  # noqa: E402
from troll_jax.slots import prefill_batch  # noqa: E402
from troll_jax.types import Prompts  # noqa: E402

PROGRAMS = ('recompute', 'reference', 'values', 'critic', 'update', 'prefill', 'decode')
UNUSED = ('run_dir', 'steps')  # what a run must have and a plan need not


def plan(topology: str, programs: Sequence[str] = PROGRAMS) -> list[dict]:
    """Compiles those of these programs that the parsed experiment has, and returns what they need on a topology.

    Raises:
      ValueError: an unknown topology, sizes that do not go together on its devices, or settings that are missing.
    """
    chip, devices = describe(topology)
    mesh = make_mesh(**gin.get_bindings('make_mesh'), devices=devices)
    with gin.unlock_config():
        gin.bind_parameter('Experiment.mesh', None)  # it would be made of this machine's devices
    experiment = dataclasses.replace(Experiment(), mesh=mesh)
    config = experiment.decoder_config()
    defaults = {name: p.default for name, p in inspect.signature(train).parameters.items()}
    settings = defaults | gin.get_bindings('train')
    unbound = [f'train.{name}' for name, value in settings.items() if value is gin.REQUIRED and name not in UNUSED]
    if unbound:
        raise ValueError(f'a plan needs {", ".join(unbound)}; bind each, or add a gin file that does')
    prompts, samples, minibatch = (
        settings[name] for name in ('prompts_per_step', 'samples_per_prompt', 'minibatch_prompts')
    )
    slots = settings['slots']
    check_sizes(experiment.mesh, prompts, samples, minibatch, slots)
    length = experiment.max_prompt_length + experiment.max_response_length
    shape = batch_shape(
        minibatch * samples,
        length,
        row_tokens=settings['row_tokens'],
        micro_batch_tokens=settings['micro_batch_tokens'],
        devices=mesh.shape['data'] * mesh.shape['fsdp'],
    )
    sampler = make_sampler(
        config,
        samples_per_prompt=samples,
        max_response_length=experiment.max_response_length,
        stop_tokens=[0],
        slots=slots,
        **{name: settings[name] for name in ('temperature', 'max_tokens', 'mass', 'gather_weights')},
    )
    optimizer = settings['optimizer']
    learner = make_learner(
        config,
        optimizer,
        shape,
        minibatch=minibatch * samples,
        max_response_length=experiment.max_response_length,
        mesh=mesh,
        **{
            name: settings[name]
            for name in inspect.signature(make_learner).parameters.keys() & settings.keys() - {'optimizer'}
        },
    )

    def array(shape: tuple[int, ...], dtype=jnp.int32, axes=('batch',)) -> jax.ShapeDtypeStruct:
        sharding = named_sharding(mesh, (*axes, *[None] * (len(shape) - len(axes))))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    state = learner.shapes
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        rows = Prompts(array((prompts, experiment.max_prompt_length)), array((prompts,)))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), prompts))
        keys = array(keys.shape, keys.dtype)
        on_chips = partial(examine, chip=chip, devices=len(devices))
        label = lambda rows: [{'topology': topology, 'model': experiment.model} | row for row in rows]
        results = []
        of_learner = learner.programs(settings['max_tokens'])
        for program, arguments in of_learner.values():
            try:
                jax.eval_shape(program, *arguments)  # an error now, rather than after minutes of compilation
            except RuntimeError as error:
                if 'cuDNN' not in str(error):
                    raise
                raise ValueError(
                    f'{error} A GPU takes its attention: pip install --no-deps nvidia-cudnn-cu13, or bind '
                    "Experiment.attention = 'xla'"
                ) from error
        for name, (program, arguments) in of_learner.items():
            if name in programs:
                others = bytes_on_device(state) - bytes_on_device(arguments[0])
                tokens, iterations = minibatch * samples * length, shape.micro_batches
                results.append(on_chips(name, program, arguments, tokens=tokens, iterations=iterations, beside=others))
        if {'prefill', 'decode'} & set(programs):
            begin = sampler.begin.trace(state.params, rows, keys, None)
            try:
                shardings = compile_program(begin).output_shardings
            except TooLarge as error:
                of_sampler = [name for name in ('prefill', 'decode') if name in programs]
                return label(results + [does_not_fit(name, chip, error) for name in of_sampler])
            shape_of = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            arguments = weights, requests, slots_of = jax.tree.map(shape_of, begin.out_info, shardings)
            # All that is trained stays on the devices beside the weights that are decoded with.
            of_sampler = partial(on_chips, arguments=arguments, beside=bytes_on_device(state))
            (shards, each, length), (_, slots) = requests.tokens.shape, slots_of.request.shape
            if 'prefill' in programs:
                tokens = shards * prefill_batch(slots, samples, each) * min(PREFILL_CHUNK, length)
                results.append(of_sampler('prefill', sampler.prefill, tokens=tokens))
            if 'decode' in programs:
                # A step in which the tokens of all slots fit into as many pages as there are slots.
                results.append(of_sampler('decode', sampler.decode, tokens=shards * slots))
        return label(results)


def examine(
    name: str,
    program,
    arguments,
    *,
    chip: Chip,
    devices: int,
    tokens: int,
    iterations: int | None = None,
    beside: int = 0,
) -> dict:
    """Compiles a program and returns what it needs; of one that the compiler finds too large, no more than its memory.

    Args:
      name: of the program, for the table.
      program: a jitted function.
      arguments: shapes with shardings.
      chip: what one device is.
      devices: of the mesh.
      tokens: that it works on, in a call, or in an iteration if `iterations` is None.
      iterations: how often its loop of unknown length runs in a call. If None, time, rates, and what is moved, sent
        and launched are those of one iteration alone.
      beside: bytes on each device that it leaves alone.
    """
    begin = time.perf_counter()
    traced = program.trace(*arguments)
    try:
        compiled = compile_program(traced)
    except TooLarge as error:
        return does_not_fit(name, chip, error)
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    needed = bytes_needed(compiled) + beside
    once, per_iteration = (flops / devices for flops in count_flops(traced.jaxpr.jaxpr, devices))
    text = compiled.as_text()
    cost_once, cost_per_iteration = program_cost(text)
    if iterations is None:
        flops, cost = per_iteration, cost_per_iteration
    else:
        flops = once + iterations * per_iteration
        cost = add_iterations(cost_once, cost_per_iteration, iterations)
    bound = roofline(chip, flops, cost)
    return {
        'program': name,
        'argument_gb': memory.argument_size_in_bytes / 1e9,
        'temporary_gb': memory.temp_size_in_bytes / 1e9,
        'needed_gb': needed / 1e9,
        'memory_gb': chip.memory / 1e9,
        'fits': needed <= chip.memory,
        'tflop': flops / 1e12,
        'moved_gb': cost.bytes / 1e9,
        'sent_gb': {kind: size / 1e9 for kind, size in sorted(cost.collectives.items())},
        'bound_s': bound.seconds,
        'limit': bound.limit,
        'launches': cost.launches,
        'host_waits': cost.host_waits,
        'remat': count_rematerialised(text),
        'tokens_per_second': tokens / bound.seconds,
        'compile_seconds': seconds,
    }


def does_not_fit(name: str, chip: Chip, error: TooLarge) -> dict:
    unknown = 'tflop moved_gb sent_gb bound_s limit launches host_waits remat tokens_per_second'.split()
    row = {'program': name, 'needed_gb': error.gb, 'memory_gb': chip.memory / 1e9, 'fits': False}
    return row | dict.fromkeys(unknown)


def bytes_on_device(tree) -> int:
    """Of arrays with shardings, the part of one device; without what lies in the memory of its host."""
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(size(x) for x in jax.tree.leaves(tree) if x.sharding.memory_kind != 'pinned_host')


def print_table(rows: list[dict]) -> None:
    columns = 'topology, program, arguments, temporary, needed of, fits, TFLOP, moved, sent, bound, tokens/s'
    columns = [*columns.split(', '), 'launches', 'host waits', 'remat']
    print('|', ' | '.join(columns), '|')
    print('|', ' | '.join(['---'] * len(columns)), '|')
    for row in rows:
        head = f'| {row["topology"]} | {row["program"]} |'
        if row['limit'] is None:
            print(f'{head} | | over {row["needed_gb"]:.1f} of {row["memory_gb"]:.0f} GB | NO |' + ' |' * 8)
            continue
        sent = ', '.join(f'{kind} {size:.2g} GB' for kind, size in row['sent_gb'].items()) or 'nothing'
        print(
            f'{head} {row["argument_gb"]:.2f} GB | {row["temporary_gb"]:.2f} GB | '
            f'{row["needed_gb"]:.1f} of {row["memory_gb"]:.0f} GB | {"yes" if row["fits"] else "NO"} | '
            f'{row["tflop"]:.3g} | {row["moved_gb"]:.3g} GB | {sent} | '
            f'{row["bound_s"]:.3g} s ({row["limit"]}) | {row["tokens_per_second"]:.3g} | '
            f'{row["launches"]:,} | {row["host_waits"]} | {row["remat"]} |'
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help=CONFIG_HELP)
    parser.add_argument('--topology', required=True, help='one or several, such as v5e:4x4 v5p:4x4x4 h100:8')
    parser.add_argument('bindings', nargs='*', help="gin bindings that win over files'")
    parser.add_argument('--programs', default=','.join(PROGRAMS), help='which of them, to save time')
    parser.add_argument('--json', action='store_true', help='prints the rows as one line of JSON, too, last')
    arguments = parser.parse_intermixed_args()
    programs = arguments.programs.split(',')
    if unknown := set(programs) - set(PROGRAMS):
        raise ValueError(f'no program {unknown}; expected some of {",".join(PROGRAMS)}')
    # To argparse, all topologies but the first are words like files and bindings.
    words = [arguments.config, *arguments.bindings]
    is_topology = lambda word: '=' not in word and not word.endswith('.gin')
    rest = [word for word in words if not is_topology(word)]
    arguments.config, *arguments.bindings = rest or parser.error('expected a configuration file')
    rows = []
    for topology in ','.join([arguments.topology, *filter(is_topology, words)]).split(','):
        gin.clear_config()
        parse(*files_and_bindings(arguments))
        rows += plan(topology, programs)
    print_table(rows)
    if arguments.json:
        print(json.dumps(rows))


if __name__ == '__main__':
    run_command(main)
