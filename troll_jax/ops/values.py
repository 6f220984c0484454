"""The critic: the loss of its values, and the share of the returns that they explain."""

import jax
import jax.numpy as jnp
import numpy as np


def value_loss(values: jax.Array, old_values: jax.Array, returns: jax.Array, *, clip: float | None) -> jax.Array:
    """The squared error of a value; a step away from the old one by more than `clip` earns nothing.

        loss = ½ max( (V − R)², (V_old + clamp(V − V_old, ±clip) − R)² )

    The clip is that of OpenAI's baselines ("The 37 implementation details of PPO", ICLR blog track 2022, detail 9).

    Args:
      values: [...] V, with a gradient.
      old_values: [...] V_old, before the update.
      returns: [...] R, such as the λ-returns of `gae`.
      clip: more than 0; None turns it off.
    """
    errors = (values - returns) ** 2
    if clip is not None:
        near = old_values + jnp.clip(values - old_values, -clip, clip)
        errors = jnp.maximum(errors, (near - returns) ** 2)
    return 0.5 * errors


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """1 − Var(R − V) / Var(R) of values and returns [N]: 1 is perfect, 0 no better than a constant. NaN: R is one."""
    variance = np.var(returns)
    return float(1 - np.var(returns - values) / variance) if variance > 0 else float('nan')
