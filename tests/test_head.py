"""The sparse head against log-softmax over all logits, on one device and on meshes; and what it keeps in memory."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from troll_jax.models.head import logits, sparse_head
from troll_jax.ops.categorical import entropy
from troll_jax.ops.support import at_tokens, sparsify
from troll_jax.sharding import make_mesh, named_sharding

TOKENS, WIDTH, VOCAB, KEPT, MASS, TEMPERATURE = 48, 16, 640, 7, 0.9, 0.7
KEYS = jax.random.split(jax.random.key(0), 4)
HIDDEN = jax.random.normal(KEYS[0], (TOKENS, WIDTH))
UNEMBEDDING = 0.5 * jax.random.normal(KEYS[1], (VOCAB, WIDTH))
SAMPLED = jax.random.randint(KEYS[2], (TOKENS,), 0, VOCAB)
OLD = jax.random.randint(KEYS[3], (TOKENS, KEPT), -1, VOCAB)  # with padding, and here and there a token twice


def dense(hidden, unembedding):
    """The outputs of the head, from all log-probabilities."""
    log_probs = jax.nn.log_softmax(logits(hidden, unembedding, temperature=TEMPERATURE, dtype='float32'))

    def one(log_probs, token, old):
        own = sparsify(jax.lax.stop_gradient(log_probs), token, support_size=KEPT, support_mass=MASS)
        own = own._replace(log_probs=at_tokens(log_probs, own.tokens))
        return log_probs[token], entropy(log_probs), at_tokens(log_probs, old), own

    return jax.vmap(one)(log_probs, SAMPLED, OLD)


EVERY = jnp.ones(TOKENS, bool)


def flat_head(*arguments, **settings):
    """The head of tokens [N], in eight rows."""
    hidden, unembedding, *others = arguments
    hidden, *others = (x.reshape(8, -1, *x.shape[1:]) for x in (hidden, *others))
    outputs = sparse_head(hidden, unembedding, *others, **settings)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tuple(outputs))


def ours_at(hidden, unembedding, temperature, chunk=1024, support_size=KEPT, mask=EVERY):
    settings = dict(temperature=temperature, support_size=support_size, support_mass=MASS, dtype='float32')
    return flat_head(hidden, unembedding, SAMPLED, OLD, mask, chunk=chunk, **settings)


ours = functools.partial(ours_at, temperature=TEMPERATURE)


def with_gradients(function):
    """Outputs, and the gradients of a random sum of all of them by hidden states and unembedding."""

    def total(hidden, unembedding):
        outputs = function(hidden, unembedding)
        floats = [x for x in jax.tree.leaves(outputs) if x.dtype == jnp.float32]
        weights = [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(floats)]
        listed = [jnp.sum(jnp.where(x > -jnp.inf, x, 0) * w) for x, w in zip(floats, weights, strict=True)]
        return sum(listed), outputs

    return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))


@functools.cache
def reference():
    return jax.device_get(with_gradients(dense)(HIDDEN, UNEMBEDDING))


def assert_same(one, other):
    (gradients, outputs), (expected_gradients, expected) = one, other
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), outputs, expected)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=2e-6 * np.abs(wanted).max())


def test_an_offset_of_the_logits_changes_no_digit():
    """Guards log-probabilities, supports and gradients that are rounded at the size of the logits."""
    hidden, unembedding = jnp.round(2 * HIDDEN), jnp.round(8 * UNEMBEDDING) / 8  # products and sums are exact
    shift = lambda by: (hidden.at[:, 0].set(1), unembedding.at[:, 0].set(by))
    plain, shifted = (with_gradients(functools.partial(ours_at, temperature=1.0))(*shift(by)) for by in (0.0, 90.0))
    jax.tree.map(np.testing.assert_array_equal, plain[1], shifted[1])
    np.testing.assert_allclose(plain[0][1][:, 1:], shifted[0][1][:, 1:], rtol=1e-5, atol=1e-6)
    scores = np.float64(hidden.at[:, 0].set(1)) @ np.float64(unembedding.at[:, 0].set(90.0)).T
    exact = scores - scores.max(axis=1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(shifted[1][0], exact[np.arange(TOKENS), SAMPLED], rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize('chunk', [1024, 48, 10, 1])
def test_equals_all_logits_for_any_chunk(chunk):
    """Guards the written-out derivative, of log-probs, entropy and both supports, and chunks that do not divide."""
    assert_same(with_gradients(functools.partial(ours, chunk=chunk))(HIDDEN, UNEMBEDDING), reference())


@pytest.mark.parametrize('mesh', [(1, 8, 1), (1, 1, 8), (2, 2, 2), (2, 1, 2)])
def test_equals_all_logits_on_any_mesh(mesh):
    """Guards shards of the vocabulary: offsets, candidates of all shards, and sums over the right axes; and the order
    of tokens where rows are split."""
    mesh = make_mesh(*mesh, context=8 // np.prod(mesh))
    with jax.set_mesh(mesh):
        hidden = jax.device_put(HIDDEN, named_sharding(mesh, (None, None)))
        unembedding = jax.device_put(UNEMBEDDING, named_sharding(mesh, ('vocab', 'embed')))
        gradients, outputs = with_gradients(functools.partial(ours, chunk=5))(hidden, unembedding)
        assert gradients[1].sharding.is_equivalent_to(unembedding.sharding, ndim=2)
        assert_same((gradients, outputs), reference())


@pytest.mark.parametrize(('count', 'mesh'), [(0, None), (1, None), (17, None), (48, None), (17, (2, 2, 2))])
def test_tokens_outside_of_the_mask_are_left_out(count, mesh):
    """Guards the order in which tokens come back, chunks that are skipped though needed, and gradients of no token."""
    mask = np.zeros(TOKENS, bool)
    mask[np.random.default_rng(count).permutation(TOKENS)[:count]] = True

    def total(function, hidden, unembedding):
        outputs = function(hidden, unembedding)
        weights = [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(outputs[:3])]
        real = [mask.reshape(-1, *[1] * (x.ndim - 1)) & (x > -jnp.inf) for x in outputs[:3]]
        listed = [jnp.sum(jnp.where(keep, x, 0) * w) for keep, x, w in zip(real, outputs[:3], weights, strict=True)]
        return sum(listed), outputs

    run = lambda function: jax.jit(jax.grad(functools.partial(total, function), argnums=(0, 1), has_aux=True))
    expected_gradients, expected = run(dense)(HIDDEN, UNEMBEDDING)
    head = functools.partial(ours, chunk=5, mask=jnp.asarray(mask))
    with jax.set_mesh(make_mesh(*mesh)) if mesh else contextlib.nullcontext():
        gradients, outputs = jax.device_get(run(head)(HIDDEN, UNEMBEDDING))
    pick = lambda tree: jax.tree.map(lambda x: np.asarray(x)[mask], tree)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), pick(outputs), pick(expected))
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=2e-6 * (np.abs(wanted).max() + 1))
    assert np.all(gradients[0][~mask] == 0)


def shapes_in(text: str) -> set[tuple[int, ...]]:
    """The shapes of all arrays in a compiled program."""
    found = re.findall(r'\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]', text)
    return {tuple(int(n) for n in shape.split(',')) for shape in found}


def test_no_array_of_tokens_by_vocabulary():
    """Guards the reason for this head: neither forward nor backward holds all logits, nor several chunks of them."""
    program = with_gradients(functools.partial(ours, chunk=8)).lower(HIDDEN, UNEMBEDDING).compile()
    sizes = [np.prod(shape) for shape in shapes_in(program.as_text()) if shape[-1:] != (WIDTH,)]
    assert max(sizes) <= 8 * VOCAB
    everything = with_gradients(dense).lower(HIDDEN, UNEMBEDDING).compile()
    assert max(np.prod(shape) for shape in shapes_in(everything.as_text())) >= TOKENS * VOCAB


def test_only_candidates_travel_between_shards():
    """Guards communication: of a token K candidates per shard, its log-sum-exp, its listed values; no logits."""
    mesh = make_mesh(1, 1, 8)
    with jax.set_mesh(mesh):
        unembedding = jax.device_put(UNEMBEDDING, named_sharding(mesh, ('vocab', 'embed')))
        text = with_gradients(functools.partial(ours, chunk=6)).lower(HIDDEN, unembedding).compile().as_text()
    travelling = [line for line in text.splitlines() if re.search(r'= .*(all-gather|all-reduce|all-to-all)\(', line)]
    assert travelling
    widths = {shape[-1] for line in travelling for shape in shapes_in(line.split('(')[0]) if shape[-1] != WIDTH}
    assert max(widths) <= 8 * KEPT < VOCAB // 8


@pytest.mark.parametrize('mesh', [(1, 1, 1), (1, 1, 8)])
def test_ids_past_the_tokenizer_have_no_probability(mesh):
    """Guards embeddings that are padded for speed, whose rows no text has trained: no mass, no gradient, no NaN, also
    where a shard of the vocabulary has some of them, or nothing else."""
    size = VOCAB - 100
    settings = dict(temperature=TEMPERATURE, support_size=KEPT, support_mass=MASS, dtype='float32', chunk=5)
    tokens, old = SAMPLED % size, jnp.where(OLD >= size, OLD - size, OLD)

    def head(hidden, unembedding, **changes):
        return flat_head(hidden, unembedding, tokens, old, EVERY, **settings | changes)

    expected = with_gradients(head)(HIDDEN, UNEMBEDDING[:size])
    with jax.set_mesh(make_mesh(*mesh, jax.devices()[: np.prod(mesh)])):
        masked = functools.partial(head, tokenizer_size=size)
        gradients, outputs = jax.device_get(with_gradients(masked)(HIDDEN, UNEMBEDDING))
    assert_same(((gradients[0], gradients[1][:size]), outputs), expected)
    assert np.all(gradients[1][size:] == 0)


def test_without_an_own_support():
    """Guards the cheaper head of the bucket rule: no top-K in the program, the rest as before."""
    outputs = jax.jit(functools.partial(ours, support_size=None))(HIDDEN, UNEMBEDDING)
    assert outputs[3] is None
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), outputs[:3], reference()[1][:3])
    programs = [str(jax.make_jaxpr(functools.partial(ours, support_size=k))(HIDDEN, UNEMBEDDING)) for k in (KEPT, None)]
    assert 'top_k' in programs[0] and 'top_k' not in programs[1]


def test_products_in_bfloat16_leave_a_float32_gradient():
    """Guards the accumulation over chunks: in bfloat16 it would stop at 256 equal parts."""

    def total(unembedding):
        settings = dict(temperature=1.0, support_size=None, support_mass=MASS, chunk=1, dtype='bfloat16')
        hidden = jnp.ones((1024, WIDTH))
        tokens = jnp.zeros(1024, jnp.int32)
        mask = jnp.ones(1024, bool)
        return jnp.sum(flat_head(hidden, unembedding, tokens, tokens[:, None], mask, **settings)[0])

    gradient = jax.jit(jax.grad(total))(jnp.zeros((4, WIDTH)))
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(
        gradient, 1024 * np.array([[0.75], [-0.25], [-0.25], [-0.25]]) * np.ones(WIDTH), rtol=1e-2
    )
