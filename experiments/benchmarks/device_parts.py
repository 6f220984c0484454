"""The parts of `experiments.benchmarks.device`, which runs each in a process of its own and says what they are.

python -m experiments.benchmarks.device_parts ceilings --out results [--profile]
"""

import argparse
import dataclasses
import functools
import gc
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import troll_jax
from experiments.benchmarks.attention import compare_attention
from experiments.benchmarks.measure import (
    KEPT,
    copy_bandwidth,
    decode_bytes,
    matmul_rate,
    median_seconds,
    plain_clip_gradient,
    qwen3_0_6b,
    random_batch,
    random_prompts,
    relative_distance,
)
from experiments.benchmarks.projection import violating_tokens
from experiments.studies.program_cost import bytes_needed, count_flops
from experiments.train import training_step
from troll_jax.collect import make_collector
from troll_jax.data.prompts import PromptSet
from troll_jax.data.tasks.gsm8k import GSM8K
from troll_jax.data.tokenizer import character_tokenizer
from troll_jax.learn import Learner, abstract_state, start_state
from troll_jax.models import decoder as decoders
from troll_jax.models.attention import IMPLEMENTATIONS
from troll_jax.ops.advantages import group_normalised
from troll_jax.ops.aggregation import token_mean
from troll_jax.ops.losses import ppo_clip, troll
from troll_jax.ops.support import default_tail
from troll_jax.optimizer import adamw
from troll_jax.packing import BatchShape, batch_shape, make_batch, make_layout
from troll_jax.rewards.pool import Grader
from troll_jax.rollout import Sampler
from troll_jax.score import Scoring, make_recompute
from troll_jax.settings import Compute, Method, Sampling
from troll_jax.sharding import make_mesh, place
from troll_jax.types import START
from troll_jax.update import make_gradient, make_update

BOUND, MASS = 0.05, 1 - 1e-5
PEAKED = 3.5  # times the embedding of new weights
SCORING = Scoring(1.0, default_tail, KEPT, MASS, head_chunk=2048)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """For an accelerator; a CPU takes `TINY`. Of sizes in a row the first that fits into memory is taken."""

    model: decoders.DecoderConfig = qwen3_0_6b()
    small: decoders.DecoderConfig = qwen3_0_6b(vocab_size=8192, width=256, layers=4, heads=8, kv_heads=4, mlp_width=768)
    copied: int | None = None  # bytes; None: more than any cache holds
    product: int = 8192  # rows and columns
    slots: tuple[int, ...] = (512, 256, 128, 64)
    rooms: tuple[int, ...] = (2048, 1024, 512)  # the longest response; pools of pages are made for it
    response: int = 256  # tokens of all responses
    prompt_room: int = 512
    prompt: tuple[int, int] = (64, 192)  # shortest and longest
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
    slots=(8, 4),
    rooms=(16,),
    response=8,
    prompt_room=16,
    prompt=(4, 12),
    samples=4,
    row_tokens=640,
    rows=(1,),
    head_rows=(2,),
    projected=(64, 128),
    step_prompts=(2,),
    repeats=2,
)


class Bench(NamedTuple):
    """The sizes of a part, and the function that it reports to."""

    sizes: Sizes
    report: Callable[..., None]  # (what, **figures)
    profile: Path | None = None  # a folder for traces

    def trace(self, name: str, function: Callable[[], Any]) -> None:
        """Calls a function once more for a trace, if one was asked for."""
        if self.profile is not None:
            with jax.profiler.trace(self.profile / name):
                jax.block_until_ready(function())


def one_device(device: jax.Device | None = None) -> jax.sharding.Mesh:
    return make_mesh(1, 1, 1, [device or jax.devices()[0]])


def model_for(config: decoders.DecoderConfig, dtype: str = 'bfloat16') -> decoders.DecoderConfig:
    """With the attention that training would choose on this device."""
    return decoders.with_best_kernels(dataclasses.replace(config, compute_dtype=dtype), jax.devices()[0])


def first_that_fits(sizes: Sequence[int], run: Callable[[int], Any]) -> Any:
    """The result of `run` for the first of these sizes for which memory suffices."""
    for size in sizes:
        try:
            return run(size)
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error) or size == sizes[-1]:
                raise
        gc.collect()  # frees what the failed attempt held


def ceilings(bench: Bench) -> None:
    sizes = bench.sizes
    copy, product = copy_bandwidth(sizes.repeats, sizes.copied), matmul_rate(sizes.repeats, sizes.product)
    bench.report('ceilings', copy_gb_per_s=copy / 1e9, matmul_tflops=product / 1e12)


