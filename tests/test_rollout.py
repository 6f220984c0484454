"""Sampling on a tiny decoder: what is recorded is what was sampled from, in whichever slot, and lengths are exact."""

import dataclasses
import functools
import re
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from rollouts import (
    CONFIG,
    GROUP,
    KEPT,
    MASS,
    NEVER,
    NO_LIMITS,
    PROMPT,
    RESPONSE,
    VOCAB,
    assert_same_responses,
    forward,
    keys_of,
    policy_params,
    responses,
    rollout,
    sampler,
    some_prompts,
    steps_of_a_queue,
)
from test_decoder import FAMILIES, tiny_hf_config, tiny_torch_model
from tiny import decoder_config

from experiments.studies.plan import compiled_shapes
from troll_jax.models import decoder as decoders
from troll_jax.models.hf_weights import load_pretrained
from troll_jax.ops.losses import ppo_clip
from troll_jax.ops.support import default_tail
from troll_jax.packing import batch_shape, make_batch, make_layout
from troll_jax.rollout import Sampler, _uniforms
from troll_jax.score import Scoring
from troll_jax.sharding import make_mesh, named_sharding
from troll_jax.types import START, Prompts, TrainState
from troll_jax.update import make_update


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


@pytest.mark.parametrize('settings', [{}, {'temperature': 0.0}, {'top_p': 0.999}])
def test_ids_past_the_tokenizer_are_never_drawn(settings):
    """Guards ids of padded embeddings, which decode to nothing and which a random model draws as often as others."""
    size = 20
    run = Sampler(
        dataclasses.replace(CONFIG, tokenizer_size=size),
        samples_per_prompt=GROUP,
        max_response_length=RESPONSE,
        stop_tokens=(NEVER,),
        support_size=KEPT,
        support_mass=MASS,
        **{'temperature': 1.0, **settings},
    )
    result = jax.tree.map(np.asarray, run(policy_params(), some_prompts(), keys_of()))
    tokens = np.concatenate(responses(result))
    assert tokens.max() == size - 1 and result.support.tokens.max() == size - 1
    assert np.concatenate(responses(rollout(settings.get('temperature', 1.0)))).max() >= size
    if not settings:
        whole = np.asarray(forward()(result.tokens))
        for row, t in np.ndindex(result.log_probs.shape):
            at = whole[row, result.prompt_lengths[row] + t - 1]
            expected = at[result.tokens[row, result.prompt_lengths[row] + t]] - np.log(np.sum(np.exp(at[:size])))
            np.testing.assert_allclose(result.log_probs[row, t], expected, atol=1e-4)


def test_update_finds_the_policy_unchanged():
    """Guards the whole way from sampler to update: divergence and log-ratio of a policy from itself."""
    result = rollout()
    update = make_update(CONFIG, optax.sgd(0.0), ppo_clip, Scoring(1.0, default_tail, KEPT, MASS))
    params = jax.tree.map(jnp.copy, policy_params())
    count = len(result.tokens)
    weights = np.full(count, 1 / result.response_lengths.sum(), np.float32)
    layout = make_layout(result, batch_shape(count, PROMPT + RESPONSE))
    batch = make_batch(result, np.ones(count, np.float32), weights, layout)
    start = jax.tree.map(jnp.asarray, START)
    metrics = update(TrainState(start, params, optax.sgd(0.0).init(params)), batch)[1].metrics
    assert metrics['kl_max'] < 1e-4 and abs(metrics['ratio_max'] - 1) < 1e-4
    np.testing.assert_allclose(metrics['entropy_mean'], result.entropy.mean(), atol=1e-4)
    np.testing.assert_allclose(metrics['loss'], -1, atol=1e-5)


@functools.cache
def two_stops() -> tuple[int, int]:
    """The first token of the first response, and the last of another that says it nowhere before."""
    free = responses(rollout())
    first = free[0][0]
    return first, next(tokens[-1] for tokens in free if tokens[-1] not in tokens[:-1] and first not in tokens)


