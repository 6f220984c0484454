"""Importance weights between trainer and sampler: `Method.importance` multiplies advantages by them.

What one policy sampled is learnt from as if another had: kernels and precision differ between sampler and trainer, and
with a lag the parameters do. Bounds are those of these weights alone; an objective has its own on π/π_old.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from troll_jax.ops.losses import LOG_RATIO_LIMIT
from troll_jax.ops.ranges import check_range
from troll_jax.ops.segments import segment_mean, segment_sum

Importance = Callable[[jax.Array, jax.Array], jax.Array]
"""Weights of a row's tokens [S], from log π_trainer/π_sampler [S] and the response [S] that each token belongs to."""

Level = Literal['token', 'sequence', 'geometric']


def truncated_importance(
    log_ratio: jax.Array, segments: jax.Array, *, level: Level = 'token', limit: float = 2.0
) -> jax.Array:
    """min(w, limit), w = π_trainer / π_sampler: some bias for less variance (Ionides, 2008).

    For sampler and trainer of language models by Yao et al., 2025 (fengyao.notion.site/off-policy-rl).

    Args:
      log_ratio: [S] log π_trainer/π_sampler of the sampled tokens.
      segments: [S] the response that a token belongs to; 0: none.
      level: w of a token is its own ratio ('token'), the product over its response ('sequence'), or the geometric mean
        over it ('geometric').
      limit: C, at least 1.

    Raises:
      ValueError: a limit that equal policies exceed, or an unknown level.
    """
    check_range('limit of the importance weights', limit, lambda x: x >= 1, 'at least 1')
    return jnp.minimum(_ratio(log_ratio, segments, level), limit)


def masked_importance(
    log_ratio: jax.Array, segments: jax.Array, *, level: Level = 'token', lower: float = 0.0, upper: float = 2.0
) -> jax.Array:
    """w where it is in [lower, upper], else 0: what the policies disagree about is not learnt from.

    With 'token' as in IcePop (Ling team, 2025, ringtech.notion.site/icepop), with 'sequence' and 'geometric' whole
    responses are left out (Liu et al., 2025, When Speed Kills Stability, yingru.notion.site). Arguments and errors as
    of `truncated_importance`.

    Args:
      lower: at most 1.
      upper: at least 1.
    """
    check_range('lower bound of the importance weights', lower, lambda x: 0 <= x <= 1, 'in [0, 1]')
    check_range('upper bound of the importance weights', upper, lambda x: x >= 1, 'at least 1')
    w = _ratio(log_ratio, segments, level)
    return jnp.where((w >= lower) & (w <= upper), w, 0.0)


def _ratio(log_ratio: jax.Array, segments: jax.Array, level: str) -> jax.Array:
    over = {'token': lambda x, _: x, 'sequence': segment_sum, 'geometric': segment_mean}
    if level not in over:
        raise ValueError(f'level of the importance weights is {level!r}; expected one of {tuple(over)}')
    limit = LOG_RATIO_LIMIT
    return jax.lax.stop_gradient(jnp.exp(jnp.clip(over[level](log_ratio, segments), -limit, limit)))