def numerics(bench: Bench) -> None:
    """Errors, each with the limit that it must not pass."""
    cpu, sizes = jax.devices('cpu')[0], bench.sizes

    def report(what: str, error: float, limit: float) -> None:
        bench.report(what, error=float(error), limit=limit, passed=bool(error <= limit))

    new, old = (np.asarray(x) for x in violating_tokens(sizes.projected[0], 64, BOUND))
    solve = lambda new, old: jax.vmap(functools.partial(troll_jax.project, bound=BOUND))(new, old)
    ours = jax.tree.map(np.asarray, jax.jit(solve)(new, old))
    with jax.set_mesh(one_device(cpu)), jax.default_device(cpu), jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, jax.jit(solve)(new.astype(np.float64), old.astype(np.float64)))
    kl = np.sum(np.exp(ours.log_probs, dtype=np.float64) * (ours.log_probs.astype(np.float64) - old), axis=1)
    report('projection: KL over the bound, relative', np.maximum(0.0, np.max(kl / BOUND - 1)), 1e-5)
    report('projection: probabilities', np.max(np.abs(np.exp(ours.log_probs) - np.exp(exact.log_probs))), 1e-3)
    report('projection: not converged', np.mean(~ours.converged), 0.0)

    # The gradient of the whole: decoder, head, tail rule, projection.
    config = dataclasses.replace(sizes.small, compute_dtype='float32')
    params = jax.tree.map(np.asarray, peaked_params(config))
    batch = jax.tree.map(np.asarray, random_batch(BatchShape(2, 2, 640), config.vocab_size))
    gradient = make_gradient(config, troll, SCORING)

    def on(device: jax.Device):
        with jax.set_mesh(one_device(device)), jax.default_device(device):
            return jax.tree.map(np.asarray, jax.jit(gradient)(*jax.device_put((params, START, batch), device)))

    ours, exact = on(jax.devices()[0]), on(cpu)
    report('gradient in float32, relative', relative_distance(ours.params, exact.params), 1e-4)
    of_head = lambda gradient: gradient.params['embedding']  # which is tied to it
    report('gradient of the head in float32, relative', relative_distance(of_head(ours), of_head(exact)), 1e-4)
    report('entropies in float32, nats', np.max(np.abs(ours.logs['entropy'] - exact.logs['entropy'])), 1e-4)

    # On a CPU, in the larger sizes, these are 1e-12 and 5e-5; products in TF32 would give some 1e-6.
    for dtype, limit in (('float32', 1e-9), ('bfloat16', BOUND / 100)):
        report(f'KL of sampler and trainer in {dtype}, nats per token', noise(sizes, dtype), limit)


def peaked_params(config: decoders.DecoderConfig) -> dict[str, Any]:
    """New weights whose distributions have an entropy of some nats, where those of `init` are nearly uniform."""
    params = decoders.init(config, jax.random.key(1))
    return params | {'embedding': PEAKED * params['embedding']}


def noise(sizes: Sizes, dtype: str) -> float:
    """Mean KL(sampler ‖ trainer) with the same parameters, from the sampled tokens (k3, Schulman 2020)."""
    config = model_for(sizes.small, dtype)
    params = peaked_params(config)
    sampler, prompts, keys = engine(config, sizes, slots=4 * sizes.samples, room=sizes.response)
    rollout = jax.tree.map(np.asarray, sampler(params, prompts, keys)._replace(stats=None))
    responses = len(rollout.response_lengths)
    layout = make_layout(rollout, batch_shape(responses, sizes.prompt_room + sizes.response))
    weights = np.ones(responses, np.float32)
    batch = make_batch(rollout, weights, weights, layout)
    recomputed, _, _ = make_recompute(config, SCORING)(params, batch)
    gap = np.float64(recomputed.old_log_probs)[batch.loss_weights > 0] - batch.old_log_probs[batch.loss_weights > 0]
    return float(np.mean(np.expm1(gap) - gap))


def engine(config: decoders.DecoderConfig, sizes: Sizes, slots: int, room: int):
    """A sampler, and the prompts and keys for one response in each of its slots."""
    sampler = Sampler(
        config,
        samples_per_prompt=sizes.samples,
        max_response_length=room,
        temperature=1.0,
        stop_tokens=[config.vocab_size],  # never sampled: responses have the length that they are given
        support_size=KEPT,
        support_mass=MASS,
        slots=slots,
    )
    count = slots // sizes.samples
    prompts = random_prompts(count, *sizes.prompt, sizes.prompt_room, config.vocab_size)
    return sampler, prompts, jax.random.split(jax.random.key(2), count)


