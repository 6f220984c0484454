"""Simulated quantisation of the sampler."""

import jax.numpy as jnp
import numpy as np
from loop import HASH, run

from troll_jax.models.quantization import quantise

TASK = [binding for binding in HASH if 'evaluate_every' not in binding]


def test_quantise_by_hand():
    """Guards one scale for all channels, and values that are cut off."""
    weight = jnp.array([[127.0, 0.5], [-63.6, -0.126]])
    np.testing.assert_allclose(quantise(weight, 'int8', axis=0), [[127, 0.5], [-64, -0.125984]], rtol=1e-4)
    np.testing.assert_allclose(quantise(jnp.array([[448.0], [17.0]]), 'fp8', axis=0), [[448], [16]])  # 3 bits behind 1
    np.testing.assert_array_equal(quantise(weight, None, axis=0), weight)
    assert not np.any(quantise(jnp.zeros((2, 2)), 'int8', axis=0))


def test_noise_between_sampler_and_trainer(tmp_path, model):
    """Guards a precision that the sampler ignores, and one that changes what is trained or evaluated."""
    rows = {}
    for precision in (None, 'bfloat16', 'int8', 'fp8'):
        # With fewer than all 17 tokens a support that differs in one would cover up the noise of probabilities.
        settings = [f'Sampling.precision = {precision!r}', 'Sampling.support_size = 17', 'Run.steps = 1']
        start, rows[precision] = run(tmp_path / str(precision), model, *settings, 'Run.evaluate_every = 1', task=TASK)
        assert start == rows.setdefault('start', start), 'evaluation is as precise as ever'
    noise = [rows[precision]['update/kl_noise'] for precision in (None, 'bfloat16', 'int8', 'fp8')]
    assert np.all(np.array(noise) < [1e-9, 1e-4, 1e-3, 1e-2])
    assert np.all(np.array(noise[1:]) > [1e-7, 1e-6, 1e-5])
