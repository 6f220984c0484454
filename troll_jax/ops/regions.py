"""Trust regions: from the current policy and π_old on common tokens [T, K] to the projected policy.

A function takes both, the response [T] that each token belongs to, and the bound, and returns a Projection [T, …].
The regions of the total variation and of χ² lie on the straight line between both policies,

    π_v = (1 − v) π_old + v π̃,

with the largest v ≤ 1 that keeps the bound. It is v = bound / D or √(bound / D), so no search is needed.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from troll_jax.ops.categorical import entropy, total_variation
from troll_jax.ops.projection import (
    Projection,
    kl_divergence,
    project_on_support,
    project_sparse,
    project_sparse_sequence,
)
from troll_jax.ops.ranges import check_range, is_positive
from troll_jax.types import SparseLogProbs

_LEAST_BOUND = 1e-6  # nats: the smallest that the solver is made for


def token_region(new: SparseLogProbs, old: SparseLogProbs, segments: jax.Array, *, bound) -> Projection:
    """A trust region for each token, as in the paper. From [T, K] to a Projection [T, …]."""
    del segments
    return jax.vmap(partial(project_sparse, bound=bound))(new, old)


def sequence_region(new: SparseLogProbs, old: SparseLogProbs, segments: jax.Array, *, bound) -> Projection:
    """One trust region for a whole response, which bounds the mean KL of its tokens, see `project_sequence`."""
    return project_sparse_sequence(new, old, segments, bound=bound)


def entropy_region(new: SparseLogProbs, old: SparseLogProbs, segments: jax.Array, *, bound) -> Projection:
    """A trust region for each token, of bound · H(π_old) nats: wide where the old policy was undecided.

    H is that of the listed tokens, so the bound is one per nat of entropy.
    """
    del segments
    check_range('bound of entropy_region', bound, is_positive, 'positive')
    bounds = jnp.maximum(bound * jax.vmap(entropy)(jax.nn.log_softmax(old.log_probs)), _LEAST_BOUND)
    return jax.vmap(lambda new, old, bound: project_sparse(new, old, bound=bound))(new, old, bounds)


def total_variation_region(new: SparseLogProbs, old: SparseLogProbs, segments: jax.Array, *, bound) -> Projection:
    """½ Σ |π − π_old| ≤ bound for each token: no distribution within has a smaller total variation from π̃."""
    del segments
    return _mixture(new, old, bound, total_variation, lambda d: bound / d)


def chi_squared_region(new: SparseLogProbs, old: SparseLogProbs, segments: jax.Array, *, bound) -> Projection:
    """Σ (π − π_old)² / π_old ≤ bound for each token: no distribution within is closer to π̃ in the norm Σ x² / π_old."""
    del segments
    return _mixture(new, old, bound, _chi_squared, lambda d: jnp.sqrt(bound / d))


def detached_region(
    new: SparseLogProbs, old: SparseLogProbs, segments: jax.Array, *, bound, region: Callable = token_region
) -> Projection:
    """Another region's projection with the gradient of π̃: REINFORCE with the weights ⌊π(o_t)⌋ / π_old(o_t)."""
    projection = region(new, old, segments, bound=bound)
    moved = jnp.where(new.log_probs > -jnp.inf, projection.log_probs - new.log_probs, 0.0)
    return projection._replace(log_probs=new.log_probs + jax.lax.stop_gradient(moved))


def _mixture(new: SparseLogProbs, old: SparseLogProbs, bound, divergence: Callable, weight: Callable) -> Projection:
    """π_v with v = weight(D(π̃, π_old)) where D is more than the bound, else π̃."""
    check_range('bound of the region', bound, is_positive, 'positive')

    def one(log_probs: jax.Array, old_log_probs: jax.Array) -> Projection:
        distance = divergence(log_probs, old_log_probs)
        violated = distance > bound
        v = weight(jnp.where(violated, distance, 2.0 * bound))  # inside anything but 0 or 1, of which nothing is used
        listed = jnp.maximum(log_probs, old_log_probs) > -jnp.inf  # where neither is, gradients would be NaN
        parts = [jnp.where(listed, x, 0.0) for x in (log_probs, old_log_probs)]
        mixed = jnp.where(listed, jnp.logaddexp(jnp.log(v) + parts[0], jnp.log1p(-v) + parts[1]), -jnp.inf)
        kl_unprojected = kl_divergence(log_probs, old_log_probs)
        kl = jnp.where(violated, kl_divergence(mixed, old_log_probs), kl_unprojected)
        v = jnp.where(violated, v, 1.0)
        return Projection(mixed, v, kl, violated, jnp.int32(1), jnp.bool(True), kl_unprojected)

    projection = jax.vmap(partial(project_on_support, one))(new, old)
    return projection._replace(kl_unprojected=jax.lax.stop_gradient(projection.kl_unprojected))


def _chi_squared(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Σ (p − q)² / q [] of two distributions [V]; where q is zero p should be, too."""
    q = jnp.exp(log_q)
    return jnp.sum(jnp.where(q > 0, (jnp.exp(log_p) - q) ** 2 / jnp.where(q > 0, q, 1.0), 0.0))
