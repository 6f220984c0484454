"""What a GPU or TPU makes of it, in minutes: ceilings, exactness, decoding, the update, its parts, a whole step.

    python -m experiments.benchmarks.device --out results [--minutes 8] [--only ceilings decode …] [--profile]

Uses one device, weights that are random, and neither a network nor files of models or data. The parts, in this order:

- ceilings: bandwidth of a copy (read and written) and rate of a bfloat16 product of random numbers;
- numerics: projection, head and one gradient in float32 against the same on this machine's CPU (the projection in
  float64); and what bfloat16 and float32 make the sampler and the trainer differ by, in nats per token;
- decode: Qwen3-0.6B's shape with GSM8K's lengths and 64 to 512 slots, against reading weights and cache once a step;
- update: the same shape with rows of 2,560 packed tokens: TROLL, Clip, and TROLL with XLA's attention; rates, and peak
  memory as measured and as planned, for the same program;
- head: loss and gradient of 8,192 tokens without any layer: TROLL, Clip, and Clip with plain logits;
- projection: alone, against reading and writing its distributions once;
- step: prompts to new parameters, and where its seconds go.

Each part is a process of its own, with a share of the time, so that one that fails or hangs stops no other. Where
memory is short a part takes a smaller size, and says which. On a CPU all sizes are tiny: that shows that it works, and
measures nothing. `--out` gets results.json and each part's log, and with `--profile` traces for Perfetto. The last line
of the output is one line of JSON.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import troll_jax
from experiments.benchmarks.measure import (
    KEPT,
    copy_bandwidth,
    decode_bytes,
    matmul_rate,
    median_seconds,
    qwen3_0_6b,
    random_batch,
    random_prompts,
)
from experiments.benchmarks.projection import violating_tokens
from experiments.benchmarks.update import plain_clip_gradient
from troll_jax.collect import make_collector
from troll_jax.data.prompts import PromptSet
from troll_jax.data.tasks.gsm8k import GSM8K
from troll_jax.data.tokenizer import character_tokenizer
from troll_jax.learn import abstract_state, make_learner, start_state
from troll_jax.models import decoder as decoders
from troll_jax.models.attention import best_implementation
from troll_jax.ops.advantages import group_normalised
from troll_jax.ops.aggregation import token_mean
from troll_jax.ops.losses import ppo_clip, troll
from troll_jax.ops.support import default_tail
from troll_jax.optimizer import adamw
from troll_jax.packing import BatchShape, batch_shape, make_batch, make_layout
from troll_jax.planning import bytes_needed, count_flops
from troll_jax.rewards.pool import Grader
from troll_jax.rewards.terms import task_reward
from troll_jax.rollout import make_sampler
from troll_jax.sharding import make_mesh, place
from troll_jax.types import START
from troll_jax.update import make_gradient, make_recompute, make_update

BOUND, MASS = 0.05, 1 - 1e-5
POLICY = {'temperature': 1.0, 'tail_rule': default_tail, 'max_tokens': KEPT, 'mass': MASS}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of an accelerator; a CPU has `TINY`. Where there are several, the first that memory allows is taken."""

    model: decoders.DecoderConfig = qwen3_0_6b()
    small: decoders.DecoderConfig = qwen3_0_6b(vocab_size=8192, width=256, layers=4, heads=8, kv_heads=4, mlp_width=768)
    copied: int | None = None  # bytes; None: many
    product: int = 8192  # rows and columns
    slots: tuple[int, ...] = (64, 128, 256, 512)
    rooms: tuple[int, ...] = (2048, 1024, 512)  # tokens that a response may have; those here have `response`
    prompt_room: int = 512
    prompt: tuple[int, int] = (64, 192)  # shortest and longest
    response: int = 256
    samples: int = 8
    row_tokens: int = 2560
    rows: tuple[int, ...] = (8, 4, 2, 1)  # of a micro-batch
    head_rows: tuple[int, ...] = (32, 16, 8)  # of 256 tokens of responses each
    projected: tuple[int, ...] = (8192, 65_536)
    step_prompts: tuple[int, ...] = (32, 16, 8)
    repeats: int = 5


