"""The trust-region projection (TROLL, arXiv 2510.03817, section 3), of one token's distribution or a whole response's.

    π = argmin_π KL(π ‖ π̃)   subject to   KL(π ‖ π_old) ≤ ε

Write d = log π̃ − log π_old. The solutions for all ε form a one-parameter exponential family with w = 1/(1+η) in (0, 1]:

    π_w ∝ π_old · exp(w d),     κ(w) = KL(π_w ‖ π_old),     κ'(w) = w · Var_{π_w}[d] ≥ 0,

so the projection is one monotone root: w = 1 if κ(1) ≤ ε, and κ(w) = ε otherwise. Tokens that share a region share w,
and all of this holds for the means of κ, κ' and Var over them. What follows is therefore written for [..., V]: one
token [V], as in the paper, or T tokens [T, V] of one or several regions, whose w is kept at each of their tokens.
"""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from troll_jax.ops.ranges import check_range, is_positive
from troll_jax.ops.segments import segment_max, segment_mean
from troll_jax.types import SparseLogProbs

# Value of log π̃ − log π_old where π̃ is zero and π_old is not. Finite, so that the family stays defined when the trust
# region does not let the projection give up all of that mass; large, so that otherwise nothing of it is left.
_ZERO_PROBABILITY = -1e6
# 1/n! … 1/2!: the power series of (eˣ − 1 − x) / x², to the precision of the dtype for |x| < 1/4.
_SERIES = {
    dtype: [1 / math.factorial(n) for n in range(last, 1, -1)] for dtype, last in [(np.float32, 7), (np.float64, 12)]
}
# No search takes longer, for log π_old ≥ −100 and ε ≥ 1e-6 (docs/projection.md, theorem 3). Others are stopped there.
_MOST_EVALUATIONS = {np.float32: 84, np.float64: 190}
# Powers of w that the solver's model of κ may have.
_POWERS = -0.5, 40.0


class Projection(NamedTuple):
    """The projected distribution, and how it was found."""

    log_probs: jax.Array  # [V] log π
    weight: jax.Array  # [] w in [0, 1]; η = 1/w − 1
    kl: jax.Array  # [] KL(π ‖ π_old), nats
    violated: jax.Array  # [] bool: KL(π̃ ‖ π_old) > ε, so that π differs from π̃
    evaluations: jax.Array  # [] int32, of κ
    converged: jax.Array  # [] bool; if false, π is feasible but need not be the closest
    kl_unprojected: jax.Array  # [] KL(π̃ ‖ π_old), nats; without a gradient


class _Point(NamedTuple):
    """The family at one w."""

    probs: jax.Array  # [..., V] π_w
    log_partition: jax.Array  # [...] ψ = log Σ π_old exp(w d)
    kl: jax.Array  # [...] κ
    mean: jax.Array  # [...] E[d]
    variance: jax.Array  # [...] Var[d]
    skew: jax.Array  # [...] E[(d − E[d])³]


class _Search(NamedTuple):
    """The solver's state: the last point, in x = log w, and the bracket around the root. All are [...]."""

    x: jax.Array
    kl: jax.Array  # means over the tokens of a region
    variance: jax.Array
    skew: jax.Array
    low: jax.Array  # feasible
    high: jax.Array  # not feasible, or 0
    width: jax.Array  # high − low, one point before
    gap: jax.Array  # smallest |log κ − log target| before the last point
    evaluations: jax.Array
    done: jax.Array  # bool


def project(log_probs: jax.Array, old_log_probs: jax.Array, *, bound, max_evaluations: int | None = None) -> Projection:
    """Projects a categorical distribution onto the KL trust region around another one.

        argmin_π KL(π ‖ π̃)   subject to   KL(π ‖ π_old) ≤ bound

    Inside the region the result is `log_probs`, to the bit. Outside, KL(π ‖ π_old) ends a little under the bound: by at
    most 0.1 % of it in float32, 1e-11 of it in float64. Differentiable in both distributions and in the bound, in
    forward and reverse mode, by the implicit function theorem; nothing is differentiated through the solver.

    Args:
      log_probs: [V] log π̃, normalised; −inf is allowed.
      old_log_probs: [V] log π_old, normalised, of the same dtype; −inf is allowed, and no mass of π is put there.
      bound: ε > 0 in nats, a float or a scalar array. For an array that is not positive the result is π_old.
      max_evaluations: after so many evaluations of κ the best feasible point is returned, with `converged` false. None:
        as many as it can take by theorem 3 of docs/projection.md, whose stress took at most 16 in float32.

    Returns:
      A Projection. If π̃ and π_old share no support, π is π_old.

    Raises:
      ValueError: shapes or dtypes do not fit, or a bound known at trace time is not positive.
    """
    if log_probs.ndim != 1:
        raise ValueError(f'project takes one distribution, [V]; got {log_probs.shape}. Batch it with jax.vmap.')
    return _project(log_probs, old_log_probs, None, bound, max_evaluations)


