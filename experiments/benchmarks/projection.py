"""Speed and exactness of the projection against bracketing methods: one run, one machine, float32.

    python -m experiments.benchmarks.projection [--tokens 4096] [--entries 64] [--repeats 15] [--bound 0.05]
    python -m experiments.benchmarks.projection --stress 1000000

Compares, all under `jax.jit` and `jax.vmap`, without derivatives:

- ours: `troll_jax.project`;
- n-ary bracketing of log η: 8 points a step, at most 20 steps, η in [1e-7, 1e2], as the reference solves it. Its known
  facts admit two readings of a step (by the sign of the dual's slope κ − ε, or by the largest value of the dual) and
  do not say what has to fall below 1e-5 for it to stop; taken here is the width of the bracket in log η, and both kinds
  of step are run. `nary` steps by slope and always takes its 20 steps, `nary_stop` ends when every token's bracket is
  narrow enough, `nary_value` does so and steps by value.
- bisection of w in [0, 1]: 60 steps.

Every token violates the bound, because inside it there is nothing to solve. KLs are recomputed by numpy in float64 from
the float32 outputs as they are, without normalising anything again: Σ p log(p/q) − p + q, which is the KL for
normalised p and q and never negative otherwise. The last line of the output is one line of JSON.

`--stress` instead counts the evaluations that `troll_jax.project` needs for about so many hostile pairs outside the
region: 2 to 4,096 entries, bounds from 1e-6 to 5, log-probabilities down to −60 and zeros on either side.
"""

import argparse
import json
import statistics
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import troll_jax
from experiments.benchmarks.measure import copy_bandwidth, timed

POINTS, STEPS, ETAS, STOP = 8, 20, (1e-7, 1e2), 1e-5
BISECTIONS = 60
DEFAULT_LOG_PROB = np.log(1e-12)  # of what the reference did not keep


