"""The decoder of every family against PyTorch's, against itself with a KV cache, packed, sharded and recomputed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from troll_jax.models.decoder import abstract, bind, decode_weights, init
from troll_jax.models.families import decoder_config
from troll_jax.models.hf_weights import load_pretrained
from troll_jax.models.paged_attention import init_pool
from troll_jax.models.rotary import RopeScaling
from troll_jax.sharding import make_mesh

VOCAB = 61


# A context of 32 tokens that was extended. Of RoPE's planes one rotates as before, one in part, the others less.
STRETCHED = dict(rope_type='llama3', rope_theta=1e2, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
STRETCHED |= {'original_max_position_embeddings': 32}
DEFAULT_ROPE = dict(rope_type='default', rope_theta=1e4)
# Per family: the class of its configs, and differences from Qwen3's in the small one. Two have no head_dim.
FAMILIES = {
    'Qwen3ForCausalLM': (Qwen3Config, dict(head_dim=10, hidden_size=34)),
    'Qwen2ForCausalLM': (Qwen2Config, dict()),
    'LlamaForCausalLM': (LlamaConfig, dict(head_dim=10, rope_parameters=STRETCHED)),
    'SmolLM3ForCausalLM': (SmolLM3Config, dict(head_dim=10, no_rope_layers=[1, 0, 1])),
    'ApertusForCausalLM': (ApertusConfig, dict(rope_parameters=STRETCHED, hidden_act='xielu')),
}


def tiny_hf_config(tied: bool = True, architecture: str = 'Qwen3ForCausalLM', **changes) -> PretrainedConfig:
    """Grouped queries, no two sizes alike, and heads · head_dim ≠ width where the family allows it."""
    of_family, own = FAMILIES[architecture]
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=36,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=47,
        tie_word_embeddings=tied,
        architectures=[architecture],
        dtype='float32',
        rope_parameters=DEFAULT_ROPE,
        **dict.fromkeys(['pad_token_id', 'bos_token_id', 'eos_token_id']),
    )
    return of_family(**sizes | own | changes)


def tiny_torch_model(hf_config: PretrainedConfig) -> PreTrainedModel:
    """Weights large enough, and norms far enough from one, that every one of them shows in the logits."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(1 + 0.3 * torch.randn_like(param) if param.ndim == 1 else 0.3 * torch.randn_like(param))
    return model


# Fields of DecoderConfig: 'other' is what Qwen3 is not, all at once.
KINDS = {
    'qwen3': {},
    'other': dict(
        qk_norm=False,
        qkv_bias=True,
        mlp='xielu',
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32),
        rope_layers=(True, False, True),
    ),
}
both_kinds = pytest.mark.parametrize('kind', KINDS)


@functools.cache
def tiny(kind: str = 'qwen3'):
    """Config, graphdef and params of a float32 decoder whose weights are five times larger than new ones."""
    config = decoder_config(tiny_hf_config(), compute_dtype='float32')
    config = dataclasses.replace(config, **KINDS[kind])
    params = jax.tree.map(lambda p: 5 * p if p.ndim > 1 else p, init(config, jax.random.key(3)))
    return config, abstract(config)[0], jax.tree.map(lambda p: jnp.where(p == 0, 0.3, p), params)  # new biases are 0


def some_tokens(batch: int, length: int) -> jax.Array:
    return jax.random.randint(jax.random.key(5), (batch, length), 0, VOCAB)


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, tokens, positions, segment_ids):
    return bind(graphdef, params)(tokens, positions, segment_ids)


PAGE = 4