def test_rows_are_prompt_and_response_without_a_gap():
    """Guards positions and what follows a response: the prompt as it was, and zeros past the end."""
    result, prompts = rollout(stop=two_stops()), jax.tree.map(np.asarray, some_prompts())
    assert result.tokens.shape == (4 * GROUP, PROMPT + RESPONSE) and result.tokens.dtype == np.int32
    np.testing.assert_array_equal(result.prompt_lengths, np.repeat(prompts.lengths, GROUP))
    for row, tokens in enumerate(result.tokens):
        length = result.prompt_lengths[row]
        np.testing.assert_array_equal(tokens[:length], prompts.tokens[row // GROUP, :length])
        assert np.all(tokens[length + result.response_lengths[row] :] == 0)


def test_without_a_stop_token_the_limit_cuts():
    """Guards the limit: T tokens, not T ± 1, and not counted as stopped."""
    result = rollout()
    assert np.all(result.response_lengths == RESPONSE) and np.all(result.stop_token == -1) and not result.stopped.any()


def test_responses_end_with_the_first_stop_token():
    """Guards every stop id, wherever it comes first: at the first position, at the last, or not at all.

    What comes before does not depend on where a response stops, so the unstopped rollout says what to expect. Two ends
    have the same length: by a stop token at the last position, and by the limit.
    """
    stop, free, result = two_stops(), responses(rollout()), rollout(stop=two_stops())
    expected = []
    for tokens in free:
        at = [t for t, token in enumerate(tokens) if token in stop]
        expected.append(tokens[: at[0] + 1] if at else tokens)
    assert responses(result) == expected
    np.testing.assert_array_equal(result.stop_token, [x[-1] if x[-1] in stop else -1 for x in expected])
    np.testing.assert_array_equal(result.stopped, [x[-1] in stop for x in expected])
    assert len(expected[0]) == 1 and set(result.stop_token) == {-1, *stop}
    assert len(set(result.stopped[result.response_lengths == RESPONSE])) == 2


def test_stop_token_that_is_the_padding_token():
    """Guards masks from lengths: with 0 as stop token and as padding, the stop token still belongs to its response."""
    params = policy_params() | {'lm_head': policy_params()['lm_head'].at[0].mul(4.0)}
    result = jax.tree.map(np.asarray, sampler(stop=(0,))(params, some_prompts(), keys_of()))
    assert result.stopped.any()
    for tokens, stopped in zip(responses(result), result.stopped, strict=True):
        assert (tokens[-1] == 0) == stopped and 0 not in tokens[:-1]


def test_loop_ends_with_the_last_response():
    """Guards the early end of the loop, and what was never decoded: it is still zero in the record."""
    free = responses(rollout())
    stop = tuple(sorted({tokens[1] for tokens in free}))
    result = rollout(stop=stop, steps=1)
    assert result.stopped.all() and result.stats.steps == result.response_lengths.max() <= 2
    decoded = np.arange(RESPONSE)[None] < result.response_lengths[:, None]
    np.testing.assert_array_equal(result.entropy > 0, decoded)


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
    many = Sampler(
        CONFIG,
        samples_per_prompt=4001,
        max_response_length=1,
        temperature=1.0,
        stop_tokens=(NEVER,),
        support_size=KEPT,
        support_mass=MASS,
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


@functools.cache
def many():
    """Responses of different lengths to 8 prompts, each with a slot of its own."""
    return sampler(stop=two_stops(), steps=1)(policy_params(), some_prompts(8), keys_of(8))


def test_slots_change_nothing_and_are_never_empty():
    """Guards against state of a slot's last response, and against slots that wait for others, or for a prefill.

    5 slots take 24 requests in turn, prompts of up to 5 tokens in chunks of 2.
    """
    run = sampler(stop=two_stops(), slots=5, prefill_chunk=2, steps=1)
    result = run(policy_params(), some_prompts(8), keys_of(8), NO_LIMITS)
    assert_same_responses(result, many())
    assert result.stats.slots == 5 and many().stats.slots == 32
    assert result.stats.steps == steps_of_a_queue(result.response_lengths, 5)
    assert many().stats.steps == many().response_lengths.max()


@pytest.mark.parametrize('steps', [2, 3, 16])
def test_steps_of_a_call_change_nothing(steps):
    """Guards responses that end within a call: what follows in their slots is no part of them, nor of the next."""
    run = sampler(stop=two_stops(), slots=5, steps=steps)
    result = run(policy_params(), some_prompts(8), keys_of(8))
    assert_same_responses(result, many())
    assert result.stats.steps % min(steps, RESPONSE) == 0


def test_order_and_company_change_nothing():
    """Guards resuming and evaluation in other batches: order, company and number of prompts must not matter."""
    order = np.array([5, 2, 7, 0, 6, 1, 4, 3])
    run = sampler(stop=two_stops(), slots=5, prefill_chunk=2)
    part = run(policy_params(), jax.tree.map(lambda x: x[order], some_prompts(8)), keys_of(8)[order], NO_LIMITS)
    assert_same_responses(part, many(), (order[:, None] * GROUP + np.arange(GROUP)).reshape(-1))
    rows = np.arange(4 * GROUP)
    assert_same_responses(rollout(stop=two_stops()), many(), rows)


def test_prompts_are_kept_for_their_last_sample():
    """Guards prompts whose pages are taken too early: one sample of each is long, and comes after all the others."""
    prompts, keys = jax.tree.map(lambda x: jnp.concatenate([x, x[:3]]), some_prompts(8)), keys_of(11)
    limits = jnp.tile(jnp.array([1] * 8 + [RESPONSE]), 11)
    run = sampler(group=9, slots=8, steps=1)
    result = run(policy_params(), prompts, keys, limits)
    np.testing.assert_array_equal(result.response_lengths, limits)
    whole = run(policy_params(), prompts, keys, jnp.full_like(limits, RESPONSE))
    assert responses(result) == [row[:limit] for row, limit in zip(responses(whole), limits, strict=True)]
    assert result.stats.steps == steps_of_a_queue(limits, 8)


@pytest.mark.parametrize('architecture', FAMILIES)
def test_greedy_tokens_equal_those_of_transformers(architecture, tmp_path):
    """Guards the whole way of every family, for 64 prompts of different lengths: chunks, places, pages, refilled slots,
    ends, and positions past the context that was stretched."""
    room = 37
    model = tiny_torch_model(tiny_hf_config(False, architecture, vocab_size=VOCAB))
    model.save_pretrained(tmp_path)
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 24, 64)
    tokens = np.where(np.arange(23) < lengths[:, None], generator.integers(0, VOCAB, (64, 23)), 0)
    left = np.stack([np.roll(row, 23 - length) for row, length in zip(tokens, lengths, strict=True)])
    with torch.no_grad():
        expected = model.generate(
            torch.tensor(left),
            attention_mask=torch.tensor(np.arange(23) >= 23 - lengths[:, None]).long(),
            max_new_tokens=room,
            do_sample=False,
            pad_token_id=0,
        ).numpy()[:, 23:]
    # Two tokens with which about half of the responses end.
    share = [np.any(expected == token, axis=1).mean() for token in range(VOCAB)]
    stop = np.argsort(np.abs(np.array(share) - 0.5))[:2].tolist()
    config, params = load_pretrained(str(tmp_path), compute_dtype='float32')
    run = Sampler(
        config,
        samples_per_prompt=1,
        max_response_length=room,
        temperature=0.0,
        stop_tokens=stop,
        support_size=1,
        support_mass=1.0,
        slots=13,
        prefill_chunk=7,
    )
    result = run(params, Prompts(tokens, lengths), keys_of(64))
    assert 3 < len(set(result.response_lengths)) and result.stopped.any() and not result.stopped.all()
    for row, response in enumerate(responses(result)):
        assert response == expected[row, : len(response)].tolist(), row
        assert len(response) == room or response[-1] in stop
        assert not set(response[:-1]) & set(stop)


@pytest.mark.parametrize('changes', [dict(top_k=3), dict(top_p=0.6)])
def test_truncated_sampling_records_what_it_sampled_from(changes):
    """Guards against ratios that top-k or top-p bias: the record is that of the truncated policy, renormalised."""
    result = rollout(**changes)
    scores = np.asarray(forward()(result.tokens))
    sizes = set()
    for row, tokens in enumerate(responses(result)):
        for t, token in enumerate(tokens):
            log_probs = scores[row, result.prompt_lengths[row] + t - 1]
            falling = np.sort(log_probs)[::-1]
            if 'top_k' in changes:
                count = 3
            else:
                count = 1 + np.sum(np.cumsum(np.exp(falling)) < 0.6)
            kept = np.flatnonzero(log_probs >= falling[count - 1])
            log_probs = log_probs - np.log(np.sum(np.exp(log_probs[kept])))
            assert token in kept
            np.testing.assert_allclose(result.log_probs[row, t], log_probs[token], atol=1e-4)
            entropy = -np.sum(np.exp(log_probs[kept]) * log_probs[kept])
            np.testing.assert_allclose(result.entropy[row, t], entropy, atol=1e-4)
            if count <= KEPT:
                listed = result.support.tokens[row, t]
                assert set(listed[listed >= 0]) == set(kept)
                assert np.all(np.isneginf(result.support.log_probs[row, t][listed < 0]))
            sizes.add(count)
    assert min(sizes) <= 3 and (len(sizes) > 1) == ('top_p' in changes)


def test_second_rollout_does_not_compile():
    """Guards against lengths, limits, keys or the number of prompts that become part of the program."""
    run = sampler(stop=two_stops(), prefill_chunk=2)
    results, compiled = [], []
    for seed, batch in enumerate((8, 7, 6)):
        prompts = some_prompts(8)._replace(lengths=jnp.array([1 + seed, 5, 2, 1, 4, 3, 3, 5]))
        keys, limits = jax.random.split(jax.random.key(seed), batch), jnp.full(batch * GROUP, 2 + seed)
        results.append(run(policy_params(), Prompts(prompts.tokens[:batch], prompts.lengths[:batch]), keys, limits))
        compiled.append([program._cache_size() for program in (run.begin, run.init_cache, run.prefill, run.decode)])
    assert compiled[0] == compiled[1] == compiled[2] and compiled[0][1:] == [1, 1, 1]
    assert [int(x.response_lengths.max()) for x in results] == [2, 3, 4]


def test_seconds_are_those_of_prefills_and_of_steps():
    """Guards the log's two times, and a host that comes between the steps."""
    run = sampler(stop=two_stops(), steps=RESPONSE)
    run(policy_params(), some_prompts(8), keys_of(8))
    begin = time.perf_counter()
    work = run(policy_params(), some_prompts(8), keys_of(8)).stats
    seconds = time.perf_counter() - begin
    assert (work.steps, work.prefills) == (RESPONSE, 3)
    assert min(work.prefill_seconds, work.decode_seconds) > 0
    assert work.prefill_seconds + work.decode_seconds < seconds


def test_shapes_without_a_rollout():
    """Guards the check before weights are loaded: what it says is what comes, and nothing is compiled for it."""
    run = sampler(0.5)
    shapes = run.shapes(jax.eval_shape(policy_params), some_prompts(), keys_of())
    assert run.decode._cache_size() == 0
    result = rollout(0.5)._replace(stats=None)
    jax.tree.map(lambda x, y: chex.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), shapes, result)


@pytest.mark.parametrize('shape, gather', [((4, 1, 2), True), ((1, 2, 2), False)])
def test_mesh_does_not_matter(shape, gather):
    """Guards the sharded vocabulary, caches, queues and slots: the same responses, and the same record.

    The four parts of the batch take requests from one queue, and send nothing of a row to another: neither cache nor
    record, but tokens, and weights that stay as they lie for training.
    """
    mesh = make_mesh(*shape, context=8 // np.prod(shape))
    _, shapes = decoders.abstract(CONFIG, mesh)
    run = sampler(stop=two_stops(), slots=8, gather_weights=gather, steps=2)
    with jax.set_mesh(mesh):
        params = jax.device_put(policy_params(), jax.tree.map(lambda leaf: leaf.sharding, shapes))
        put = lambda x: jax.device_put(x, named_sharding(mesh, ('batch', *[None] * (x.ndim - 1))))
        arguments = params, jax.tree.map(put, some_prompts(8)), put(keys_of(8))
        result = run(*arguments)
        programs = run.programs(params, run.sizes(8, PROMPT), shape_of=compiled_shapes)
        text = ''.join(program.lower(*inputs).compile().as_text() for program, inputs in programs.values())
    assert_same_responses(result, many())
    assert result.stats.steps < 2 * steps_of_a_queue(many().response_lengths, 8)
    moved = re.findall(r' (?:all-gather|all-to-all|collective-permute)(?:-start)?\(.*op_name="([^"]*)"', text)
    moved = [name for name in moved if ('while/body' in name or 'prefill' in name) and 'all_gather' not in name]
    weights = r'/(dot_general|mul|sharding_constraint|draw/shard_map)$'
    assert all(not gather and re.search(weights, name) for name in moved), moved
    assert gather or moved


def test_more_devices_than_kv_heads():
    """Guards the copies of KV heads, in a prefill and in decode steps, and the size of the cache."""
    config, mesh = decoder_config(40, mlp_width=24), make_mesh(2, 1, 4)
    assert config.kv_heads == 2
    run, params = sampler(config=config, slots=8), policy_params(config)
    expected = run(params, some_prompts(8), keys_of(8))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, decoders.abstract(config, mesh)[1]))
        assert_same_responses(run(params, some_prompts(8), keys_of(8)), expected)


