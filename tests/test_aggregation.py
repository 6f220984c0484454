"""The weights of every aggregation, by hand."""

import jax.numpy as jnp
import numpy as np

from troll_jax.ops.aggregation import constant_length, sequence_mean, sequence_sum, token_mean

LENGTHS = jnp.array([3, 0, 5, 1])


def test_aggregations_by_hand():
    """Guards the denominators: tokens, responses that have tokens, and the length limit."""
    np.testing.assert_allclose(token_mean(LENGTHS, 5), np.full(4, 1 / 9), rtol=1e-6)
    of_tokens = sequence_mean(LENGTHS, 5) * LENGTHS  # what a response weighs in all
    np.testing.assert_allclose(of_tokens, [1 / 3, 0, 1 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(constant_length(LENGTHS, 5), np.full(4, 1 / 15), rtol=1e-6)
    np.testing.assert_allclose(sequence_sum(LENGTHS, 5), np.full(4, 1 / 3), rtol=1e-6)


def test_aggregations_of_equal_lengths_agree():
    """Guards scale: with full responses all means are the same, so that learning rates carry over; a sum is no mean."""
    for aggregation in (token_mean, sequence_mean, constant_length):
        np.testing.assert_allclose(aggregation(jnp.full(3, 7), 7), np.full(3, 1 / 21), rtol=1e-6)
    np.testing.assert_allclose(sequence_sum(jnp.full(3, 7), 7), np.full(3, 7 / 21), rtol=1e-6)


def test_aggregations_of_nothing_are_finite():
    """Guards 0/0 in a batch that is masked altogether."""
    for aggregation in (token_mean, sequence_mean, sequence_sum, constant_length):
        assert np.isfinite(aggregation(jnp.zeros(3, jnp.int32), 5)).all()
