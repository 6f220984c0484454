"""Sampling on a tiny decoder: what is recorded is what was sampled from, and lengths are exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from troll_jax.models import decoder as decoders
from troll_jax.ops.aggregation import token_mean
from troll_jax.ops.losses import ppo_clip
from troll_jax.ops.support import default_tail
from troll_jax.rollout import make_sampler
from troll_jax.sharding import make_mesh, named_sharding
from troll_jax.types import Progress, Prompts, TrainState
from troll_jax.update import make_batch, make_update

VOCAB, PROMPT, RESPONSE, GROUP, KEPT, MASS = 38, 5, 7, 3, 11, 1 - 1e-5
CONFIG = decoders.DecoderConfig(
    vocab_size=VOCAB,
    width=12,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=6,
    mlp_width=22,
    rope_theta=1e4,
    norm_eps=1e-6,
    tied_embeddings=False,
    compute_dtype='float32',
)
NEVER = VOCAB + 1  # a token that no model says


@functools.cache
def policy_params():
    """A policy far from uniform whose choices depend on the prompt."""
    leaves, tree = jax.tree.flatten_with_path(decoders.abstract(CONFIG)[1])
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = lambda path, leaf, key: (1.0 if path[-1].key == 'scale' else 0.0) + 0.4 * jax.random.normal(key, leaf.shape)
    return jax.tree.unflatten(tree, [draw(*leaf, key) for leaf, key in zip(leaves, keys, strict=True)])


def some_prompts(batch: int = 4) -> Prompts:
    tokens = jax.random.randint(jax.random.key(1), (batch, PROMPT), 0, VOCAB)
    lengths = jnp.array([3, 5, 1, 4, 2, 5, 3, 4])[:batch]
    return Prompts(jnp.where(jnp.arange(PROMPT)[None] < lengths[:, None], tokens, 0), lengths)


def keys_of(batch: int = 4) -> jax.Array:
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(2), i))(jnp.arange(batch))


@functools.cache
def sampler(temperature=1.0, stop=(NEVER,), group=GROUP):
    return make_sampler(
        CONFIG,
        samples_per_prompt=group,
        max_response_length=RESPONSE,
        temperature=temperature,
        stop_tokens=stop,
        max_tokens=KEPT,
        mass=MASS,
    )


@functools.cache
def rollout(temperature=1.0, stop=(NEVER,), group=GROUP):
    return jax.tree.map(np.asarray, sampler(temperature, stop, group)(policy_params(), some_prompts(), keys_of()))


def responses(result) -> list[list[int]]:
    """The response tokens of every row, up to its length."""
    bounds = zip(result.tokens, result.prompt_lengths, result.response_lengths, strict=True)
    return [row[start : start + length].tolist() for row, start, length in bounds]


@functools.cache
def forward():
    """Jitted log-probabilities [R, S, V] of the next token, by the forward pass of training."""
    graphdef, _ = decoders.abstract(CONFIG)

    @functools.partial(jax.jit, static_argnames='temperature')
    def run(tokens, temperature=1.0):
        decoder = decoders.bind(graphdef, policy_params())
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return jax.nn.log_softmax(decoder(tokens, index, jnp.ones_like(tokens)) @ decoder.unembedding.T / temperature)

    return run


@pytest.mark.parametrize('temperature', [1.0, 0.6])
def test_record_equals_the_forward_pass_of_training(temperature):
    """Guards the ratio of one on the first update: log-prob, entropy and support as training sees them, per token."""
    result = rollout(temperature)
    expected = np.asarray(forward()(result.tokens, temperature=temperature))
    for row, tokens in enumerate(responses(result)):
        for t, token in enumerate(tokens):
            log_probs = expected[row, result.prompt_lengths[row] + t - 1]
            np.testing.assert_allclose(result.log_probs[row, t], log_probs[token], atol=1e-4)
            np.testing.assert_allclose(result.entropy[row, t], -np.sum(np.exp(log_probs) * log_probs), atol=1e-4)
            listed, values = result.support.tokens[row, t], result.support.log_probs[row, t]
            real = listed >= 0
            assert token in listed[real] and len(set(listed[real])) == real.sum() and np.all(values[~real] == -np.inf)
            np.testing.assert_allclose(values[real], log_probs[listed[real]], atol=1e-4)
            most_probable = np.sort(log_probs)[::-1][: real.sum() - 1]
            np.testing.assert_allclose(np.sort(values[real])[::-1][: real.sum() - 1], most_probable, atol=1e-4)


def test_update_finds_the_policy_unchanged():
    """Guards the whole way from sampler to update: divergence and log-ratio of a policy from itself."""
    result = rollout()
    update = make_update(
        CONFIG,
        optax.sgd(0.0),
        objective=ppo_clip,
        aggregation=token_mean,
        temperature=1.0,
        tail_rule=default_tail,
        max_tokens=KEPT,
        mass=MASS,
    )
    params = jax.tree.map(jnp.copy, policy_params())
    batch = make_batch(jax.tree.map(jnp.asarray, result), jnp.ones(len(result.tokens)))
    start = Progress(jnp.int32(0), jnp.int32(0), jnp.float32(0))
    metrics = update(TrainState(start, params, optax.sgd(0.0).init(params)), batch)[1].metrics
    assert metrics['kl_max'] < 1e-4 and abs(metrics['ratio_max'] - 1) < 1e-4
    np.testing.assert_allclose(metrics['entropy_mean'], result.entropy.mean(), atol=1e-4)
    np.testing.assert_allclose(metrics['loss'], -1, atol=1e-5)


def test_rows_are_prompt_and_response_without_a_gap():
    """Guards positions and what follows a response: the prompt as it was, and zeros past the end."""
    free = rollout()
    stop = int(free.tokens[0, free.prompt_lengths[0] + 2])
    result, prompts = rollout(stop=(stop,)), jax.tree.map(np.asarray, some_prompts())
    assert result.tokens.shape == (4 * GROUP, PROMPT + RESPONSE) and result.tokens.dtype == np.int32
    np.testing.assert_array_equal(result.prompt_lengths, np.repeat(prompts.lengths, GROUP))
    for row, tokens in enumerate(result.tokens):
        length = result.prompt_lengths[row]
        np.testing.assert_array_equal(tokens[:length], prompts.tokens[row // GROUP, :length])
        assert np.all(tokens[length + result.response_lengths[row] :] == 0)


def test_without_a_stop_token_the_limit_cuts():
    """Guards the limit: T tokens, not T ± 1, and not counted as stopped."""
    result = rollout()
    assert np.all(result.response_lengths == RESPONSE) and not result.stopped.any()


@pytest.mark.parametrize('count', [1, 2])
def test_responses_end_with_the_first_stop_token(count):
    """Guards every stop id, wherever it comes first: at the first position, at the last, or not at all.

    What comes before does not depend on where a response stops, so the unstopped rollout says what to expect.
    """
    free = responses(rollout())
    first, last = free[0][0], free[1][-1]
    stop = (first,) if count == 1 else (first, last)
    result = rollout(stop=stop)
    expected = []
    for tokens in free:
        at = [t for t, token in enumerate(tokens) if token in stop]
        expected.append(tokens[: at[0] + 1] if at else tokens)
    assert responses(result) == expected
    assert len(expected[0]) == 1 and any(len(tokens) == RESPONSE for tokens in expected)
    np.testing.assert_array_equal(result.stopped, [tokens[-1] in stop for tokens in expected])
    assert result.stopped.any() and not result.stopped.all()


def test_stop_at_the_last_position_counts_as_stopped():
    """Guards the two ends that have the same length: by a stop token, and by the limit."""
    free = responses(rollout())
    row = next(row for row, tokens in enumerate(free) if tokens[-1] not in tokens[:-1])
    result = rollout(stop=(free[row][-1],))
    assert result.response_lengths[row] == RESPONSE and result.stopped[row]


def test_stop_token_that_is_the_padding_token():
    """Guards masks from lengths: with 0 as stop token and as padding, the stop token still belongs to its response."""
    params = policy_params() | {'lm_head': policy_params()['lm_head'].at[0].mul(4.0)}
    result = jax.tree.map(np.asarray, sampler(stop=(0,))(params, some_prompts(), keys_of()))
    assert result.stopped.any()
    for tokens, stopped in zip(responses(result), result.stopped, strict=True):
        assert (tokens[-1] == 0) == stopped and 0 not in tokens[:-1]


def test_loop_ends_with_the_last_response():
    """Guards the early end of the loop: what was never decoded is still zero in the record."""
    free = responses(rollout())
    stop = tuple(sorted({tokens[1] for tokens in free}))
    result = rollout(stop=stop)
    longest = result.response_lengths.max()
    assert result.stopped.all() and longest <= 2
    assert np.all(result.entropy[:, longest:] == 0) and np.all(result.entropy[:, :longest] > 0)


def test_greedy_decoding_takes_the_most_probable_token():
    """Guards temperature 0: argmax of the whole forward pass, and the record of the policy at temperature 1."""
    result = rollout(0.0, group=1)
    log_probs = np.asarray(forward()(result.tokens))
    for row, tokens in enumerate(responses(result)):
        before = log_probs[row, result.prompt_lengths[row] - 1 :][:RESPONSE]
        assert tokens == before.argmax(axis=1).tolist()
        np.testing.assert_allclose(result.log_probs[row], before.max(axis=1), atol=1e-4)
    assert len({tuple(tokens) for tokens in responses(result)}) > 1


def test_temperature_sharpens():
    """Guards a temperature that is recorded and not sampled with, or sampled with and not recorded."""
    assert rollout(0.6).entropy.mean() < rollout().entropy.mean() - 0.1


def test_first_tokens_follow_the_policy():
    """Guards the sampling as a whole: frequencies of the first token over many samples of one prompt."""
    many = make_sampler(
        CONFIG,
        samples_per_prompt=4001,
        max_response_length=1,
        temperature=1.0,
        stop_tokens=(NEVER,),
        max_tokens=KEPT,
        mass=MASS,
    )
    prompts = jax.tree.map(lambda x: x[:1], some_prompts())
    result = many(policy_params(), prompts, keys_of(1))
    first = np.asarray(result.tokens)[:, prompts.lengths[0]]
    frequencies = np.bincount(first, minlength=VOCAB) / 4001
    length = int(prompts.lengths[0])
    probs = np.exp(np.asarray(forward()(jnp.pad(prompts.tokens, [(0, 0), (0, RESPONSE)])))[0, length - 1])
    assert np.all(np.abs(frequencies - probs) < 4.5 * np.sqrt(probs * (1 - probs) / 4001) + 1 / 4001)


def test_samples_of_a_prompt_differ_and_keys_decide():
    """Guards groups without a spread: each sample and each key its own randomness, the same keys the same responses."""
    run = sampler()
    assert len({tuple(tokens) for tokens in responses(rollout())[:GROUP]}) > 1
    again = run(policy_params(), some_prompts(), keys_of())
    np.testing.assert_array_equal(again.tokens, rollout().tokens)
    other = run(policy_params(), some_prompts(), jax.random.split(jax.random.key(7), 4))
    assert np.any(np.asarray(other.tokens) != rollout().tokens)


def test_responses_do_not_depend_on_the_batch():
    """Guards resuming and evaluation in other batch sizes: order, company and number of prompts must not matter."""
    prompts, keys = some_prompts(8), keys_of(8)
    whole = jax.tree.map(np.asarray, sampler()(policy_params(), prompts, keys))
    order = jnp.array([5, 2, 7])
    part = sampler()(policy_params(), jax.tree.map(lambda x: x[order], prompts), keys[order])
    rows = (np.asarray(order)[:, None] * GROUP + np.arange(GROUP)).reshape(-1)
    np.testing.assert_array_equal(part.tokens, whole.tokens[rows])
    np.testing.assert_allclose(part.log_probs, whole.log_probs[rows], atol=1e-5)


def test_second_rollout_does_not_compile():
    """Guards against lengths or keys that become part of the program."""
    run = make_sampler(
        CONFIG,
        samples_per_prompt=1,
        max_response_length=3,
        temperature=1.0,
        stop_tokens=(1,),
        max_tokens=KEPT,
        mass=MASS,
    )
    for seed in range(3):
        prompts = some_prompts()._replace(lengths=jnp.array([1 + seed, 5, 2, 1]))
        run(policy_params(), prompts, jax.random.split(jax.random.key(seed), 4))
    assert run._cache_size() == 1


@pytest.mark.parametrize('shape', [(4, 1, 2), (2, 2, 2)])
def test_mesh_does_not_matter(shape):
    """Guards the sharded vocabulary, cache and rows: the same responses, and the same record."""
    mesh = make_mesh(*shape)
    _, shapes = decoders.abstract(CONFIG, mesh)
    with jax.set_mesh(mesh):
        params = jax.device_put(policy_params(), jax.tree.map(lambda leaf: leaf.sharding, shapes))
        put = lambda x: jax.device_put(x, named_sharding(mesh, ('batch', *[None] * (x.ndim - 1))))
        result = jax.tree.map(np.asarray, sampler()(params, jax.tree.map(put, some_prompts()), put(keys_of())))
    expected = rollout()
    np.testing.assert_array_equal(result.tokens, expected.tokens)
    np.testing.assert_array_equal(result.support.tokens, expected.support.tokens)
    for name in ('log_probs', 'entropy'):
        np.testing.assert_allclose(getattr(result, name), getattr(expected, name), atol=1e-5)


def test_bad_settings_are_refused():
    """Guards messages with numbers, at the start of a run and not after its first rollout."""
    good = dict(
        samples_per_prompt=2, max_response_length=3, temperature=1.0, stop_tokens=(1,), max_tokens=KEPT, mass=MASS
    )
    for change, message in [
        (dict(temperature=-0.5), r'got -0\.5'),
        (dict(stop_tokens=()), 'no stop token'),
        (dict(samples_per_prompt=0), 'got 0 and 3'),
        (dict(max_response_length=0), 'got 2 and 0'),
        (dict(max_tokens=VOCAB + 1), f'vocabulary size {VOCAB}; got {VOCAB + 1}'),
    ]:
        with pytest.raises(ValueError, match=message):
            make_sampler(CONFIG, **good | change)
