"""What length adds to a reward, by hand."""

import numpy as np
import pytest

from troll_jax.rewards.length import soft_overlong


def test_soft_overlong_by_hand():
    """Guards the three parts of DAPO's penalty, in tokens: none, a line from 0 to −1, and its end at the limit."""
    lengths = np.array([1, 16384, 16385, 18432, 20480])
    expected = [0, 0, -1 / 4096, -0.5, -1]
    np.testing.assert_allclose(soft_overlong(lengths, max_length=20480), expected, atol=1e-6)
    np.testing.assert_allclose(soft_overlong(np.array([2, 4]), max_length=4, share=1.0), [-0.5, -1])


@pytest.mark.parametrize('share', [0.0, 1.5, -0.1])
def test_a_share_that_is_none_is_refused(share):
    """Guards a division by zero, and a penalty that begins before the response."""
    with pytest.raises(ValueError, match=rf'in \(0, 1\]; got {share}'):
        soft_overlong(np.array([3]), max_length=5, share=share)
