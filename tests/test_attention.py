"""Every implementation of attention against a written-out float64 reference; what each platform gets."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies.program_cost import count_flops
from troll_jax.models import attention as attentions
from troll_jax.models.attention import (
    IMPLEMENTATIONS,
    best_implementation,
    packed_attention,
    splash_attention,
    xla_attention,
)
from troll_jax.models.layers import REMAT_POLICIES
from troll_jax.sharding import make_mesh

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 134, 6, 2, 10
# Segments of odd lengths, padding at the end, and an id that comes back; the second row is padding from its start.
SEGMENTS = np.array(
    [[1] * 7 + [2] * 53 + [3] * 1 + [1] * 41 + [0] * 32, [0] * 3 + [4] * 120 + [0] * 11],
    np.int32,
)


def inputs() -> list[jax.Array]:
    """Queries, keys, values, and what weights the outputs in the loss."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [jax.random.normal(key, (BATCH, LENGTH, n, HEAD_DIM)) for key, n in zip(keys, heads, strict=True)]


@functools.cache
def reference() -> tuple[np.ndarray, list[np.ndarray]]:
    """Outputs, and gradients of Σ outputs · weights, written out in float64."""
    q, k, v, weights = (np.asarray(x, np.float64) for x in inputs())
    out, grads = np.zeros_like(q), [np.zeros_like(x) for x in (q, k, v)]
    for b in range(BATCH):
        allowed = (SEGMENTS[b][:, None] == SEGMENTS[b][None]) & np.tri(LENGTH, dtype=bool)
        for h in range(HEADS):
            kh = h // (HEADS // KV_HEADS)
            logits = np.where(allowed, q[b, :, h] @ k[b, :, kh].T / np.sqrt(HEAD_DIM), -np.inf)
            probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
            probs /= probs.sum(axis=-1, keepdims=True)
            out[b, :, h] = probs @ v[b, :, kh]
            to_probs = weights[b, :, h] @ v[b, :, kh].T
            to_logits = probs * (to_probs - np.sum(probs * to_probs, axis=-1, keepdims=True)) / np.sqrt(HEAD_DIM)
            grads[0][b, :, h] = to_logits @ k[b, :, kh]
            grads[1][b, :, kh] += to_logits.T @ q[b, :, h]
            grads[2][b, :, kh] += probs.T @ weights[b, :, h]
    return out, grads


def check(function, mesh=None) -> None:
    def loss(q, k, v, weights):
        out = function(q, k, v, jnp.asarray(SEGMENTS))
        return jnp.sum(out * weights), out

    with jax.set_mesh(mesh or make_mesh(1, 1, 1, devices=jax.devices()[:1])):
        (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs())
    expected_out, expected_grads = reference()
    np.testing.assert_allclose(out, expected_out, atol=2e-6)
    for grad, expected in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected, atol=2e-5)


def test_xla_equals_the_reference():
    """Guards segments that see each other, a future that is seen, the order of grouped heads, NaN at padding."""
    for context in (1, 2):
        mesh = make_mesh(1, 1, 2, jax.devices()[: 2 * context], context=context)
        check(functools.partial(packed_attention, implementation='xla'), mesh)


def test_a_backward_pass_keeps_no_probabilities():
    """Guards the memory of rows on a CPU: probabilities [B, H, S, S] of every layer, and their exponentials."""
    _, backward = jax.vjp(lambda *qkv: xla_attention(*qkv, jnp.asarray(SEGMENTS)), *inputs()[:3])
    assert max(x.size for x in jax.tree.leaves(backward)) < BATCH * HEADS * LENGTH**2


@pytest.mark.parametrize('context', [1, 2])
def test_splash_equals_the_reference(monkeypatch, context):
    """Guards the same on TPUs, and there the scale, what fills a row up to whole blocks, blocks that are skipped, and
    the split over a mesh of rows, heads, and queries, which begin in the middle of a row."""
    monkeypatch.setattr(attentions, '_SPLASH_BLOCK', 128)
    mesh = make_mesh(1, 2, 2, jax.devices()[: 4 * context], context=context)
    check(functools.partial(splash_attention, interpret=True), mesh)


