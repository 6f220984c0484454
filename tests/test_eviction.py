"""Sampling with a KV cache that is too small for all: who loses its slot goes on as if nothing had happened."""

import functools

import jax
import numpy as np
import pytest
from rollouts import CONFIG, GROUP, KEPT, MASS, NEVER, VOCAB, assert_same_responses, keys_of, policy_params

from troll_jax.models import decoder as decoders
from troll_jax.models.paged_attention import PAGE_SIZE
from troll_jax.rollout import Sampler
from troll_jax.sharding import make_mesh
from troll_jax.types import Prompts

LONG, ROOM = 40, 250  # tokens: a prompt of several pages, and a response of several


@functools.cache
def long_rollout(steps: int = 1, cache_gb: float | None = None, slots: int | None = None, devices: int = 1):
    """Responses of different lengths to 8 prompts of 1 to 40 tokens, three each."""
    run = Sampler(
        CONFIG,
        samples_per_prompt=GROUP,
        max_response_length=ROOM,
        temperature=1.0,
        stop_tokens=(NEVER,),
        support_size=KEPT,
        support_mass=MASS,
        steps=steps,
        cache_gb=cache_gb,
        slots=slots,
        prefill_chunk=16,
    )
    lengths = np.array([1, 40, 16, 31, 34, 33, 5, 32])
    tokens = np.random.default_rng(0).integers(0, VOCAB, (8, LONG)) * (np.arange(LONG) < lengths[:, None])
    limits = np.random.default_rng(1).integers(ROOM // 3, ROOM + 1, 8 * GROUP)
    mesh = make_mesh(devices=jax.devices()[:devices])
    params = jax.device_put(policy_params(), jax.tree.map(lambda x: x.sharding, decoders.abstract(CONFIG, mesh)[1]))
    with jax.set_mesh(mesh):
        return run(params, Prompts(tokens, lengths), keys_of(8), limits)


@pytest.mark.parametrize(('steps', 'devices'), [(1, 1), (4, 2)])
def test_responses_do_not_depend_on_the_memory(steps, devices):
    """Guards eviction: pages that two sequences write, prompts that are gone when they are needed again, tokens that a
    prefill puts elsewhere. The cache has a quarter of the pages that all sequences take together."""
    whole = long_rollout()
    page = 2 * 2 * PAGE_SIZE * CONFIG.kv_heads * CONFIG.head_dim * 4  # bytes in two layers
    pages = GROUP * 8 * -(-(LONG + ROOM) // PAGE_SIZE) // 4 // devices
    result = long_rollout(steps, (pages + 0.5) * page / 1e9, devices=devices)
    assert_same_responses(result, whole)
    assert result.stats.evictions > 2 and whole.stats.evictions == 0
    assert result.stats.slots == 32 and result.stats.prefills > whole.stats.prefills


def test_cache_that_is_too_small_is_refused():
    """Guards a rollout that would wait for pages forever."""
    with pytest.raises(ValueError, match=r'0\.00 GB .* prompt of 40 tokens with a response of 250 takes 0\.00'):
        long_rollout(cache_gb=1e-6)
