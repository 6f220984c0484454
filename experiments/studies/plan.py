"""Compiles the programs of an experiment for devices that are not there, and says what they need."""

import dataclasses
import math
import time
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from experiments.plumbing.gin_files import Config
from experiments.studies.program_cost import (
    Chip,
    TooLarge,
    add_iterations,
    bytes_kept,
    bytes_needed,
    compile_program,
    count_flops,
    count_rematerialised,
    describe,
    divide,
    program_cost,
    roofline,
)
from troll_jax.experiment import Experiment
from troll_jax.learn import Learner
from troll_jax.models.paged_attention import PAGE_SIZE
from troll_jax.packing import abstract_batch
from troll_jax.record import empty_rollout
from troll_jax.rollout import MEMORY_SHARE, Sampler
from troll_jax.settings import Compute, Method, Sampling, check_together, minibatch_shape
from troll_jax.sharding import sample_parts
from troll_jax.types import Prompts

PROGRAMS = ('recompute', 'reference', 'values', 'critic', 'update', 'prefill', 'decode')


def plan(
    config: Config, topology: str, programs: Sequence[str] = PROGRAMS, *, only_if_it_may_fit: bool = False
) -> list[dict]:
    """Compiles those of these programs that the experiment has, and returns what they need on a topology.

    Args:
      config: experiment.
      topology: as in `describe`.
      programs: some of `PROGRAMS`.
      only_if_it_may_fit: a program is not compiled if the sizes of its arrays alone show that it does not fit.

    Raises:
      ValueError: an unknown topology, sizes that do not go together on its devices, or settings that are missing.
    """
    chip, devices = describe(topology)
    compute = dataclasses.replace(config.build(Compute), devices=devices)
    experiment, sampling, method = (config.build(kind) for kind in (Experiment, Sampling, Method))
    check_together(sampling, method, compute, experiment.max_length)
    decoder, mesh = experiment.decoder_config(compute, method.lora), compute.mesh
    shape = minibatch_shape(sampling, method, compute, experiment.max_length)
    prompts, samples, length = sampling.prompts_per_step, sampling.samples_per_prompt, experiment.max_length
    minibatch = method.minibatch_prompts * samples
    sampler = Sampler(
        decoder,
        samples_per_prompt=samples,
        max_response_length=experiment.max_response_length,
        temperature=sampling.temperature,
        stop_tokens=[0],
        support_size=sampling.support_size,
        support_mass=sampling.support_mass,
        slots=compute.slots,
        cache_gb=compute.cache_gb,
        gather_weights=compute.gather_weights,
    )
    learner = Learner(
        decoder,
        sampling,
        method,
        compute,
        max_prompt_length=experiment.max_prompt_length,
        max_response_length=experiment.max_response_length,
    )

    state, host = learner.shapes, host_memory(experiment, sampling, method, compute)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        on_chips = partial(examine, chip=chip, only_if_it_may_fit=only_if_it_may_fit)
        label = lambda rows: [{'topology': topology, 'model': experiment.model} | host | row for row in rows]
        results = []
        of_learner = {name: work for name, work in learner.programs().items() if name in programs}
        for program, arguments in of_learner.values():
            try:
                jax.eval_shape(program, *arguments)  # an error now, rather than after minutes of compilation
            except RuntimeError as error:
                if 'cuDNN' not in str(error):
                    raise
                raise ValueError(
                    f'{error} A GPU takes its attention: pip install --no-deps nvidia-cudnn-cu13, or bind '
                    "Compute.attention = 'xla'"
                ) from error
        for name, (program, arguments) in of_learner.items():
            others = bytes_on_device(state) - bytes_on_device(arguments[0])
            work = {'tokens': minibatch * length, 'iterations': shape.micro_batches, 'beside': others}
            work |= {'calls': prompts // method.minibatch_prompts, 'devices': mesh.size}
            results.append(on_chips(name, program, arguments, **work))
    of_sampler, mesh = [name for name in ('prefill', 'decode') if name in programs], compute.rollout_mesh
    if not of_sampler:
        return label(results)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        policy = learner.sampling_shapes
        # All that is trained stays on the devices, or what was handed over to others.
        beside = bytes_on_device(state if compute.rollout_devices is None else policy)
        if only_if_it_may_fit and beside > chip.memory:
            return label(results + [does_not_fit(name, chip, beside / 1e9) for name in of_sampler])
        try:
            weights = compiled_shapes(sampler.begin, policy)
            free = MEMORY_SHARE * chip.memory - beside - bytes_on_device(weights)  # for the cache
            sizes = sampler.sizes(prompts, experiment.max_prompt_length, free)
        except TooLarge as error:
            return label(results + [does_not_fit(name, chip, error.gb) for name in of_sampler])
        except ValueError:
            if compute.cache_gb is not None:
                raise
            needed = (chip.memory - free) / 1e9
            return label(results + [does_not_fit(name, chip, needed) for name in of_sampler])
        shape_of = lambda program, *inputs: weights if program is sampler.begin else compiled_shapes(program, *inputs)
        every = sampler.programs(policy, sizes, shape_of=shape_of)
        tokens = {'prefill': sizes.rows * sizes.chunk, 'decode': sizes.slots}
        parts = {'prefill': 1, 'decode': sampler.decode_steps}
        prefills = -(-prompts // (sizes.shards * sizes.rows)) * -(-experiment.max_prompt_length // sizes.chunk)
        full = -(-prompts * samples // (sizes.shards * sizes.slots)) * experiment.max_response_length
        calls = {'prefill': prefills, 'decode': full}
        room = {'slots': sizes.shards * sizes.slots, 'cached_tokens': sizes.shards * sizes.pages * PAGE_SIZE}
        for name in of_sampler:
            work = {'tokens': sizes.shards * tokens[name], 'parts': parts[name], 'beside': beside}
            results.append(on_chips(name, *every[name], **work, calls=calls[name], devices=mesh.size) | room)
        return label(results)


def examine(
    name: str,
    program,
    arguments,
    *,
    chip: Chip,
    devices: int,
    tokens: int,
    iterations: int = 1,
    parts: int = 1,
    beside: int = 0,
    calls: int = 1,
    only_if_it_may_fit: bool = False,
) -> dict:
    """Compiles a program and returns what it needs; of one that the compiler finds too large, no more than its memory.

    Args:
      name: name of the program, for the table.
      program: a jitted function.
      arguments: shapes with shardings.
      chip: what one device is.
      devices: number of devices of the mesh.
      tokens: number of tokens that it works on in a part of a call.
      iterations: how often its loop of unknown length runs in a call.
      parts: equal parts of a call, the steps of a decode program; time, rates, and what is moved, sent and launched are
        those of one.
      beside: bytes on each device that it leaves alone.
      calls: parts of it in a training step, at most.
      only_if_it_may_fit: see `plan`.
    """
    begin = time.perf_counter()
    traced = program.trace(*arguments)
    least = beside + bytes_on_device(arguments) + bytes_kept(traced.jaxpr.jaxpr) / devices
    if only_if_it_may_fit and least > chip.memory:
        return does_not_fit(name, chip, least / 1e9)
    try:
        compiled = compile_program(traced)
    except TooLarge as error:
        return does_not_fit(name, chip, error.gb)
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    needed = bytes_needed(compiled) + beside
    once, per_iteration = (flops / devices for flops in count_flops(traced.jaxpr.jaxpr, devices))
    text = compiled.as_text()
    cost_once, cost_per_iteration = program_cost(text)
    flops = (once + iterations * per_iteration) / parts
    cost = divide(add_iterations(cost_once, cost_per_iteration, iterations), parts)
    bound = roofline(chip, flops, cost)
    return {
        'program': name,
        'devices': devices,
        'argument_gb': memory.argument_size_in_bytes / 1e9,
        'temporary_gb': memory.temp_size_in_bytes / 1e9,
        'needed_gb': needed / 1e9,
        'memory_gb': chip.memory / 1e9,
        'fits': needed <= chip.memory,
        'tflop': flops / 1e12,
        'moved_gb': cost.bytes / 1e9,
        'sent_gb': {kind: size / 1e9 for kind, size in sorted(cost.collectives.items())},
        'bound_s': bound.seconds,
        'step_s': bound.seconds * calls,
        'limit': bound.limit,
        'launches': cost.launches,
        'host_waits': cost.host_waits,
        'remat': count_rematerialised(text),
        'tokens_per_second': tokens / bound.seconds,
        'compile_seconds': seconds,
    }


def host_memory(experiment: Experiment, sampling: Sampling, method: Method, compute: Compute) -> dict:
    """What a process holds of a rollout batch at most, in the memory of its host, and how many processes there are.

    These are rollouts (dynamic sampling has those that it keeps, those of a further draw, and what it puts together;
    `Compute.overlap` the next one besides) and all minibatches, before they go to the devices.
    """
    count, samples, kept = sampling.prompts_per_step, sampling.samples_per_prompt, sampling.support_size
    processes = {device.process_index for device in compute.mesh.devices.flat}
    of = lambda process: sample_parts(compute.mesh, samples, process)
    parts = max(map(of, processes), key=lambda parts: len(parts.held))
    batch = abstract_batch(minibatch_shape(sampling, method, compute, experiment.max_length), kept)
    prompts = Prompts(np.zeros((count, experiment.max_prompt_length), np.int32), np.zeros(count, np.int32))
    rollout = jax.eval_shape(lambda: empty_rollout(prompts, samples, experiment.max_response_length, kept, parts))
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 1e9
    minibatches = -(-count // method.minibatch_prompts)
    rollouts = (1 if sampling.max_draws == 1 else 3) + compute.overlap
    needed = rollouts * size(rollout) + minibatches * size(batch) * len(parts.held) / len(parts.here)
    return {'processes': len(processes), 'rollout_gb': size(rollout), 'host_gb': needed}


def balance(rows: Sequence[dict]) -> str | None:
    """How many of the devices should sample, by the bounds of all programs on one topology; None if some are unknown.

    Work is taken to be as much on any number of devices, and responses to be of full length.
    """
    by_name = {row['program']: row for row in rows}
    known = {'update', 'decode'} <= by_name.keys() and all(row['limit'] is not None for row in rows)
    if not known:
        return None
    is_rollout = lambda row: row['program'] in ('prefill', 'decode')
    seconds = lambda rollout: sum(row['step_s'] for row in rows if is_rollout(row) == rollout)
    sampling, training = (by_name[name]['devices'] for name in ('decode', 'update'))
    share = sampling * seconds(True) / (sampling * seconds(True) + training * seconds(False))
    return (
        f'{rows[0]["topology"]}: a rollout takes at least {seconds(True):.3g} s on {sampling} devices, its updates '
        f'{seconds(False):.3g} s on {training}. With Compute.overlap (and Sampling.lag) and Compute.rollout_devices '
        f'both take as long if {share:.0%} of the devices sample'
    )


def does_not_fit(name: str, chip: Chip, gb: float) -> dict:
    unknown = 'tflop moved_gb sent_gb bound_s step_s limit launches host_waits remat tokens_per_second'.split()
    row = {'program': name, 'needed_gb': gb, 'memory_gb': chip.memory / 1e9, 'fits': False}
    return row | dict.fromkeys(unknown)


def compiled_shapes(program, *arguments):
    """The shapes of what a program returns, with the shardings that its compiler chooses."""
    traced = program.trace(*arguments)
    shape = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(shape, traced.out_info, compile_program(traced).output_shardings)


def bytes_on_device(tree) -> int:
    """The bytes of arrays with shardings on one device, without what lies in the memory of its host."""
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    arrays = (x for x in jax.tree.leaves(tree) if getattr(x, 'sharding', None))
    return sum(size(x) for x in arrays if x.sharding.memory_kind != 'pinned_host')
