"""Says whether an experiment fits a TPU slice, and how fast it could be there, without the slice.

    python -m experiments.plan configs/qwen3_0_6b_gsm8k_troll.gin --topology v5e:2x4,v5p:2x2x1 ['binding = value' …]

Compiles the update and the sampler that `experiments.train` would run, ahead of time for each topology, with the
compiler in the `libtpu` wheel (`pip install "libtpu==0.0.42.*"`), and prints per device what the compiler says of
memory, and what must at least be computed, moved and sent. The bound on time is that of a perfect overlap: a run takes
longer. Neither weights nor data are read; of `Experiment.model` only config.json, and folders of `configs/models` hold
that of every Qwen3. The last line of the output is one line of JSON.
"""

import argparse
import dataclasses
import inspect
import json
import os
import time

os.environ['JAX_PLATFORMS'] = 'cpu'  # the topologies are not devices of this machine
os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}

import gin  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from experiments.config import Experiment, parse  # noqa: E402
from experiments.train import abstract_state, check_sizes, train  # noqa: E402
from troll_jax.models.families import decoder_config  # noqa: E402
from troll_jax.models.hf_weights import load_config  # noqa: E402
from troll_jax.planning import CHIPS, count_flops, program_cost, roofline  # noqa: E402
from troll_jax.rollout import make_sampler  # noqa: E402
from troll_jax.sharding import make_mesh, named_sharding  # noqa: E402
from troll_jax.types import Prompts  # noqa: E402
from troll_jax.update import make_batch, make_update  # noqa: E402


def plan(topology: str) -> list[dict]:
    """Compiles the parsed experiment for a topology and returns what update and sampler need there.

    Raises:
      ValueError: an unknown topology, or sizes that do not go together on its devices.
    """
    generation = topology.split(':')[0]
    if generation not in CHIPS:
        raise ValueError(f'the topology {topology!r} is not of a known generation; expected one of {", ".join(CHIPS)}')
    try:
        devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    except Exception as error:  # whatever the compiler raises
        raise ValueError(
            f'no topology {topology!r}: {str(error).splitlines()[0]}. Expected a generation and the sides of a slice, '
            'such as v5e:4x4 or v5p:2x2x1, and the libtpu wheel.'
        ) from error
    mesh = make_mesh(**gin.get_bindings('make_mesh'), devices=devices)
    with gin.unlock_config():
        gin.bind_parameter('Experiment.mesh', None)  # it would be made of this machine's devices
    experiment = dataclasses.replace(Experiment(), mesh=mesh)
    config = decoder_config(
        load_config(experiment.model), compute_dtype=experiment.compute_dtype, remat=experiment.remat
    )
    defaults = {name: p.default for name, p in inspect.signature(train).parameters.items()}
    settings = defaults | gin.get_bindings('train')
    prompts, samples, minibatch = (
        settings[name] for name in ('prompts_per_step', 'samples_per_prompt', 'minibatch_prompts')
    )
    slots = settings['slots']
    check_sizes(experiment.mesh, prompts, samples, minibatch, slots, settings['micro_batches'])
    common = {name: settings[name] for name in ('temperature', 'max_tokens', 'mass')}
    sampler = make_sampler(
        config,
        samples_per_prompt=samples,
        max_response_length=experiment.max_response_length,
        stop_tokens=[0],
        slots=slots,
        gather_weights=settings['gather_weights'],
        **common,
    )
    names = ('objective', 'aggregation', 'tail_rule', 'micro_batches', 'head_chunk')
    update = make_update(config, settings['optimizer'], **common, **{name: settings[name] for name in names})

    def array(shape: tuple[int, ...], dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        sharding = named_sharding(mesh, ('batch', *[None] * (len(shape) - 1)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    state = abstract_state(experiment, config, settings['optimizer'])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        rows = [
            Prompts(array((count, experiment.max_prompt_length)), array((count,))) for count in (prompts, minibatch)
        ]
        keys = [
            jax.eval_shape(lambda n=count: jax.random.split(jax.random.key(0), n)) for count in (prompts, minibatch)
        ]
        keys = [jax.ShapeDtypeStruct(k.shape, k.dtype, sharding=named_sharding(mesh, ('batch',))) for k in keys]
        rollout = jax.eval_shape(sampler, state.params, rows[1], keys[1])
        batch = make_batch(rollout, jax.ShapeDtypeStruct(rollout.response_lengths.shape, jnp.float32))
        batch = jax.tree.map(lambda x: array(x.shape, x.dtype), batch)
        length = experiment.max_prompt_length + experiment.max_response_length
        chip = CHIPS[generation]
        return [
            {'topology': topology, 'model': experiment.model}
            | examine('update', update, (state, batch), chip, len(devices), tokens=minibatch * samples * length),
            {'topology': topology, 'model': experiment.model}
            | examine(
                'decode',
                sampler.program,
                (state.params, rows[0], keys[0], None),
                chip,
                len(devices),
                tokens=slots or prompts * samples,
            ),
        ]


def examine(name: str, program, arguments, chip, devices: int, tokens: int) -> dict:
    """Compiles a program. Time and rates of `update` are those of a call, of `decode` those of a step of its loop.

    That step is one without a prefill, in which the tokens of all slots fit into as many pages as there are slots.
    """
    begin = time.perf_counter()
    traced = program.trace(*arguments)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    # What is donated is not needed twice.
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    which, without = (1, 'prefill') if name == 'decode' else (0, None)
    flops = count_flops(traced.jaxpr.jaxpr, devices, without)[which] / devices
    cost = program_cost(compiled.as_text(), without)[which]
    bound = roofline(chip, flops, cost)
    return {
        'program': name,
        'argument_gb': memory.argument_size_in_bytes / 1e9,
        'temporary_gb': memory.temp_size_in_bytes / 1e9,
        'needed_gb': needed / 1e9,
        'memory_gb': chip.memory / 1e9,
        'fits': needed <= chip.memory,
        'tflops': flops / 1e12,
        'moved_gb': cost.bytes / 1e9,
        'sent_gb': {kind: size / 1e9 for kind, size in sorted(cost.collectives.items())},
        'bound_seconds': bound.seconds,
        'limit': bound.limit,
        'tokens_per_second': tokens / bound.seconds,
        'compile_seconds': seconds,
    }


def print_table(rows: list[dict]) -> None:
    print('| topology | program | arguments | temporary | needed of | fits | TFLOP | moved | sent | bound | tokens/s |')
    print('| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |')
    for row in rows:
        sent = ', '.join(f'{kind} {size:.2g} GB' for kind, size in row['sent_gb'].items()) or 'nothing'
        print(
            f'| {row["topology"]} | {row["program"]} | {row["argument_gb"]:.2f} GB | {row["temporary_gb"]:.2f} GB | '
            f'{row["needed_gb"]:.1f} of {row["memory_gb"]:.0f} GB | {"yes" if row["fits"] else "NO"} | '
            f'{row["tflops"]:.3g} | {row["moved_gb"]:.3g} GB | {sent} | '
            f'{row["bound_seconds"]:.3g} s ({row["limit"]}) | {row["tokens_per_second"]:.3g} |'
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='a gin file')
    parser.add_argument('--topology', required=True, help='one or several, such as v5e:4x4,v5p:4x4x4')
    parser.add_argument('bindings', nargs='*', help="gin bindings that win over the file's")
    arguments = parser.parse_intermixed_args()
    rows = []
    for topology in arguments.topology.split(','):
        gin.clear_config()
        parse([arguments.config], arguments.bindings)
        rows += plan(topology)
    print_table(rows)
    print(json.dumps(rows))


if __name__ == '__main__':
    main()