def decode(bench: Bench) -> None:
    sizes, config = bench.sizes, model_for(bench.sizes.model)
    params = decoders.init(config, jax.random.key(0), one_device())
    bandwidth = copy_bandwidth(sizes.repeats, sizes.copied)

    def measure(slots: int, room: int) -> int:
        sampler, prompts, keys = engine(config, sizes, slots, room)
        sample = lambda length: jax.block_until_ready(sampler(params, prompts, keys, jnp.full(slots, length)))
        sample(2)
        works = [sample(sizes.response).stats for _ in range(sizes.repeats)]
        median = lambda name: float(np.median([getattr(work, name) for work in works]))
        steps, seconds, limits = int(works[0].steps), median('decode_seconds'), np.full(slots, sizes.response)
        bench.report(
            f'decode, {slots} slots',
            room=room,
            tokens_per_second=slots * sizes.response / seconds,
            ms_per_step=1e3 * seconds / steps,
            share_of_floor=decode_bytes(config, params, prompts, limits, steps) / bandwidth / seconds,
            prefill_tokens_per_second=float(np.sum(prompts.lengths)) / median('prefill_seconds'),
        )
        bench.trace(f'decode_{slots}', lambda: sample(16))
        return room

    # All with the room that the most slots leave.
    most, *fewer = sizes.slots
    room = first_that_fits(sizes.rooms, functools.partial(measure, most))
    for slots in fewer:
        measure(slots, room)


