"""Numbers that are out of their range, and those whose value is not known yet."""

import jax
import numpy as np
import pytest

from troll_jax.ops.ranges import check_range, is_positive


def test_a_number_that_does_not_fit_is_an_error():
    """Guards the words of the error: which number, what is expected, what was got."""
    check_range('epsilon', 0.5, is_positive, 'positive')
    for value in (-1, -1.0, np.float32(-1), np.int64(-1)):
        with pytest.raises(ValueError, match='epsilon must be positive; got -1'):
            check_range('epsilon', value, is_positive, 'positive')


def test_an_array_has_no_value_yet():
    """Guards settings that are traced, to be varied under one compiled program."""

    @jax.jit
    def scaled(epsilon):
        check_range('epsilon', epsilon, is_positive, 'positive')
        return 2 * epsilon

    assert scaled(-1.0) == -2