def slope_and_value(old: jax.Array, d: jax.Array, bound: float, log_eta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The slope κ − ε and the value of the dual at each η of [n]; what a caller does not use is not computed."""
    w = 1 / (1 + jnp.exp(log_eta))
    exponents = old + w[:, None] * d
    largest = jnp.max(exponents, axis=-1)
    weights = jnp.exp(exponents - largest[:, None])
    total = jnp.sum(weights, axis=-1)
    log_partition = largest + jnp.log(total)
    kl = w * (jnp.sum(weights * d, axis=-1) / total) - log_partition
    return kl - bound, -log_partition / w - (1 / w - 1) * bound


def result(new: jax.Array, old: jax.Array, d: jax.Array, bound: float, w: jax.Array) -> jax.Array:
    """π_w, or π̃ where that does not violate the bound."""
    projected = jax.nn.log_softmax(old + w * d)
    return jnp.where(jnp.sum(jnp.exp(new) * d) > bound, projected, new)


def nary(new: jax.Array, old: jax.Array, *, bound: float, stop: float = 0.0, by_value: bool = False) -> jax.Array:
    """n-ary bracketing of log η. Steps by slope end at the bracket's feasible side, steps by value in its middle."""
    d = new - old
    grid = (jnp.arange(POINTS) + 1) / (POINTS + 1)

    def unfinished(state):
        step, low, high = state
        return (step < STEPS) & (high - low > stop)

    def narrow(state):
        step, low, high = state
        spacing = (high - low) / (POINTS + 1)
        slope, value = slope_and_value(old, d, bound, low + grid * (high - low))
        if by_value:
            best = jnp.argmax(value)
            return step + 1, low + best * spacing, low + (best + 2) * spacing
        steps = jnp.sum(slope > 0)  # κ falls with η, so these points lie on the near side of the root
        return step + 1, low + steps * spacing, jnp.where(steps == POINTS, high, low + (steps + 1) * spacing)

    start = (0, *(jnp.log(jnp.asarray(eta, new.dtype)) for eta in ETAS))
    _, low, high = jax.lax.while_loop(unfinished, narrow, start)
    eta = jnp.exp(0.5 * (low + high) if by_value else high)
    return result(new, old, d, bound, 1 / (1 + eta))


def bisection(new: jax.Array, old: jax.Array, *, bound: float) -> jax.Array:
    """Bisection of w, which ends at the feasible side of the bracket."""
    d = new - old

    def halve(_, bracket):
        low, high = bracket
        w = 0.5 * (low + high)
        log_partition = jax.nn.logsumexp(old + w * d)
        kl = w * jnp.sum(jnp.exp(old + w * d - log_partition) * d) - log_partition
        return jnp.where(kl > bound, low, w), jnp.where(kl > bound, w, high)

    low, _ = jax.lax.fori_loop(0, BISECTIONS, halve, (jnp.zeros((), new.dtype), jnp.ones((), new.dtype)))
    return result(new, old, d, bound, low)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def kl_divergence(log_p: jax.Array, log_q: jax.Array) -> np.ndarray:
    """KL of the rows, in float64, of float32 log-probabilities as they are."""
    log_p, log_q = np.asarray(log_p, np.float64), np.asarray(log_q, np.float64)
    ratio = log_p - log_q
    return np.sum(np.exp(log_p) * (ratio + np.expm1(-ratio)), axis=-1)


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
            log_probs = log_softmax(side)
            ranks = (-log_probs).argsort(-1).argsort(-1)
            dropped = ranks >= generator.integers(min(4, entries), entries + 1, (tokens, 1))
            dropped &= (np.arange(tokens) % 2 == 0)[:, None]
            pair.append(log_softmax(np.where(dropped, DEFAULT_LOG_PROB, log_probs)).astype(np.float32))
        pair = np.stack(pair, axis=1)
        kept.append(pair[kl_divergence(pair[:, 0], pair[:, 1]) > bound])
    pairs = np.concatenate(kept)[:tokens]
    return jnp.asarray(pairs[:, 0]), jnp.asarray(pairs[:, 1])


def far_pairs(entries: int, log_floor: float) -> tuple[jax.Array, jax.Array]:
    """Pairs (π̃, π_old) that need a large η: what one has, the other gives only exp(log_floor), or near it.

    Peaks at different tokens; peaks with the rest spread from the floor up; and π_old on one part of the entries with
    π̃ on 1 … all of them.
    """
    generator = np.random.default_rng(1)
    new, old = [], []
    for count in range(1, entries):
        index = np.arange(entries)
        new += [np.where(index == count, 0.0, log_floor), generator.uniform(log_floor, -5, entries)]
        old += [np.where(index == 0, 0.0, log_floor), generator.uniform(log_floor, -5, entries)]
        new[-1][count], old[-1][0] = 0, 0
        new += [np.where(index < count, 0.0, log_floor)]
        old += [np.zeros(entries)]
    return tuple(jnp.asarray(log_softmax(np.array(rows)), jnp.float32) for rows in (new, old))


def hostile_pairs(family: str, generator: np.random.Generator, count: int, entries: int) -> tuple[np.ndarray, ...]:
    """(π̃, π_old) [N, V] of a family of `HOSTILE`, in float64, and bounds [N]."""
    new, old = HOSTILE[family](generator, (count, entries))
    bounds = np.exp(generator.uniform(np.log(1e-6), np.log(5), count))
    return log_softmax(new), log_softmax(old), bounds


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


def error_columns(projected: jax.Array, old: jax.Array, bound: float) -> tuple[float, float]:
    """The worst violation max(KL/ε − 1, 0) and the worst error |KL − ε|/ε."""
    relative = kl_divergence(projected, old) / bound - 1
    return max(relative.max(), 0.0), np.abs(relative).max()


def methods(bound: float) -> dict:
    """name → compiled function of (log π̃, log π_old), both [N, V], that returns log π [N, V]."""
    functions = {
        'ours': lambda new, old: troll_jax.project(new, old, bound=bound).log_probs,
        'nary': partial(nary, bound=bound),
        'nary_stop': partial(nary, bound=bound, stop=STOP),
        'nary_value': partial(nary, bound=bound, stop=STOP, by_value=True),
        'bisection': partial(bisection, bound=bound),
    }
    return {name: jax.jit(jax.vmap(function)) for name, function in functions.items()}


def print_ceiling(entries: int) -> None:
    """Cases for which η ≤ 100 is not enough: the share of far pairs that violate, and by how much."""
    print('\nfar pairs: KL/bound of the worst pair [share of pairs that exceed the bound by more than 0.1 %]')
    print(f'{"smallest mass":>14} {"bound":>8} {"pairs":>6} {"nary":>20} {"ours":>20}')
    for log_floor in (DEFAULT_LOG_PROB, np.log(1e-30)):
        for bound in (1e-4, 1e-3, 1e-2, 0.05, 0.2, 1.0, 2.0):
            new, old = far_pairs(entries, log_floor)
            outside = kl_divergence(new, old) > bound
            cells = []
            for name in ('nary', 'ours'):
                ratio = kl_divergence(methods(bound)[name](new, old), old)[outside] / bound
                cells.append(f'{ratio.max():.4f} [{np.mean(ratio > 1.001):.2f}]')
            print(f'{np.exp(log_floor):>14.0e} {bound:>8g} {outside.sum():>6} {cells[0]:>20} {cells[1]:>20}')


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
    parser.add_argument('--tokens', type=int, default=4096)
    parser.add_argument('--entries', type=int, default=64)
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--bound', type=float, default=0.05)
    parser.add_argument('--stress', type=int, metavar='PAIRS')
    options = parser.parse_args()
    if options.stress:
        return stress(options.stress)

    new, old = violating_tokens(options.tokens, options.entries, options.bound)
    compiled = methods(options.bound)
    times = {name: [] for name in compiled}
    outputs = {name: jax.block_until_ready(function(new, old)) for name, function in compiled.items()}
    for _ in range(options.repeats):
        for name, function in compiled.items():
            times[name].append(timed(function, new, old))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    errors = {name: error_columns(output, old, options.bound) for name, output in outputs.items()}

    print(f'{options.tokens} tokens x {options.entries} entries, bound {options.bound}, medians of {options.repeats}')
    print(f'{"method":>12} {"ms":>9} {"fastest":>9} {"/ ours":>7} {"worst violation":>16} {"worst error":>12}')
    for name, (violation, error) in errors.items():
        ratio = seconds[name] / seconds['ours']
        best = 1e3 * min(times[name])
        print(f'{name:>12} {1e3 * seconds[name]:>9.2f} {best:>9.2f} {ratio:>7.2f} {violation:>16.1e} {error:>12.1e}')

    solved = jax.jit(jax.vmap(partial(troll_jax.project, bound=options.bound)))(new, old)
    floor = (new.nbytes + old.nbytes) / copy_bandwidth(options.repeats)
    print_ceiling(options.entries)
    summary = {
        'speedup_vs_nary': seconds['nary'] / seconds['ours'],
        'speedup_vs_nary_stop': seconds['nary_stop'] / seconds['ours'],
        'speedup_vs_nary_value': seconds['nary_value'] / seconds['ours'],
        'speedup_vs_bisection': seconds['bisection'] / seconds['ours'],
        'worst_violation': errors['ours'][0],
        'worst_violation_nary': errors['nary'][0],
        'worst_error': errors['ours'][1],
        'worst_error_nary': errors['nary'][1],
        'mean_evaluations': float(solved.evaluations.mean()),
        'max_evaluations': int(solved.evaluations.max()),
        'times_floor': seconds['ours'] / floor,
    }
    print(json.dumps({name: float(f'{value:.3g}') for name, value in summary.items()}))


if __name__ == '__main__':
    main()