def project_sequence(
    log_probs: jax.Array, old_log_probs: jax.Array, segments: jax.Array, *, bound, max_evaluations: int | None = None
) -> Projection:
    """Projects the distributions of a whole response onto one trust region: their mean KL is at most the bound.

        argmin_π Σ_t KL(π_t ‖ π̃_t)   subject to   mean_t KL(π_t ‖ π_old,t) ≤ bound

    All tokens share one w; a token that moved far may stay far as long as others make up for it. Guarantee, derivative
    and arguments are those of `project`. Several responses may be packed end to end, each with its own region.

    Args:
      log_probs: [T, V]
      old_log_probs: [T, V]
      segments: [T] int, at most T: the response that a token belongs to, or a bool mask of a single one. Tokens of
        segment 0 do not matter and are returned as they are.
      bound: ε > 0 in nats per token.

    Returns:
      A Projection whose `log_probs` are [T, V] and whose other fields are [T]: those of the token's region, but for
      `kl` and `kl_unprojected`, which are the token's own. The mean of `kl` over a response is what the bound holds.
    """
    if log_probs.ndim != 2:
        raise ValueError(f'project_sequence takes the distributions of one response, [T, V]; got {log_probs.shape}')
    inside = segments > 0
    # Two equal distributions, so that no NaN or infinity of the others finds its way into a sum.
    stand_in = -jnp.log(jnp.asarray(log_probs.shape[1], log_probs.dtype))
    masked = [jnp.where(inside[:, None], x, stand_in) for x in (log_probs, old_log_probs)]
    result = _project(*masked, segments.astype(jnp.int32), bound, max_evaluations)
    return result._replace(log_probs=jnp.where(inside[:, None], result.log_probs, log_probs))


def _project(log_probs, old_log_probs, segments, bound, max_evaluations) -> Projection:
    if log_probs.shape != old_log_probs.shape:
        raise ValueError(f'both must have one shape; got {log_probs.shape} and {old_log_probs.shape}')
    if log_probs.dtype != old_log_probs.dtype or log_probs.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f'both must be float32 or both float64; got {log_probs.dtype} and {old_log_probs.dtype}')
    check_range('bound (a KL divergence, in nats)', bound, is_positive, 'positive')
    bound = jnp.asarray(bound, log_probs.dtype)
    weight, violated, evaluations, converged, kl_unprojected = _solve(
        *jax.lax.stop_gradient((log_probs, old_log_probs, segments, bound)), max_evaluations
    )
    projected, weight, kl = _interpolate(log_probs, old_log_probs, segments, bound, weight, violated)
    return Projection(projected, weight, kl, violated, evaluations, converged, kl_unprojected)


def project_sparse(
    new: SparseLogProbs, old: SparseLogProbs, *, bound, max_evaluations: int | None = None
) -> Projection:
    """Projects one sparse distribution onto the trust region around another one on the same tokens.

    π̃ on the support is projected as a distribution of its own, and the support keeps its mass π̃(S):

        log π(i) = log π̃(S) + log project( π̃(· | S), π_old(· | S) )(i)

    so that the result is π̃ to the bit inside the region, and a gradient reaches the tokens that were not kept through
    log π̃(S). (The paper renormalises, π̃(S) = 1; such inputs give its form.)

    Args:
      new: π̃ on the support [K].
      old: π_old on the support [K], with the tokens of `new` in the same order. Padding (−inf in both) is left alone.
      bound: ε in nats.

    Returns:
      A Projection whose `log_probs` [K] belong to the tokens of `new`; `kl` is that of the conditional distributions.
    """
    return project_on_support(partial(project, bound=bound, max_evaluations=max_evaluations), new, old)


