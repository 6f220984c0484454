"""Cost of an update: TROLL and Clip with the sparse head, and Clip with plain [N, V] logits; one run, one machine.

    python -m experiments.benchmarks.update [--layers 2] [--tokens 8192] [--timed-tokens 256] [--repeats 5]

The model has the width and the vocabulary of Qwen3-0.6B. Memory and FLOPs are XLA's own analysis of the update that
`experiments.train` runs, compiled for `--tokens` response tokens; time is measured with `--timed-tokens` of them, all
kinds in turn, medians. Plain Clip is what a program does that has no such head: log-softmax of all logits at once. The
last line of the output is one line of JSON.
"""

import argparse
import json
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.measure import KEPT, PROMPT, RESPONSE, qwen3_0_6b, random_batch
from troll_jax.learn import abstract_state, start_state
from troll_jax.models import decoder as decoders
from troll_jax.models.head import logits
from troll_jax.ops.losses import LossInputs, ppo_clip, troll
from troll_jax.ops.support import bucket_tail, default_tail
from troll_jax.optimizer import adamw
from troll_jax.packing import BatchShape
from troll_jax.score import Scoring
from troll_jax.sharding import one_device_mesh, place
from troll_jax.types import Batch, TrainState
from troll_jax.update import make_update


def plain_clip_gradient(config):
    """gradient(params, progress, batch) of Clip as it is usually written: log-softmax over [N, V], gather the sampled.

    For batches of one micro-batch and of one sequence in a row.
    """
    graphdef, _ = decoders.abstract(config)

    def gradient(params, progress, batch: Batch):
        def loss(params):
            decoder = decoders.bind(graphdef, params)
            rows = jax.tree.map(lambda x: x[0], batch)
            hidden = decoder(rows.tokens, rows.positions, rows.segment_ids)[:, PROMPT - 1 : -1]
            scores = logits(hidden, decoder.unembedding, temperature=1.0, dtype=config.compute_dtype)
            response = jax.tree.map(lambda x: x[:, PROMPT:], rows)
            log_probs = jnp.take_along_axis(jax.nn.log_softmax(scores), response.tokens[:, :, None], axis=2)[:, :, 0]
            row = LossInputs(
                response.tokens,
                response.segment_ids,
                log_probs,
                response.old_log_probs,
                response.old,
                response.old,
                None,
            )
            return jnp.mean(jax.vmap(ppo_clip)(row, response.advantages).loss)

        return jax.grad(loss)(params)

    return gradient


def plain_clip_update(config, optimizer):
    gradient = plain_clip_gradient(config)

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, batch: Batch):
        changes, opt_state = optimizer.update(
            gradient(state.params, state.progress, batch), state.opt_state, state.params
        )
        return TrainState(state.progress, optax.apply_updates(state.params, changes), opt_state), None

    return update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--layers', type=int, default=2)
    parser.add_argument('--tokens', type=int, default=8192, help='of responses, for memory; a multiple of 256')
    parser.add_argument('--timed-tokens', type=int, default=256, help='of responses, for time; 0 measures no time')
    parser.add_argument('--head-chunk', type=int, default=1024)
    parser.add_argument('--dtype', default='float32', help='of the products; a CPU has no use for bfloat16')
    parser.add_argument('--repeats', type=int, default=5)
    arguments = parser.parse_args()

    config, optimizer = qwen3_0_6b(layers=arguments.layers, compute_dtype=arguments.dtype), adamw(learning_rate=1e-6)
    updates = {
        f'{objective.__name__}, {rule.__name__}': make_update(
            config, optimizer, objective, Scoring(1.0, rule, KEPT, 1 - 1e-5, arguments.head_chunk)
        )
        for rule in (default_tail, bucket_tail)
        for objective in (troll, ppo_clip)
    }
    updates['ppo_clip, plain logits'] = plain_clip_update(config, optimizer)

    mesh = one_device_mesh()
    jax.set_mesh(mesh)
    shapes = abstract_state(config, optimizer, mesh)
    shape_of = lambda tokens: BatchShape(1, tokens // RESPONSE, PROMPT + RESPONSE)
    batch_shapes = jax.eval_shape(partial(random_batch, shape_of(arguments.tokens), config.vocab_size))
    memory, flops = {}, {}
    for name, update in updates.items():
        compiled = update.lower(shapes, batch_shapes).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        flops[name] = compiled.cost_analysis()['flops']

    times = {name: [] for name in updates}
    if arguments.timed_tokens:
        batch = jax.tree.map(np.asarray, random_batch(shape_of(arguments.timed_tokens), config.vocab_size))
        batch = place(batch, mesh)
        state = start_state(decoders.init(config, jax.random.key(1), mesh), optimizer, shapes)
        for repeat in range(arguments.repeats + 1):
            for name, update in updates.items():
                begin = time.perf_counter()
                state, _ = jax.block_until_ready(update(state, batch))
                if repeat:  # the first call compiles
                    times[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(x) if x else float('nan') for name, x in times.items()}
    print(f'{arguments.tokens} tokens: temporary memory, FLOPs (loops counted once); {arguments.timed_tokens}: time')
    for name in updates:
        print(f'{name:24} {memory[name] / 2**20:9.1f} MiB {flops[name]:.3e} {medians[name]:8.3f} s')
    result = {}
    for rule in ('default_tail', 'bucket_tail'):
        ours, clip, plain = f'troll, {rule}', f'ppo_clip, {rule}', 'ppo_clip, plain logits'
        suffix = '' if rule == 'default_tail' else '_bucket'
        result |= {
            f'time_troll_over_clip{suffix}': medians[ours] / medians[clip],
            f'time_troll_over_plain_clip{suffix}': medians[ours] / medians[plain],
            f'memory_troll_over_clip{suffix}': memory[ours] / memory[clip],
            f'memory_troll_over_plain_clip{suffix}': memory[ours] / memory[plain],
        }
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == '__main__':
    main()