def test_a_tpu_holds_no_logits_of_a_whole_row():
    """Guards against a kernel that is left out: 'xla' shows what the text of such a program looks like."""
    length = 1100
    shapes = [jax.ShapeDtypeStruct((1, length, n, 16), jnp.bfloat16) for n in (HEADS, KV_HEADS, KV_HEADS)]
    segments = jnp.ones((1, length), jnp.int32)
    found = {}
    for name in ('xla', 'splash'):
        loss = lambda *qkv, name=name: jnp.sum(
            packed_attention(*qkv, segments, implementation=name).astype(jnp.float32)
        )
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*shapes)
        text = traced.lower(lowering_platforms=('tpu',)).as_text()
        rows = {length, 3 * 512}  # as it is, and filled up to whole blocks
        found[name] = {
            n for shape in re.findall(r'tensor<([\dx]+)x', text) for n in rows if shape.split('x').count(str(n)) > 1
        }
        assert ('tpu_custom_call' in text) == (name == 'splash')
    assert found == {'xla': {length}, 'splash': set()}


def test_cudnn_is_traced_for_a_gpu(monkeypatch):
    """Guards what can be guarded without a GPU: the kernels' own checks of shapes pass, at an odd length too, and
    forward and backward pass call them."""
    monkeypatch.setattr('jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version', lambda: 91000)
    shapes = [jax.ShapeDtypeStruct((BATCH, LENGTH, n, 16), jnp.bfloat16) for n in (HEADS, KV_HEADS, KV_HEADS)]

    def loss(q, k, v):
        return jnp.sum(packed_attention(q, k, v, jnp.asarray(SEGMENTS), implementation='cudnn').astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    for mesh in (None, make_mesh(1, 2, 2, jax.devices()[:4]), make_mesh(1, 2, 2, context=2)):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh if mesh else jax.sharding.AbstractMesh((), ())):
            exported = gradient.trace(*shapes).lower(lowering_platforms=('cuda',)).as_text()
        assert '__cudnn$fmhaScaleBiasSoftmax(' in exported and '__cudnn$fmhaScaleBiasSoftmaxBackward(' in exported


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_policies_that_keep_attention(implementation, monkeypatch):
    """Guards attention, most of a layer on long rows, which was no product to the policy and was taken twice."""
    monkeypatch.setattr('jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version', lambda: 91000)
    q, k, v = (jnp.ones((1, 256, n, 128), jnp.bfloat16) for n in (2, 1, 1))
    weight = jnp.ones((128, 128), jnp.bfloat16)

    def layer(q, weight):
        q, segments = q @ weight, jnp.ones((1, 256), int)
        return jnp.sum(packed_attention(q, k, v, segments, implementation=implementation) @ weight)

    def flops(function) -> float:
        return count_flops(jax.make_jaxpr(jax.grad(function, argnums=(0, 1)))(q, weight).jaxpr, 1)[0]

    kept = {name: flops(jax.checkpoint(layer, policy=policy)) for name, policy in REMAT_POLICIES.items()}
    assert kept['dots'] == flops(layer) < kept['attention'] < kept['full']


@pytest.mark.parametrize(
    'platform, capability, dtype, head_dim, expected',
    [
        ('tpu', None, 'bfloat16', 128, 'splash'),
        ('gpu', '9.0', 'bfloat16', 128, 'cudnn'),
        ('gpu', '10.0', 'bfloat16', 64, 'cudnn'),
        ('gpu', '7.5', 'bfloat16', 128, 'xla'),  # older than cuDNN's kernels,
        ('gpu', 'gfx942', 'bfloat16', 128, 'xla'),  # which are NVIDIA's,
        ('gpu', '9.0', 'float32', 128, 'xla'),  # know no float32,
        ('gpu', '9.0', 'bfloat16', 10, 'xla'),  # and no such heads
        ('cpu', None, 'bfloat16', 128, 'xla'),
    ],
)
def test_each_device_gets_the_kernel_that_runs_there(platform, capability, dtype, head_dim, expected):
    """Guards against a kernel that its device refuses when a run starts."""
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    assert best_implementation(device, dtype, head_dim) == expected
    assert expected in attentions.IMPLEMENTATIONS