_SMALL = {'vocab_size': 320, 'width': 32, 'layers': 2, 'heads': 4, 'kv_heads': 2, 'head_dim': 16, 'mlp_width': 48}
TINY = Sizes(
    model=qwen3_0_6b(**_SMALL),
    small=qwen3_0_6b(**_SMALL),
    copied=2**20,
    product=128,
    slots=(4, 8),
    rooms=(16,),
    prompt_room=16,
    prompt=(4, 12),
    response=8,
    samples=4,
    row_tokens=640,
    rows=(1,),
    head_rows=(2,),
    projected=(64, 128),
    step_prompts=(2,),
    repeats=2,
)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What a part measures on, with and reports to."""

    sizes: Sizes
    report: Callable[[dict[str, Any]], None]  # one measurement
    profile: Path | None = None  # a folder for traces

    def trace(self, name: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.profile is None else jax.profiler.trace(self.profile / name)


def one_device(device: jax.Device | None = None) -> jax.sharding.Mesh:
    return make_mesh(1, 1, 1, [device or jax.devices()[0]])


def model_for(config: decoders.DecoderConfig, dtype: str = 'bfloat16') -> decoders.DecoderConfig:
    """With the attention that training would choose on this device."""
    attention = best_implementation(jax.devices()[0], dtype, config.head_dim)
    return dataclasses.replace(config, compute_dtype=dtype, attention=attention)


def first_that_fits(sizes: Sequence[int], run: Callable[[int], Any]) -> Any:
    """What `run` returns for the first of these sizes for which memory suffices."""
    for size in sizes:
        try:
            return run(size)
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error) or size == sizes[-1]:
                raise
        gc.collect()  # of what the failed one held


def ceilings(bench: Bench) -> None:
    repeats = bench.sizes.repeats
    bench.report(
        {
            'what': 'ceilings',
            'copy_gb_per_s': copy_bandwidth(repeats, bench.sizes.copied) / 1e9,
            'matmul_tflops': matmul_rate(repeats, bench.sizes.product) / 1e12,
        }
    )


def numerics(bench: Bench) -> None:
    """Errors, each with the limit that it must not pass."""
    cpu = jax.devices('cpu')[0]

    def report(what: str, error: float, limit: float) -> None:
        bench.report({'what': what, 'error': float(error), 'limit': limit, 'passed': bool(error <= limit)})

    new, old = (np.asarray(x) for x in violating_tokens(bench.sizes.projected[0], 64, BOUND))
    solve = lambda new, old: jax.vmap(functools.partial(troll_jax.project, bound=BOUND))(new, old)
    ours = jax.tree.map(np.asarray, jax.jit(solve)(new, old))
    with jax.set_mesh(one_device(cpu)), jax.default_device(cpu), jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, jax.jit(solve)(new.astype(np.float64), old.astype(np.float64)))
    kl = np.sum(np.exp(ours.log_probs, dtype=np.float64) * (ours.log_probs.astype(np.float64) - old), axis=1)
    report('projection: KL over the bound, relative', max(0.0, np.max(kl / BOUND - 1)), 1e-5)
    report('projection: probabilities', np.max(np.abs(np.exp(ours.log_probs) - np.exp(exact.log_probs))), 1e-3)
    report('projection: not converged', np.mean(~ours.converged), 0.0)

    # The gradient of the whole: decoder, head, tail rule, projection; and the loss, which shows the head's values.
    config = dataclasses.replace(bench.sizes.small, compute_dtype='float32')
    params = jax.tree.map(np.asarray, decoders.init(config, jax.random.key(1)))
    batch = jax.tree.map(np.asarray, random_batch(BatchShape(2, 2, 640), config.vocab_size))
    gradient = make_gradient(config, objective=troll, **POLICY)

    def on(device: jax.Device):
        with jax.set_mesh(one_device(device)), jax.default_device(device):
            return jax.tree.map(np.asarray, jax.jit(gradient)(*jax.device_put((params, START, batch), device)))

    of_device, of_cpu = on(jax.devices()[0]), on(cpu)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    distance = lambda a, b: np.linalg.norm(flat(a) - flat(b)) / np.linalg.norm(flat(b))
    report('gradient in float32, relative', distance(of_device.params, of_cpu.params), 1e-4)
    of_head = lambda gradient: gradient.params['embedding']  # which is tied to it
    report('gradient of the head in float32, relative', distance(of_head(of_device), of_head(of_cpu)), 1e-4)
    report('entropies in float32, nats', np.max(np.abs(of_device.logs['entropy'] - of_cpu.logs['entropy'])), 1e-4)

    for dtype, limit in (('float32', 1e-5), ('bfloat16', BOUND / 10)):
        report(f'KL of sampler and trainer in {dtype}, nats per token', noise(bench.sizes, dtype), limit)


def noise(sizes: Sizes, dtype: str) -> float:
    """Mean KL between what the trainer says of responses and what the sampler recorded, with the same parameters."""
    config = model_for(sizes.small, dtype)
    params = decoders.init(config, jax.random.key(1))
    params = params | {'embedding': 6 * params['embedding']}  # as peaked as a language model
    sampler, prompts, keys = engine(config, sizes, slots=4 * sizes.samples, room=sizes.response)
    rollout = jax.tree.map(np.asarray, sampler(params, prompts, keys)._replace(work=None))
    responses = len(rollout.response_lengths)
    layout = make_layout(rollout, batch_shape(responses, sizes.prompt_room + sizes.response))
    weights = np.full(responses, 1.0, np.float32)
    batch = make_batch(rollout, weights, weights, layout)
    return float(make_recompute(config, **POLICY)(params, batch)[1])


def engine(config: decoders.DecoderConfig, sizes: Sizes, slots: int, room: int):
    """A sampler, and the prompts and keys for one response in each of its slots."""
    sampler = make_sampler(
        config,
        samples_per_prompt=sizes.samples,
        max_response_length=room,
        temperature=1.0,
        stop_tokens=[config.vocab_size],  # never sampled: responses have the length that they are given
        max_tokens=KEPT,
        mass=MASS,
        slots=slots,
    )
    count = slots // sizes.samples
    prompts = random_prompts(count, *sizes.prompt, sizes.prompt_room, config.vocab_size)
    return sampler, prompts, jax.random.split(jax.random.key(2), count)


def decode(bench: Bench) -> None:
    sizes, config = bench.sizes, model_for(bench.sizes.model)
    params = decoders.init(config, jax.random.key(0), one_device())
    bandwidth = copy_bandwidth(sizes.repeats, sizes.copied)

    def measure(slots: int, room: int) -> None:
        sampler, prompts, keys = engine(config, sizes, slots, room)
        sample = lambda length: sampler(params, prompts, keys, jnp.full(slots, length, jnp.int32))
        jax.block_until_ready(sample(2))
        works = [jax.block_until_ready(sample(sizes.response)).work for _ in range(sizes.repeats)]
        median = lambda name: float(np.median([getattr(work, name) for work in works]))
        steps, seconds, limits = int(works[0].steps), median('decode_seconds'), np.full(slots, sizes.response)
        floor = decode_bytes(config, params, prompts, limits, steps) / bandwidth
        bench.report(
            {
                'what': f'decode, {slots} slots',
                'slots': slots,
                'room': room,
                'tokens_per_second': slots * sizes.response / seconds,
                'ms_per_step': 1e3 * seconds / steps,
                'share_of_floor': floor / seconds,
                'prefill_tokens_per_second': float(np.sum(prompts.lengths)) / median('prefill_seconds'),
            }
        )
        with bench.trace(f'decode_{slots}'):
            if bench.profile is not None:
                jax.block_until_ready(sample(16))

    for slots in sizes.slots:
        first_that_fits(sizes.rooms, functools.partial(measure, slots))


def update(bench: Bench) -> None:
    sizes, optimizer = bench.sizes, adamw()
    best, peak, first = model_for(sizes.model), matmul_rate(sizes.repeats, sizes.product), {}
    # Clip is first: peaks of memory are those of a process, and TROLL's is the larger one.
    kinds = {'Clip': (ppo_clip, best), 'TROLL': (troll, best)}
    if best.attention != 'xla':
        kinds['TROLL, attention by XLA'] = troll, dataclasses.replace(best, attention='xla')

    def measure(objective, config, rows: int) -> dict[str, Any]:
        shape = BatchShape(2, rows, sizes.row_tokens)
        shapes = abstract_state(config, optimizer, one_device())
        state = start_state(decoders.init(config, jax.random.key(0), one_device()), optimizer, shapes)
        batch = place(jax.tree.map(np.asarray, random_batch(shape, config.vocab_size)), one_device(), (None, 'batch'))
        traced = make_update(config, optimizer, objective=objective, **POLICY).trace(state, batch)
        compiled = traced.lower().compile()
        times = []
        for _ in range(sizes.repeats + 1):
            begin = time.perf_counter()
            state, log = jax.block_until_ready(compiled(state, batch))
            times.append(time.perf_counter() - begin)
        with bench.trace(f'update_{objective.__name__}_{config.attention}'):
            if bench.profile is not None:
                jax.block_until_ready(compiled(state, batch))
        once, per_micro_batch = count_flops(traced.jaxpr.jaxpr, 1)
        seconds, tokens = float(np.median(times[1:])), int(np.prod(shape))
        measured = (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')  # not of a CPU
        memory = {} if measured is None else {'peak_gb': measured / 1e9}
        return memory | {
            'rows': rows,
            'seconds': seconds,
            'tokens_per_second': tokens / seconds,
            'share_of_matmul': (once + shape.micro_batches * per_micro_batch) / seconds / peak,
            'planned_gb': bytes_needed(compiled) / 1e9,
            'finite': bool(np.isfinite(log.metrics['loss'])),
        }

    for name, (objective, config) in kinds.items():
        # All with the rows that the first one fitted with.
        rows = [first['rows']] if first else sizes.rows
        result = first_that_fits(rows, functools.partial(measure, objective, config))
        first = first or result
        compared = [key for key in ('seconds', 'peak_gb', 'planned_gb') if key in result]
        over_clip = {f'{key}_over_clip': result[key] / first[key] for key in compared}
        bench.report({'what': f'update, {name}', 'attention': config.attention} | result | over_clip)


def head(bench: Bench) -> None:
    config = dataclasses.replace(model_for(bench.sizes.model), layers=0)
    params = decoders.init(config, jax.random.key(0))

    def measure(rows: int) -> None:
        batch, first = random_batch(BatchShape(1, rows, 320), config.vocab_size), None
        gradients = {
            'Clip': make_gradient(config, objective=ppo_clip, **POLICY),
            'TROLL': make_gradient(config, objective=troll, **POLICY),
            'Clip, plain logits': plain_clip_gradient(config),
        }
        for name, gradient in gradients.items():
            compiled = jax.jit(gradient).lower(params, START, batch).compile()
            seconds = median_seconds(compiled, params, START, batch, repeats=bench.sizes.repeats)
            first = first or seconds
            bench.report(
                {
                    'what': f'head, {name}',
                    'tokens': rows * 256,
                    'ms': 1e3 * seconds,
                    'ms_over_clip': seconds / first,
                    'temporary_gb': compiled.memory_analysis().temp_size_in_bytes / 1e9,
                }
            )

    first_that_fits(bench.sizes.head_rows, measure)


def projection(bench: Bench) -> None:
    bandwidth = copy_bandwidth(bench.sizes.repeats, bench.sizes.copied)
    for tokens in bench.sizes.projected:
        new, old = violating_tokens(tokens, 64, BOUND)
        solve = jax.jit(jax.vmap(functools.partial(troll_jax.project, bound=BOUND)))
        seconds = median_seconds(solve, new, old, repeats=bench.sizes.repeats, calls=20)
        evaluations = np.asarray(solve(new, old).evaluations)
        bench.report(
            {
                'what': f'projection, {tokens} x 64',
                'ms': 1e3 * seconds,
                'share_of_floor': 3 * new.nbytes / bandwidth / seconds,  # two are read, one is written
                'mean_evaluations': float(evaluations.mean()),
                'max_evaluations': int(evaluations.max()),
            }
        )


def step(bench: Bench) -> None:
    sizes, mesh, config = bench.sizes, one_device(), model_for(bench.sizes.model)
    optimizer = adamw()
    # One character for each token, so that what random weights say is a text.
    tokenizer = character_tokenizer(''.join(chr(0x10000 + i) for i in range(config.vocab_size - 2)))
    task = GSM8K()

    def measure(prompts: int) -> None:
        responses, room = prompts * sizes.samples, sizes.prompt_room + sizes.response
        tokens, lengths = map(
            np.asarray, random_prompts(4 * prompts, *sizes.prompt, sizes.prompt_room, config.vocab_size)
        )
        learner = make_learner(
            config,
            optimizer,
            batch_shape(responses, room),
            objective=troll,
            aggregation=token_mean,
            estimator=group_normalised,
            minibatch=responses,
            max_response_length=sizes.response,
            mesh=mesh,
            **POLICY,
        )
        sampler, _, _ = engine(config, sizes, responses, sizes.response)
        state = learner.start(decoders.init(config, jax.random.key(0), mesh))
        with Grader(task.grade, deadline=task.deadline) as grader:
            grader.start()
            collect = make_collector(
                sampler,
                PromptSet(tokens, lengths, ['1'] * len(lengths), [''] * len(lengths)),
                grader,
                tokenizer,
                prompts_per_step=prompts,
                max_response_length=sizes.response,
                rewards=[('task', 1.0, task_reward)],
                seed=0,
                mesh=mesh,
            )
            for i in range(2):  # the first one compiles
                with bench.trace('step') if i else contextlib.nullcontext():
                    begin = time.perf_counter()
                    experience = collect(state.params, int(state.progress.draws))
                    collected = time.perf_counter()
                    state, _, _ = jax.block_until_ready(learner.learn(state, experience))
                    end = time.perf_counter()
        seconds = {name.removeprefix('seconds/'): x for name, x in experience.logs.items() if name.startswith('sec')}
        bench.report(
            {
                'what': f'step, {responses} responses of {sizes.response}',
                'responses': responses,
                'seconds': end - begin,
                'tokens_per_second': responses * sizes.response / (end - begin),
                'seconds_update': end - collected,
                **{f'seconds_{name}': float(x) for name, x in seconds.items()},
            }
        )

    first_that_fits(sizes.step_prompts, measure)


# Name → function, and the share of the time after which the process is ended.
PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {
    'ceilings': (ceilings, 0.1),
    'numerics': (numerics, 0.25),
    'decode': (decode, 0.4),
    'update': (update, 0.35),
    'head': (head, 0.15),
    'projection': (projection, 0.1),
    'step': (step, 0.25),
}


def run_part(name: str, out: Path, profile: bool) -> None:
    """Runs a part in this process; every measurement is written as soon as it is made."""
    sizes = TINY if jax.default_backend() == 'cpu' else Sizes()
    with (out / f'{name}.jsonl').open('w') as file, jax.set_mesh(one_device()):

        def report(row: dict[str, Any]) -> None:
            print(json.dumps({'part': name} | row), file=file, flush=True)

        PARTS[name][0](Bench(sizes, report, out / 'profile' if profile else None))


def run_parts(names: Sequence[str], out: Path, minutes: float, profile: bool) -> Iterator[dict[str, Any]]:
    """Runs parts in processes of their own and yields their measurements, and a row for each that failed."""
    end = time.monotonic() + 60 * minutes
    for name in names:
        limit = min(60 * minutes * PARTS[name][1], end - time.monotonic())
        if limit < 1:
            yield {'part': name, 'what': name, 'failed': 'no time was left; raise --minutes, or choose parts by --only'}
            continue
        found, log = out / f'{name}.jsonl', out / f'{name}.log'
        found.unlink(missing_ok=True)
        command = [sys.executable, '-m', 'experiments.benchmarks.device', '--out', str(out), '--part', name]
        failed, begin = None, time.monotonic()
        with log.open('w') as file:
            try:
                result = subprocess.run(
                    command + ['--profile'] * profile, stdout=file, stderr=subprocess.STDOUT, timeout=limit
                )
                if result.returncode:
                    failed = f'status {result.returncode}: {last_error(log)} (all of it in {log.name})'
            except subprocess.TimeoutExpired:
                failed = f'ended after {limit:.0f} s; raise --minutes'
        yield from map(json.loads, found.read_text().splitlines() if found.exists() else ())
        if failed:
            yield {'part': name, 'what': name, 'failed': failed}
        print(f'{name}: {time.monotonic() - begin:.0f} s{", " + failed if failed else ""}', file=sys.stderr, flush=True)


def last_error(log: Path) -> str:
    """The line of a log that most likely says why a process ended."""
    lines = [line.strip() for line in log.read_text(errors='replace').splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r'[\w.]*(Error|Exception)\b', line)]
    return ([*lines[-1:], *errors[-1:]] or ['nothing was printed'])[-1][:500]


def describe_machine() -> dict[str, Any]:
    """What figures are to be read with. By a process of its own: one that has touched a device keeps it from others."""
    code = 'import jax, json; d = jax.devices(); print(json.dumps([d[0].platform, d[0].device_kind, len(d)]))'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    if result.returncode:
        raise RuntimeError(f'JAX finds no device:\n{result.stderr}')
    kind, device, count = json.loads(result.stdout.splitlines()[-1])
    packages = {name: version(name) for name in ('jax', 'jaxlib', 'flax', 'optax')}
    machine = {'device': device, 'platform': kind, 'devices': count, 'cores': os.cpu_count()}
    return machine | {'date': time.strftime('%Y-%m-%d'), 'python': platform.python_version()} | packages


def print_table(machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Markdown, as docs/accelerators.md keeps it."""
    print(', '.join(f'{name} {value}' for name, value in machine.items()), '\n')
    print('| what | figures |\n| --- | --- |')
    for row in rows:
        figures = {name: x for name, x in row.items() if name not in ('part', 'what')}
        number = lambda x: f'{x:.4g}' if isinstance(x, float) else str(x)
        print(f'| {row["what"]} |', ', '.join(f'{name} {number(x)}' for name, x in figures.items()), '|')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='a folder for results.json, logs and traces')
    parser.add_argument('--minutes', type=float, default=8.0, help='after which what is left is not begun')
    parser.add_argument('--only', nargs='+', default=[], help=f'some of {", ".join(PARTS)}')
    parser.add_argument('--profile', action='store_true', help='writes a trace of one call of decode, update and step')
    parser.add_argument('--part', choices=PARTS, help=argparse.SUPPRESS)  # what the processes are started with
    arguments = parser.parse_args()
    chosen = ','.join(arguments.only).split(',') if arguments.only else list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        parser.error(f'no part {", ".join(sorted(unknown))}; expected some of {", ".join(PARTS)}')
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        return run_part(arguments.part, arguments.out, arguments.profile)
    # As much of a GPU's memory as a training would be given.
    os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.92')
    platforms = os.environ.get('JAX_PLATFORMS')
    if platforms and 'cpu' not in platforms.split(','):
        os.environ['JAX_PLATFORMS'] = f'{platforms},cpu'  # which the references are made on
    machine = describe_machine()
    parts = [name for name in PARTS if name in chosen]
    rows = list(run_parts(parts, arguments.out, arguments.minutes, arguments.profile))
    result = {'machine': machine, 'rows': rows}
    (arguments.out / 'results.json').write_text(json.dumps(result, indent=1))
    print_table(machine, rows)
    print(json.dumps(result))
    sys.exit(any('failed' in row for row in rows))


if __name__ == '__main__':
    main()
