"""Evaluations of κ that `troll_jax.project` needs for hostile pairs of distributions, in float32.

    python -m experiments.benchmarks.projection --pairs 1000000

About so many pairs outside of the region, at least half a million: 2 to 4,096 entries, bounds from 1e-6 to 5,
log-probabilities down to −60 and zeros on either side. The last line of the output is one line of JSON.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import kl_div, log_softmax

import troll_jax

DEFAULT_LOG_PROB = np.log(1e-12)  # of a token that a sparse distribution leaves out


def violating_tokens(tokens: int, entries: int, bound: float, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """A mix of (π̃, π_old) [N, V], all with KL(π̃ ‖ π_old) > bound.

    π_old has normal logits with a deviation from 0.5 (nearly uniform) to 8 (nearly one-hot), π̃ moves them by a normal
    step with a deviation from 0.1 to 3. Half of the tokens are the union of two sparse supports: each side keeps 4 to
    all of its most probable entries and gives the others 1e-12. Pairs inside the region are drawn again.
    """
    generator = np.random.default_rng(seed)
    kept = []
    while sum(map(len, kept)) < tokens:
        width = np.exp(generator.uniform(np.log(0.5), np.log(8), (tokens, 1)))
        change = np.exp(generator.uniform(np.log(0.1), np.log(3), (tokens, 1)))
        logits = width * generator.normal(size=(tokens, entries))
        moved = logits + change * generator.normal(size=(tokens, entries))
        pair = []
        for side in (moved, logits):
            log_probs = log_softmax(side, axis=-1)
            ranks = (-log_probs).argsort(-1).argsort(-1)
            dropped = ranks >= generator.integers(min(4, entries), entries + 1, (tokens, 1))
            dropped &= (np.arange(tokens) % 2 == 0)[:, None]
            pair.append(log_softmax(np.where(dropped, DEFAULT_LOG_PROB, log_probs), axis=-1).astype(np.float32))
        pair = np.stack(pair, axis=1)
        probs = np.exp(pair, dtype=np.float64)
        kept.append(pair[kl_div(probs[:, 0], probs[:, 1]).sum(-1) > bound])
    pairs = np.concatenate(kept)[:tokens]
    return jnp.asarray(pairs[:, 0]), jnp.asarray(pairs[:, 1])


def hostile_pairs(family: str, generator: np.random.Generator, count: int, entries: int) -> tuple[np.ndarray, ...]:
    """(π̃, π_old) [N, V] of a family of `HOSTILE`, in float64, and bounds [N]."""
    new, old = HOSTILE[family](generator, (count, entries))
    bounds = np.exp(generator.uniform(np.log(1e-6), np.log(5), count))
    return log_softmax(new, axis=-1), log_softmax(old, axis=-1), bounds


def _scale(generator: np.random.Generator, least: float, most: float, shape) -> np.ndarray:
    """A deviation for each pair [N, 1]."""
    return np.exp(generator.uniform(np.log(least), np.log(most), (shape[0], 1)))


def _peaks(generator: np.random.Generator, shape, log_floor: float) -> np.ndarray:
    """One entry above a floor, and a second one at most 5 nats below the first."""
    scores, pairs = generator.uniform(log_floor, log_floor / 2, shape), np.arange(shape[0])
    scores[pairs, generator.integers(0, shape[1], shape[0])] = generator.uniform(-5, 0, shape[0])
    scores[pairs, generator.integers(0, shape[1], shape[0])] = 0
    return scores


def _stairs(generator: np.random.Generator, shape) -> np.ndarray:
    """Six levels, up to 60 nats apart."""
    levels = -60 * generator.random((shape[0], 6))
    return np.take_along_axis(levels, generator.integers(0, 6, shape), 1) + 0.1 * generator.normal(size=shape)


def _without(generator: np.random.Generator, scores: np.ndarray) -> np.ndarray:
    """Zeros at a share of the entries, but for the most probable."""
    gone = generator.random(scores.shape) < generator.random((len(scores), 1))
    return np.where(gone & (scores < scores.max(-1, keepdims=True)), -np.inf, scores)


def _heavy(generator: np.random.Generator, shape) -> np.ndarray:
    return np.clip(_scale(generator, 0.1, 5, shape) * generator.standard_t(1.5, shape), -30, 30)


def _near(generator: np.random.Generator, old: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return old + _scale(generator, 1e-3, 10, old.shape) * generator.normal(size=old.shape), old


def _zipf(generator: np.random.Generator, shape) -> tuple[np.ndarray, np.ndarray]:
    """As a language model's: a law of powers, and a step of a tenth to one nat."""
    old = -1.5 * np.log(np.arange(1, shape[1] + 1)) + generator.normal(size=shape)
    return old + _scale(generator, 0.1, 1, shape) * generator.normal(size=shape), old