def project_sparse_sequence(
    new: SparseLogProbs, old: SparseLogProbs, segments: jax.Array, *, bound, max_evaluations: int | None = None
) -> Projection:
    """`project_sequence` on supports [T, K], in the way of `project_sparse`."""
    region = partial(project_sequence, segments=segments, bound=bound, max_evaluations=max_evaluations)
    return project_on_support(region, new, old)


def project_on_support(region: Callable[..., Projection], new: SparseLogProbs, old: SparseLogProbs) -> Projection:
    """The projection of the support's conditional distributions, in the way of `project_sparse`."""
    log_mass = jax.nn.logsumexp(new.log_probs, axis=-1, keepdims=True)
    result = region(new.log_probs - log_mass, jax.nn.log_softmax(old.log_probs))
    projected = jnp.where(result.violated[..., None], result.log_probs + log_mass, new.log_probs)
    return result._replace(log_probs=projected)


def kl_divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p ‖ q) of two distributions [V], or of unnormalised measures: Σ p log(p/q) − p + q, whose terms are all ≥ 0.

    Where p is zero a term is q. Infinite if q is zero where p is not.
    """
    support = log_p > -jnp.inf
    log_ratio = jnp.where(support, log_p, 0.0) - jnp.where(support, log_q, 0.0)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    return jnp.sum(jnp.where(support, _kl_terms(p, q, log_ratio), q))


def _kl_terms(p: jax.Array, q: jax.Array, log_ratio: jax.Array) -> jax.Array:
    """p log(p/q) − p + q, which is p (eˣ − 1 − x) with x = log(q/p): never negative, and exact near p = q.

    There it is a power series in x, because in a difference of two expressions in x a compiler may round x differently
    in each, and what is left of x² / 2 is then noise.
    """
    near = jnp.abs(log_ratio) < 0.25
    x = jnp.where(near, -log_ratio, 0.0)
    series = reduce(lambda total, coefficient: total * x + coefficient, _SERIES[x.dtype.type])
    return jnp.where(near, p * (x * x * series), p * log_ratio + (q - p))


def _log_ratio(log_probs: jax.Array, old_log_probs: jax.Array) -> jax.Array:
    """d [..., V], with the two kinds of zero-probability entries set to where they do no harm."""
    old_support = old_log_probs > -jnp.inf
    shared = old_support & (log_probs > -jnp.inf)
    # Without common ground all entries would be this large, and differences between them lost to rounding.
    zero_probability = jnp.where(jnp.any(shared, axis=-1, keepdims=True), _ZERO_PROBABILITY, 0.0)
    d = jnp.where(shared, log_probs - jnp.where(old_support, old_log_probs, 0.0), zero_probability)
    return jnp.where(old_support, d, 0.0)


def _evaluate(old_log_probs: jax.Array, old_probs: jax.Array, d: jax.Array, w: jax.Array) -> _Point:
    """κ(w) and the first three central moments of d under π_w, of every token with its w [...], in one pass over [V].

    κ is summed as Σ π_w y − π_w + π_old with y = log(π_w/π_old) = w d − ψ. Its terms are not negative, so nothing
    cancels between them, and an error δ in ψ changes the sum by κ δ alone; that keeps small κ exact in float32.
    """
    tilt = w[..., None] * d
    log_weights = old_log_probs + tilt
    largest = jnp.max(log_weights, axis=-1, keepdims=True)
    weights = jnp.exp(log_weights - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    probs = weights / total
    log_partition = largest + jnp.log(total)
    y = jnp.where(old_log_probs > -jnp.inf, tilt - log_partition, 0.0)
    kl = jnp.maximum(jnp.sum(_kl_terms(probs, old_probs, y), axis=-1), 0.0)
    mean = jnp.sum(probs * d, axis=-1)
    centred = d - mean[..., None]
    variance = jnp.sum(probs * centred**2, axis=-1)
    return _Point(probs, log_partition[..., 0], kl, mean, variance, jnp.sum(probs * centred**3, axis=-1))


class _Regions(NamedTuple):
    """Reductions over the tokens of a region, broadcast back to each of them: functions of [...]."""

    mean: Callable[[jax.Array], jax.Array]
    largest: Callable[[jax.Array], jax.Array]

    @classmethod
    def of(cls, segments: jax.Array | None) -> '_Regions':
        """Reductions over these segments [T], of which 0 is no region; None: of each token on its own."""
        if segments is None:
            return cls(lambda x: x, lambda x: x)
        return cls(partial(segment_mean, segments=segments), partial(segment_max, segments=segments))


@partial(jax.jit, static_argnames='max_evaluations')
def _solve(log_probs, old_log_probs, segments, bound, max_evaluations):
    """Finds w [...]. A safeguarded third-order Newton method on log κ.

    Where d is small against its spread, κ ~ w²; for peaked distributions κ ~ exp(c w). Both are straight lines in log κ
    against wᵠ, with q → 0 and q = 1. The slope s = d log κ / d log w = w² σ²/κ and its own growth
    q = d log s / d log w = 2 + w γ/σ² − s (γ the third central moment) say which power fits at the last point, and the
    next point is where that line meets log ε. If neither the bracket nor the distance to log ε has halved since the
    point before, the next one is the bracket's middle.
    """
    old_probs = jnp.exp(old_log_probs)
    d = _log_ratio(log_probs, old_log_probs)
    regions = _Regions.of(segments)
    tolerance = 2e-4 if log_probs.dtype == jnp.float32 else 2e-12
    max_evaluations = max_evaluations or _MOST_EVALUATIONS[log_probs.dtype.type]
    # Aiming under the bound keeps every point within the tolerance feasible, after rounding too.
    target = bound * (1 - 2.5 * tolerance)
    log_target = jnp.log(target)
    tiny = jnp.finfo(log_probs.dtype).tiny

    def point(w):
        at = _evaluate(old_log_probs, old_probs, d, w)
        return at, [regions.mean(moment) for moment in (at.kl, at.variance, at.skew)]

    def is_done(kl):
        return jnp.abs(kl - target) <= tolerance * bound

    def unfinished(search):
        # A bound that is none makes a bracket of NaN, a distribution that is none a κ of NaN.
        return ~search.done & jnp.isfinite(search.low + search.kl) & (search.evaluations < max_evaluations)

    def step(search):
        x, variance = search.x, search.variance
        w, kl = jnp.exp(x), jnp.maximum(search.kl, tiny)
        gap = jnp.log(kl) - log_target
        low, high = jnp.where(gap <= 0, x, search.low), jnp.where(gap <= 0, search.high, x)
        slope = jnp.maximum(w * w * variance / kl, 1e-6)
        power = 2 + w * search.skew / jnp.maximum(variance, tiny) - slope
        power = jnp.clip(jnp.where(jnp.isfinite(power), power, 0.0), *_POWERS)
        power = jnp.where(jnp.abs(power) < 1e-3, 1e-3, power)
        # (w_next / w)ᵠ = 1 − q gap / s; where that has no solution, the step is to infinity, which no bracket holds.
        root = 1 - power * gap / slope
        newton = x + jnp.where(root > tiny, jnp.log(jnp.maximum(root, tiny)) / power, jnp.inf)
        halved = (high - low <= 0.5 * search.width) | (jnp.abs(gap) <= 0.5 * search.gap)
        x = jnp.where(halved & (low < newton) & (newton < high), newton, 0.5 * (low + high))
        _, means = point(jnp.exp(x))
        smallest = jnp.minimum(search.gap, jnp.abs(gap))
        new = _Search(x, *means, low, high, high - low, smallest, search.evaluations + 1, is_done(means[0]))
        return jax.tree.map(partial(jnp.where, unfinished(search)), new, search)

    zero = jnp.zeros_like(d[..., 0])
    first, means = point(jnp.ones_like(zero))
    # Mass of π̃ where π_old has none makes the KL infinite; the family above has already dropped it.
    escapes = jnp.any((old_log_probs == -jnp.inf) & (jnp.exp(log_probs) > 0), axis=-1)
    outside = ~(means[0] <= bound)
    # κ ≤ (w · spread)²/8. Half of the w at which that is the target: the root lies inside the bracket, not at its end.
    spread = regions.largest(jnp.ptp(d, axis=-1))
    low = jnp.minimum(0.5 * jnp.log(2 * target) - jnp.log(jnp.maximum(spread, tiny)), 0.0)
    one = jnp.ones_like(zero, jnp.int32)
    # What is inside its region is done after this one evaluation.
    start = _Search(zero, *means, low, zero, -low, zero + jnp.inf, one, ~outside)
    end = jax.lax.while_loop(lambda search: jnp.any(unfinished(search)), step, start)
    feasible = end.done | (end.kl <= target)
    weight = jnp.exp(jnp.where(feasible, end.x, jnp.where(jnp.isfinite(end.low), end.low, -jnp.inf)))
    violated = outside | (regions.mean(escapes.astype(zero.dtype)) > 0)
    return weight, violated, end.evaluations, end.done, jnp.where(escapes, jnp.inf, first.kl)


@jax.custom_jvp
def _interpolate(log_probs, old_log_probs, segments, bound, weight, violated):
    """(log π_w, w, κ(w)) for the w that `_solve` found; π̃ itself where the bound is not violated."""
    del segments, bound
    point, d = _at_solution(log_probs, old_log_probs, weight)
    tilted = old_log_probs + weight[..., None] * d - point.log_partition[..., None]
    tilted = jnp.where((log_probs == -jnp.inf) & (point.probs == 0), -jnp.inf, tilted)
    return jnp.where(violated[..., None], tilted, log_probs), weight, point.kl


@_interpolate.defjvp
def _interpolate_jvp(primals, tangents):
    """The implicit function theorem, with every moment under π = π_w and δ for tangents.

    For a fixed w,           δ log π = centred[ u ],   u = (1 − w) δ log π_old + w δ log π̃
    and in w,                  log π changes by (d − E d) δw.
    κ = E[log π − log π_old] has  δκ = w Cov(d, u) + w σ² δw − E[δ log π_old], and mean κ(w) = ε asks for
    mean δκ = δε, hence

        δw = (δε + mean (E[δ log π_old] − w Cov(d, u))) / mean (w σ²).

    For one token, with π_old and ε fixed, this is w times what is left of the centred δ log π̃ after regressing it on d.
    A normalised π_old moves in directions with E_old[δ log π_old] = 0; the part of a tangent that changes its
    normaliser says nothing about the distribution and is taken out first.
    """
    log_probs, old_log_probs, segments, bound, weight, violated = primals
    d_new, d_old, _, d_bound, _, _ = tangents
    out = _interpolate(log_probs, old_log_probs, segments, bound, weight, violated)
    # The solution that has this rule for its own derivative, unlike the input: so the rule can be differentiated again.
    weight = out[1]
    regions = _Regions.of(segments)
    point, d = _at_solution(log_probs, old_log_probs, weight)
    probs = point.probs
    expect = lambda x: jnp.sum(probs * x, axis=-1)
    d_old = d_old - jnp.sum(jnp.exp(old_log_probs) * d_old, axis=-1, keepdims=True)
    centred = d - point.mean[..., None]

    # Where π̃ is zero, d is a constant.
    u = d_old + weight[..., None] * jnp.where(log_probs > -jnp.inf, d_new - d_old, 0.0)
    covariance = expect(centred * u)
    growth = weight * point.variance
    curvature = regions.mean(growth)
    solvable = curvature > jnp.finfo(curvature.dtype).tiny
    drift = d_bound + regions.mean(expect(d_old) - weight * covariance)
    # w = 1 is held there by its own limit, not by the bound: π_old has no mass on a part of π̃, the rest is inside.
    movable = violated & solvable & (weight < 1)
    d_weight = jnp.where(movable, drift / jnp.where(solvable, curvature, 1.0), 0.0)
    d_tilted = u - expect(u)[..., None] + centred * d_weight[..., None]
    d_projected = jnp.where(violated[..., None], jnp.where(out[0] == -jnp.inf, 0.0, d_tilted), d_new)

    d_kl = weight * covariance + growth * d_weight - expect(d_old)
    return out, (d_projected, d_weight, d_kl)


def _at_solution(log_probs, old_log_probs, weight):
    d = _log_ratio(log_probs, old_log_probs)
    return _evaluate(old_log_probs, jnp.exp(old_log_probs), d, weight), d