def init_cache(config, rows: int, length: int, shards: int = 1):
    """A cache in which every row has the pages for `length` tokens, and its block table, by the pages of its shard."""
    width = -(-length // PAGE)
    table = np.arange(rows * width, dtype=np.int32).reshape(rows, width)[:, ::-1]
    pools = [init_pool(config, rows * width, PAGE, config.decode_attention) for _ in range(config.layers)]
    return pools, table % (rows * width // shards)


@functools.partial(jax.jit, static_argnums=0)
def decode(config, params, tokens, positions, cache):
    """Hidden states of the next tokens, and the cache with them."""
    others, layers = decode_weights(params, config)
    pools, table = cache
    decoder = bind(abstract(config)[0], others | {'layers': layers[0]})
    hidden, pools = decoder.decode(layers, tokens, positions, table, pools)
    return hidden, (pools, table)


def from_zero(batch: int, length: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(length)[None], (batch, length))


@pytest.mark.parametrize(('architecture', 'tied'), [('Qwen3ForCausalLM', True), *((name, False) for name in FAMILIES)])
def test_logits_equal_those_of_pytorch(architecture, tied, tmp_path):
    """Guards the differences between families, past the context that was extended too, the layout of heads, the
    convention of RoPE, the transposes on import; and that packed rows change nothing."""
    model = tiny_torch_model(tiny_hf_config(tied, architecture))
    model.save_pretrained(tmp_path)
    tokens = np.asarray(some_tokens(2, 41))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    config, params = load_pretrained(str(tmp_path), compute_dtype='float32')
    graphdef, _ = abstract(config)
    packed = np.concatenate([tokens[0], tokens[1, :19]])[None]
    positions = np.array([[*range(41), *range(19)]])
    hidden = forward(graphdef, params, packed, positions, np.array([[1] * 41 + [2] * 19]))
    logits = (hidden @ bind(graphdef, params).unembedding.T)[0]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits[:41], expected[0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits[41:], expected[1, :19], atol=1e-4, rtol=0)


@both_kinds
def test_bfloat16_costs_little_more_than_rounded_weights(kind):
    """Guards rotary angles against being computed in bfloat16, which cannot tell positions past 256 apart."""
    config, graphdef, params = tiny(kind)
    tokens, positions, segments = some_tokens(2, 11), 1000 + from_zero(2, 11), jnp.ones((2, 11), jnp.int32)
    graphdef16, _ = abstract(dataclasses.replace(config, compute_dtype='bfloat16'))
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    exact = forward(graphdef, params, tokens, positions, segments)
    computed = forward(graphdef16, params, tokens, positions, segments)
    assert computed.dtype == jnp.bfloat16
    floor = jnp.linalg.norm(forward(graphdef, rounded, tokens, positions, segments) - exact)
    assert jnp.linalg.norm(computed.astype(jnp.float32) - exact) < 3 * floor


@both_kinds
def test_prefill_and_decoding_equal_the_whole_sequence(kind):
    """Guards the KV cache: rows of different lengths, right padding that must never be seen, positions past the end."""
    config, graphdef, params = tiny(kind)
    lengths, total = jnp.array([1, 3, 5]), 11
    tokens = some_tokens(3, total)
    whole = forward(graphdef, params, tokens, from_zero(3, total), jnp.ones((3, total), jnp.int32))

    padded = jnp.where(from_zero(3, 5) < lengths[:, None], tokens[:, :5], 60)
    positions = jnp.where(from_zero(3, 5) < lengths[:, None], from_zero(3, 5), -1)
    hidden, cache = decode(config, params, padded, positions, init_cache(config, 3, total))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(hidden[row, :length], whole[row, :length], atol=3e-5, rtol=0)
    for step in range(10):  # rows are idle when they have ended
        positions = lengths[:, None] + step
        positions = jnp.where(positions < total, positions, -1)
        hidden, cache = decode(config, params, jnp.take_along_axis(tokens, positions, axis=1), positions, cache)
        assert jnp.all(jnp.isfinite(hidden))
        for row, position in enumerate(positions[:, 0]):
            if position >= 0:
                np.testing.assert_allclose(hidden[row, 0], whole[row, position], atol=3e-5, rtol=0)


def test_packed_sequences_do_not_see_each_other():
    """Guards the segment mask, and positions that restart inside a row."""
    _, graphdef, params = tiny()
    tokens = some_tokens(1, 12)[0]
    pad = jnp.full(12, 60)
    rows = [jnp.concatenate(row) for row in ([tokens, pad[:3]], [tokens[:5], pad[:10]], [tokens[5:], pad[:8]])]
    positions = [[*range(5), *range(7), *range(3)], [*range(15)], [*range(15)]]
    segments = [[1] * 5 + [2] * 7 + [0] * 3, [1] * 5 + [0] * 10, [1] * 7 + [0] * 8]
    packed, one, two = forward(graphdef, params, jnp.stack(rows), jnp.array(positions), jnp.array(segments))
    np.testing.assert_allclose(packed[:12], jnp.concatenate([one[:5], two[:7]]), atol=1e-5, rtol=0)


@both_kinds
def test_padding_has_finite_values_and_no_influence_on_gradients(kind):
    """Guards against the NaN of a softmax over nothing, in a row that is padding altogether too; every parameter is
    learnt."""
    _, graphdef, params = tiny(kind)
    segments = jnp.array([[1] * 5 + [0] * 2, [0] * 7])

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params, tokens):
        hidden = forward(graphdef, params, tokens, from_zero(2, 7), segments)
        return jnp.sum(jnp.where(segments[..., None] > 0, hidden, 0) ** 2), hidden

    grads, hidden = gradient(params, some_tokens(2, 7))
    assert jnp.isfinite(hidden).all()
    assert all(jnp.isfinite(grad).all() and jnp.any(grad != 0) for grad in jax.tree.leaves(grads))
    others, _ = gradient(params, jnp.where(segments > 0, some_tokens(2, 7), 59))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5), grads, others)