HOSTILE = {  # (generator, [N, V]) → scores of π̃ and of π_old
    'language model': _zipf,
    'uniform': lambda g, shape: (g.uniform(-30, 0, shape), g.uniform(-27.6, 0, shape)),
    'wide': lambda g, shape: (g.uniform(-60, 0, shape), g.uniform(-60, 0, shape)),
    'near': lambda g, shape: _near(g, g.uniform(-27.6, 0, shape)),
    'normal': lambda g, shape: _near(g, _scale(g, 0.05, 15, shape) * g.normal(size=shape)),
    'heavy tails': lambda g, shape: (_heavy(g, shape), _heavy(g, shape)),
    'peaks': lambda g, shape: (_peaks(g, shape, -60), _peaks(g, shape, -27.6)),
    'stairs': lambda g, shape: (_stairs(g, shape), _stairs(g, shape)),
    'stairs, near': lambda g, shape: _near(g, _stairs(g, shape)),
    'zeros in new': lambda g, shape: (_without(g, g.uniform(-30, 0, shape)), g.uniform(-27.6, 0, shape)),
    'zeros in new, near': lambda g, shape: (lambda new, old: (_without(g, new), old))(*_near(g, g.normal(size=shape))),
    'zeros in old': lambda g, shape: (g.uniform(-30, 0, shape), _without(g, g.uniform(-27.6, 0, shape))),
}


def stress(pairs: int) -> None:
    """Counts the evaluations for hostile pairs outside the region, each family with six sizes of vocabulary."""
    solve = jax.jit(jax.vmap(lambda new, old, bound: troll_jax.project(new, old, bound=bound)))
    sizes = [2, 4, 16, 64, 512, 4096]
    families, total = {}, np.zeros(0, int)
    print(f'{"family":>20} {"pairs":>9} {"unconverged":>12} {"mean":>6} {"p99.9":>6} {"max":>4} {"KL/bound":>17}')
    for family in HOSTILE:
        evaluations, ratios, unconverged = [], [], 0
        for size in sizes:
            count = max(1, min(2**20 // size, 16384))
            share = min(1, 64 / size) / sum(min(1, 64 / other) for other in sizes)
            for part in range(max(1, round(1.3 * pairs * share / len(HOSTILE) / count))):
                generator = np.random.default_rng([list(HOSTILE).index(family), size, part])
                rows = [x.astype(np.float32) for x in hostile_pairs(family, generator, count, size)]
                result = jax.tree.map(np.asarray, solve(*rows))
                outside = result.violated & (result.weight < 1)
                evaluations.append(result.evaluations[outside])
                ratios.append((result.kl / rows[2])[outside])
                unconverged += np.sum(~result.converged)
        families[family] = np.concatenate(evaluations)
        total, mean = np.concatenate([total, families[family]]), families[family].mean()
        ends = f'{np.min(np.concatenate(ratios)):.5f}–{np.max(np.concatenate(ratios)):.5f}'
        print(
            f'{family:>20} {len(families[family]):>9,} {unconverged:>12} {mean:>6.2f} '
            f'{np.quantile(families[family], 0.999):>6.0f} {families[family].max():>4} {ends:>17}',
            flush=True,
        )
    summary = {
        'pairs': len(total),
        'mean_evaluations': round(total.mean(), 2),
        'max_evaluations': int(total.max()),
        'mean_evaluations_language_model': round(families['language model'].mean(), 2),
    }
    print(json.dumps(summary))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pairs', type=int, default=1_000_000)
    stress(parser.parse_args().pairs)


if __name__ == '__main__':
    main()
