"""RoPE at the sizes of published models; `test_decoder.py` has it inside of small ones."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from troll_jax.models.families import decoder_config
from troll_jax.models.hf_weights import load_config
from troll_jax.models.rotary import angles_where, rotary_angles, rotary_frequencies, rotate

MODELS = Path(__file__).parent.parent / 'configs/models'


@pytest.mark.parametrize('model', ['qwen3-8b', 'llama-3.2-3b', 'llama-3.1-8b', 'smollm3-3b', 'apertus-8b'])
def test_frequencies_are_those_of_transformers(model):
    """Guards the bounds between planes that are slowed, partly and not at all, for all 64 planes; and float32: a
    relative error of 1e-6 rotates the fastest plane by 0.07 radians at the end of a context of 65,536 tokens."""
    hf_config = load_config(MODELS / model)
    config = decoder_config(hf_config)
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    expected = LlamaRotaryEmbedding(hf_config).inv_freq.numpy()
    assert frequencies.dtype == np.float32 and frequencies.shape == (64,)
    np.testing.assert_allclose(frequencies, expected, rtol=3e-7)
    unscaled = rotary_frequencies(config.head_dim, config.rope_theta, None)
    assert np.array_equal(frequencies, unscaled) == (config.rope_scaling is None)


def test_a_layer_without_positions_changes_no_bit():
    """Guards against a layer without RoPE that rounds, and against a switch that works the wrong way around."""
    angles = rotary_angles(jnp.array([[3, 1000]]), rotary_frequencies(6, 1e4, None))
    x = jax.random.normal(jax.random.key(0), (1, 2, 5, 6), jnp.bfloat16)
    off, on = (rotate(x, angles_where(jnp.array(rotates), angles)) for rotates in (False, True))
    np.testing.assert_array_equal(off, x)
    np.testing.assert_array_equal(on, rotate(x, angles))
    assert jnp.all(jnp.any(on != x, axis=-1))