def update(bench: Bench) -> None:
    sizes, optimizer, best = bench.sizes, adamw(), model_for(bench.sizes.model)
    peak = matmul_rate(sizes.repeats, sizes.product)
    memory = lambda: (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use', 0)  # of a CPU nothing is known

    def measure(name: str, objective, config, rows: int, clip: dict[str, Any] | None = None) -> dict[str, Any]:
        shape, before = BatchShape(2, rows, sizes.row_tokens), memory()
        shapes = abstract_state(config, optimizer, one_device())
        state = start_state(decoders.init(config, jax.random.key(0), one_device()), optimizer, shapes)
        batch = place(jax.tree.map(np.asarray, random_batch(shape, config.vocab_size)), one_device())
        traced = make_update(config, optimizer, objective, SCORING).trace(state, batch)
        compiled = traced.lower().compile()
        times = []
        for _ in range(sizes.repeats + 1):
            begin = time.perf_counter()
            state, log = jax.block_until_ready(compiled(state, batch))
            times.append(time.perf_counter() - begin)
        after = memory()
        once, per_micro_batch = count_flops(traced.jaxpr.jaxpr, 1)
        seconds, tokens = float(np.median(times[1:])), int(np.prod(shape))
        result = {
            'rows': rows,
            'seconds': seconds,
            'tokens_per_second': tokens / seconds,
            # At most a twentieth too high: chunks of the head that hold nothing but prompts count, and are skipped.
            'share_of_matmul': (once + shape.micro_batches * per_micro_batch) / seconds / peak,
            'planned_gb': bytes_needed(compiled) / 1e9,
            'finite': bool(np.isfinite(log.metrics['loss'])),
        }
        # The peak of a process: it is this program's if it has grown.
        result |= {'peak_gb': after / 1e9} if after > before else {}
        compared = [key for key in ('seconds', 'peak_gb', 'planned_gb') if clip and key in clip and key in result]
        over_clip = {f'{key}_over_clip': result[key] / clip[key] for key in compared}
        bench.report(f'update, {name}', attention=config.attention, **result, **over_clip)
        bench.trace(f'update_{objective.__name__}_{config.attention}', lambda: compiled(state, batch))
        return result

    def clip_and_troll(rows: int) -> int:
        clip = measure('Clip', ppo_clip, best, rows)  # first, because TROLL needs more
        measure('TROLL', troll, best, rows, clip)
        return rows

    rows = first_that_fits(sizes.rows, clip_and_troll)
    if best.attention != 'xla':
        plain = dataclasses.replace(best, attention='xla')
        fewer = [size for size in sizes.rows if size <= rows]
        first_that_fits(fewer, functools.partial(measure, 'TROLL, attention by XLA', troll, plain))


def attention(bench: Bench) -> None:
    config, sizes = model_for(bench.sizes.model), bench.sizes

    def measure(rows: int) -> None:
        for name, figures in compare_attention(config, rows, sizes.row_tokens, sizes.repeats):
            used = {'passed': figures['error'] < 0.02} if name in IMPLEMENTATIONS else {}
            bench.report(f'attention, {name}', rows=rows, **figures, **used)

    first_that_fits(sizes.rows, measure)


def head(bench: Bench) -> None:
    config = dataclasses.replace(model_for(bench.sizes.model), layers=0)
    params = decoders.init(config, jax.random.key(0))
    gradients = {
        'Clip': make_gradient(config, ppo_clip, SCORING),
        'TROLL': make_gradient(config, troll, SCORING),
        'Clip, plain logits': plain_clip_gradient(config),
    }

    def measure(rows: int) -> None:
        batch, of_clip = random_batch(BatchShape(1, rows, 320), config.vocab_size), None
        for name, gradient in gradients.items():
            compiled = jax.jit(gradient).lower(params, START, batch).compile()
            seconds = median_seconds(compiled, params, START, batch, repeats=bench.sizes.repeats)
            of_clip = of_clip or seconds
            temporary = compiled.memory_analysis().temp_size_in_bytes
            figures = {'ms': 1e3 * seconds, 'ms_over_clip': seconds / of_clip, 'temporary_gb': temporary / 1e9}
            bench.report(f'head, {name}', tokens=rows * 256, **figures)

    first_that_fits(bench.sizes.head_rows, measure)


def projection(bench: Bench) -> None:
    bandwidth = copy_bandwidth(bench.sizes.repeats, bench.sizes.copied)
    solve = jax.jit(jax.vmap(functools.partial(troll_jax.project, bound=BOUND)))
    for tokens in bench.sizes.projected:
        new, old = violating_tokens(tokens, 64, BOUND)
        seconds = median_seconds(solve, new, old, repeats=bench.sizes.repeats, calls=20)
        evaluations = np.asarray(solve(new, old).evaluations)
        bench.report(
            f'projection, {tokens} x 64',
            ms=1e3 * seconds,
            share_of_floor=3 * new.nbytes / bandwidth / seconds,  # two are read, one is written
            mean_evaluations=float(evaluations.mean()),
            max_evaluations=int(evaluations.max()),
        )


def step(bench: Bench) -> None:
    sizes, mesh, config = bench.sizes, one_device(), model_for(bench.sizes.model)
    # One character for each token, so that what random weights say is a text.
    tokenizer = character_tokenizer(''.join(chr(0x10000 + i) for i in range(config.vocab_size - 2)))
    task = GSM8K()

    def measure(prompts: int) -> None:
        responses = prompts * sizes.samples
        tokens, lengths = map(
            np.asarray, random_prompts(4 * prompts, *sizes.prompt, sizes.prompt_room, config.vocab_size)
        )
        is_token = np.arange(sizes.prompt_room) < lengths[:, None]
        data = PromptSet(tokens[is_token], lengths, ['1'] * 4 * prompts, sizes.prompt_room)
        sampling = Sampling(
            prompts_per_step=prompts, samples_per_prompt=sizes.samples, support_size=KEPT, support_mass=MASS
        )
        method = Method(
            objective=troll,
            advantages=group_normalised,
            aggregation=token_mean,
            tail_rule=default_tail,
            optimizer=adamw,
            minibatch_prompts=prompts,
        )
        learner = Learner(
            config,
            sampling,
            method,
            Compute(devices=list(mesh.devices.flat)),
            max_prompt_length=sizes.prompt_room,
            max_response_length=sizes.response,
        )
        sampler, _, _ = engine(config, sizes, responses, sizes.response)
        state = learner.init(decoders.init(config, jax.random.key(0), mesh))
        with Grader(task.grade, deadline=task.deadline) as grader:
            grader.start()
            collect = make_collector(
                sampler,
                data,
                grader,
                tokenizer,
                sampling,
                max_response_length=sizes.response,
                rewards=method.rewards,
                mesh=mesh,
            )

            def one(state):
                begin = time.perf_counter()
                experience = collect(*learner.hand_over(state), int(state.progress.draws))()
                collected = time.perf_counter()
                state, _, _ = jax.block_until_ready(training_step(learner, state, experience))
                end = time.perf_counter()
                logs = {
                    name.replace('/', '_'): float(x) for name, x in experience.metrics.items() if 'seconds/' in name
                }
                return state, logs | {'seconds_update': end - collected, 'seconds': end - begin}

            for _ in range(2):  # the first one compiles
                state, seconds = one(state)
            rate = responses * sizes.response / seconds['seconds']
            figures = {'responses': responses, 'response_tokens': sizes.response, 'tokens_per_second': rate, **seconds}
            bench.report('step', **figures)
            bench.trace('step', lambda: one(state)[0])

    first_that_fits(sizes.step_prompts, measure)


PARTS = {part.__name__: part for part in (ceilings, numerics, decode, update, attention, head, projection, step)}


def run_part(name: str, out: Path, profile: bool) -> None:
    """Runs a part in this process; every measurement is written as soon as it is made."""
    sizes = TINY if jax.default_backend() == 'cpu' else Sizes()
    with (out / f'{name}.jsonl').open('w') as file, jax.set_mesh(one_device()):

        def report(what: str, **figures) -> None:
            figures = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in figures.items()}
            print(json.dumps({'part': name, 'what': what} | figures), file=file, flush=True)

        PARTS[name](Bench(sizes, report, out / 'profile' if profile else None))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', choices=PARTS)
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--profile', action='store_true')
    arguments = parser.parse_args()
    run_part(arguments.part, arguments.out, arguments.profile)