def test_recomputation_does_not_change_gradients():
    """Guards a policy that is accepted and not applied: same gradients, but less is kept for them."""
    config, _, params = tiny()
    policies = (None, 'dots', 'attention', 'full')
    losses = [squared_norm(abstract(dataclasses.replace(config, remat=remat))[0]) for remat in policies]
    plain, *others = (jax.jit(jax.grad(loss))(params) for loss in losses)
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-5), plain, other)
    kept = [saved_bytes(loss, params) for loss in losses]
    assert kept == sorted(set(kept), reverse=True)


def squared_norm(graphdef):
    ones = jnp.ones((2, 7), jnp.int32)
    return lambda params: jnp.sum(forward(graphdef, params, some_tokens(2, 7), from_zero(2, 7), ones) ** 2)


def saved_bytes(function, params) -> int:
    """Bytes that the forward pass hands to the backward pass."""
    residuals = jax.eval_shape(lambda p: jax.vjp(function, p)[1], params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))


def test_compiled_program_does_not_grow_with_depth():
    """Guards the scan over layers, in the forward pass and its gradient, if not all have RoPE too."""

    def lines(layers):
        config = decoder_config(tiny_hf_config(num_hidden_layers=layers), compute_dtype='float32')
        rope_layers = tuple(layer % 4 != 3 for layer in range(layers))
        config = dataclasses.replace(config, **KINDS['other'] | dict(rope_layers=rope_layers))
        graphdef, shapes = abstract(config)
        tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
        forward = jax.grad(lambda p, t: bind(graphdef, p)(t, t, t).sum())
        return len(jax.jit(forward).lower(shapes, tokens).as_text().splitlines())

    assert lines(5) == lines(11)


def divisible_config(kind: str = 'qwen3'):
    changes = dict(vocab_size=62, num_attention_heads=4, intermediate_size=46)
    config = decoder_config(tiny_hf_config(tied=False, **changes), compute_dtype='float32')
    return dataclasses.replace(config, **KINDS[kind])


@functools.cache
def divisible_params(kind: str = 'qwen3'):
    return init(divisible_config(kind), jax.random.key(3))


@both_kinds
@pytest.mark.parametrize('context', [1, 2])
def test_sharded_forward_and_decoding_equal_one_device(kind, context, capfd):
    """Guards the axes that parameters declare, and that the partitioner never falls back to replicating."""
    config, mesh = divisible_config(kind), make_mesh(2, -1, 2, context=context)
    graphdef, shapes = abstract(config, mesh)
    params = jax.tree.map(lambda p: jnp.where(p == 0, 0.3, p), divisible_params(kind))  # new biases are 0
    tokens, positions = some_tokens(8, 6), from_zero(8, 6)

    @functools.partial(jax.jit, static_argnums=2)
    def run(params, tokens, shards):
        decoder = bind(graphdef, params)
        hidden = decoder(tokens, positions, jnp.ones((8, 6), jnp.int32))
        return hidden, decode(config, params, tokens, positions, init_cache(config, 8, 7, shards))[0]

    expected = run(params, tokens, 1)
    with jax.set_mesh(mesh):
        got = run(jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, shapes)), tokens, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=0), expected, got)
    assert 'rematerialization' not in capfd.readouterr().err