def test_every_token_is_drawn_with_numbers_of_its_own():
    """Guards one random number for all positions of a response, or for all samples of a prompt."""
    keys = jax.random.split(jax.random.key(0), 3)
    keys, t = jnp.repeat(keys, 5), np.tile(np.arange(5), 3)
    assert len(set(np.asarray(_uniforms(keys, t)).reshape(-1).tolist())) == 30


def test_wrong_numbers_of_keys_or_limits_are_refused():
    """Guards limits that are silently those of other requests, and a queue that waits for a prompt that never comes."""
    for keys, limits, message in [
        (3, None, r'need keys of shape \(4,\)'),
        (4, np.full(4, 2), r'limits of shape \(12,\)'),
    ]:
        with pytest.raises(ValueError, match=message):
            sampler()(policy_params(), some_prompts(), keys_of(keys), limits)


def test_bad_settings_are_refused():
    """Guards messages with numbers, at the start of a run and not after its first rollout."""
    good = dict(samples_per_prompt=2, max_response_length=3, temperature=1.0)
    good |= dict(stop_tokens=(1,), support_size=KEPT, support_mass=MASS)
    for change, message in [
        (dict(temperature=-0.5), r'got -0\.5'),
        (dict(stop_tokens=()), 'no stop token'),
        (dict(samples_per_prompt=0), 'samples_per_prompt .* got 0'),
        (dict(max_response_length=0), 'max_response_length .* got 0'),
        (dict(support_size=VOCAB + 1), f'vocabulary size {VOCAB}; got {VOCAB + 1}'),
        (dict(support_mass=1.5), r'mass .* got 1\.5'),
        (dict(slots=0), 'slots .* got 0'),
        (dict(steps=0), 'steps .* got 0'),
        (dict(cache_gb=0.0), r'cache_gb .* got 0\.0'),
        (dict(prefill_chunk=0), 'prefill_chunk .* got 0'),
        (dict(top_k=VOCAB + 1), f'top_k .* {VOCAB}, .*; got {VOCAB + 1}'),
        (dict(top_p=0.0), r'top_p .* got 0\.0'),
    ]:
        with pytest.raises(ValueError, match=message):
            Sampler(CONFIG, **good | change)


def test_bad_requests_are_refused_before_anything_is_compiled():
    """Guards prompts and limits that no shape gives away, and numbers that the devices do not divide."""
    run = sampler(slots=9)
    prompts = some_prompts()
    for lengths, message in [([3, 6, 1, 4], 'between 1 and 6 .* expected 1 to 5'), ([3, 5, 0, 4], 'between 0 and 5')]:
        with pytest.raises(ValueError, match=message):
            run(policy_params(), prompts._replace(lengths=jnp.array(lengths)), keys_of())
    with pytest.raises(ValueError, match='limits are between 1 and 8 .* expected 1 to 7'):
        run(policy_params(), prompts, keys_of(), jnp.arange(12) % 8 + 1)
    with jax.set_mesh(make_mesh()):
        with pytest.raises(ValueError, match='slots = 9 must be a multiple of the 8 devices'):
            run(policy_params(), some_prompts(8), keys_of(8))
    assert run.begin._cache_size() == 0
