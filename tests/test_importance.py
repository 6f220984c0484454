"""Importance weights by hand: three levels, truncated and masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from troll_jax.ops.importance import masked_importance, truncated_importance

SEGMENTS = jnp.array([1, 1, 0, 2, 2])
RATIOS = np.array([2.0, 0.5, 7.0, 4.0, 1.0])
OF_RESPONSES = {
    'token': RATIOS,
    'sequence': np.array([1.0, 1.0, 1.0, 4.0, 4.0]),
    'geometric': np.array([1.0, 1.0, 1.0, 2.0, 2.0]),
}


@pytest.mark.parametrize('level', OF_RESPONSES)
def test_weights_by_hand(level):
    """Guards which tokens a weight is of, both bounds, and a token of no response that counts for its neighbours."""
    inside = np.asarray(SEGMENTS) > 0
    given, expected = (jnp.log(jnp.array(RATIOS)), SEGMENTS), OF_RESPONSES[level]
    truncated = truncated_importance(*given, level=level, limit=3.0)
    np.testing.assert_allclose(truncated[inside], np.minimum(expected, 3)[inside], rtol=1e-5)
    masked = masked_importance(*given, level=level, lower=0.6, upper=3.0)
    kept = (expected >= 0.6) & (expected <= 3)
    np.testing.assert_allclose(masked[inside], np.where(kept, expected, 0)[inside], rtol=1e-5)


def test_nothing_is_learnt_through_a_weight():
    """Guards a gradient that would pull the weights themselves, and a ratio without end."""
    weights = lambda x: jnp.sum(truncated_importance(x, SEGMENTS, limit=1e9))
    assert not np.any(jax.grad(weights)(jnp.zeros(5)))
    assert np.isfinite(weights(jnp.full(5, 1e4)))


@pytest.mark.parametrize(
    ('function', 'settings', 'message'),
    [
        (truncated_importance, {'limit': 0.5}, 'at least 1; got 0.5'),
        (masked_importance, {'lower': 1.5}, r'in \[0, 1\]; got 1.5'),
        (masked_importance, {'upper': 0.9}, 'at least 1; got 0.9'),
        (masked_importance, {'level': 'batch'}, "level of the importance weights is 'batch'; expected one of"),
    ],
)
def test_bounds_that_leave_out_equal_policies_are_errors(function, settings, message):
    """Guards bounds under which nothing is learnt, or everything is scaled."""
    with pytest.raises(ValueError, match=message):
        function(jnp.zeros(5), SEGMENTS, **settings)
