"""Does the time to compile an update grow with depth?

    python -m experiments.benchmarks.compile_time [--repeats 5]

Compiles the update of TROLL for a model of Qwen3-0.6B's sizes with 4 and with 28 layers, in turns, for this machine's
default device and without JAX's cache of compiled programs. Tracing counts too. The last line is one line of JSON: the
ratio of the medians.
"""

import argparse
import json
import statistics
import time
from functools import partial

import jax

from experiments.benchmarks.measure import KEPT, PROMPT, RESPONSE, qwen3_0_6b, random_batch
from troll_jax.models import decoder as decoders
from troll_jax.ops.losses import troll
from troll_jax.ops.support import default_tail
from troll_jax.optimizer import adamw
from troll_jax.packing import BatchShape
from troll_jax.score import Scoring
from troll_jax.types import START, TrainState
from troll_jax.update import make_update

FEW, MANY = 4, 28


def lower_update(layers: int, responses: int = 8) -> jax.stages.Lowered:
    """The update for a model of this depth, traced and not yet compiled."""
    config, optimizer = qwen3_0_6b(layers=layers, compute_dtype='float32'), adamw()
    update = make_update(config, optimizer, troll, Scoring(1.0, default_tail, KEPT, 1 - 1e-5))
    _, params = decoders.abstract(config)
    progress = jax.eval_shape(lambda: START)
    state = TrainState(progress, params, jax.eval_shape(optimizer.init, params))
    return update.lower(
        state, jax.eval_shape(partial(random_batch, BatchShape(1, responses, PROMPT + RESPONSE), config.vocab_size))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=5)
    repeats = parser.parse_args().repeats
    jax.config.update('jax_enable_compilation_cache', False)
    times = {FEW: [], MANY: []}
    for repeat in range(repeats + 1):
        for layers, seconds in times.items():
            jax.clear_caches()
            begin = time.perf_counter()
            lower_update(layers).compile()
            if repeat:  # the first one loads libraries
                seconds.append(time.perf_counter() - begin)
    medians = {layers: statistics.median(seconds) for layers, seconds in times.items()}
    for layers, seconds in times.items():
        print(f'{layers:2} layers: median {medians[layers]:.2f} s of', ', '.join(f'{s:.2f}' for s in seconds))
    print(json.dumps({f'compile_time_{MANY}_over_{FEW}': round(medians[MANY] / medians[FEW], 4)}))


if __name__ == '__main__':
    main()