def test_init_does_not_depend_on_the_mesh():
    """Guards against a run that starts elsewhere on another machine, and against unsharded starting values."""
    config, mesh = divisible_config(), make_mesh(2, 2, 2)
    params = init(config, jax.random.key(3), mesh)
    jax.tree.map(np.testing.assert_array_equal, divisible_params(), params)
    for param, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(abstract(config, mesh)[1]), strict=True):
        assert param.sharding.is_equivalent_to(leaf.sharding, param.ndim)


def test_layers_start_different_from_each_other():
    """Guards against one random key for all layers."""
    query = divisible_params()['layers']['attention']['query']
    assert jnp.std(query) == pytest.approx(0.02 * (1024 / query.shape[1]) ** 0.5, rel=0.1)
    assert not jnp.any(query[0] == query[1])


def test_structure_is_static():
    """Guards jit caches: the graphdef is hashable, equal for equal configs, and the same with a mesh."""
    config = divisible_config()
    one, other = abstract(config)[0], abstract(config, make_mesh(2, 2, 2))[0]
    assert one == other and hash(one) == hash(other) and hash(config) == hash(divisible_config())
    assert one != abstract(dataclasses.replace(config, remat='full'))[0]


def test_greedy_decoding_equals_transformers(tmp_path):
    """Guards prefill and decoding end to end, with the positions that a sampler would use."""
    model = tiny_torch_model(tiny_hf_config())
    model.save_pretrained(tmp_path)
    prompt = some_tokens(2, 3)
    with torch.no_grad():
        expected = model.generate(torch.tensor(np.asarray(prompt)), max_new_tokens=7, do_sample=False, pad_token_id=0)

    config, params = load_pretrained(str(tmp_path), compute_dtype='float32')
    graphdef, _ = abstract(config)
    unembedding = bind(graphdef, params).unembedding
    hidden, cache = decode(config, params, prompt, from_zero(2, 3), init_cache(config, 2, 10))
    tokens = prompt
    for position in range(3, 10):
        best = jnp.argmax(hidden[:, -1] @ unembedding.T, axis=-1)[:, None]
        tokens = jnp.concatenate([tokens, best], axis=1)
        hidden, cache = decode(config, params, best, jnp.full((2, 1), position), cache)
    np.testing.assert_array_equal(tokens, expected.numpy())


def test_bad_configs_are_refused_with_numbers():
    """Guards messages that name what was got and what would do."""
    config = divisible_config()
    with pytest.raises(ValueError, match=r"'full', 'attention', 'dots'.*'all'"):
        dataclasses.replace(config, remat='all')
    with pytest.raises(ValueError, match='float16'):
        dataclasses.replace(config, compute_dtype='float16')
    with pytest.raises(ValueError, match='got 4 and 3'):
        dataclasses.replace(config, kv_heads=3)
    with pytest.raises(ValueError, match='got 5'):
        dataclasses.replace(config, head_dim=5)
    with pytest.raises(ValueError, match="'swiglu', 'xielu'.*'relu'"):
        dataclasses.replace(config, mlp='relu')
    with pytest.raises(ValueError, match='3 layers; got 2 values'):
        dataclasses.replace(config, rope_layers=(True, False))
    with pytest.raises(ValueError, match=r"kv_heads = 3 .* 4 devices .*'tensor'; mlp_width = 46 .*; vocab_size = 62 "):
        abstract(dataclasses.replace(config, heads=12, kv_heads=3), make_mesh(1, 2, 4))
    with pytest.raises(ValueError, match=r"width = 34 is not a multiple of the 4 devices of mesh axes .*'fsdp'"):
        init(config, jax.random.key(0), make_mesh(1, 4, 2))
