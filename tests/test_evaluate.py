"""Evaluation: unbiased estimates, and responses that meet their own prompt and answer on whatever mesh."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from tiny import decoder_config

from experiments.evaluate import summarise
from troll_jax.collect import decode_responses
from troll_jax.data.prompts import encode_prompts
from troll_jax.data.tasks.arithmetic import CHARACTERS, Arithmetic
from troll_jax.data.tokenizer import EOS, PAD, character_tokenizer
from troll_jax.evaluate import Evaluation, distinct, estimate, estimate_mean, evaluate, pass_at_k, success
from troll_jax.models.decoder import abstract
from troll_jax.rewards.pool import Grader
from troll_jax.rollout import Sampler
from troll_jax.sharding import MESH_AXES, make_mesh
from troll_jax.types import Rollout, SparseLogProbs

PROMPTS, SAMPLES, ROOM = 5, 3, 7
TASK = Arithmetic(operands=2, test_size=PROMPTS, train_size=10)


@pytest.mark.parametrize('samples', range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(samples):
    """Guards against the biased 1 − (1 − c/n)^k, and against samples that are drawn with replacement."""
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        marks = [1] * correct + [0] * (samples - correct)
        expected = np.mean([any(subset) for subset in itertools.combinations(marks, k)])
        assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_grows_with_k_and_with_correct_samples():
    """Guards sizes at which factorials or floats would overflow."""
    table = np.array([[pass_at_k(256, correct, k) for k in range(1, 257)] for correct in range(0, 257, 16)])
    assert np.all(np.diff(table, axis=0) >= 0) and np.all(np.diff(table, axis=1) >= 0)
    assert np.all(table[0] == 0) and np.all(table[1:, -1] == 1)
    np.testing.assert_allclose(table[:, 0], np.arange(0, 257, 16) / 256)


@pytest.mark.parametrize('samples, correct, k', [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1), (0, 0, 1)])
def test_pass_at_k_beyond_its_limits_is_an_error(samples, correct, k):
    """Guards against a pass@8 of four samples, which the formula would call certain."""
    with pytest.raises(ValueError, match=f'got k={k}, samples={samples}, correct={correct}'):
        pass_at_k(samples, correct, k)


def shares(problems: int, samples: int, chance: float, concentration: float | None, draws: int) -> np.ndarray:
    """Simulated shares of correct samples [draws, n], of problems that are equally hard or spread by a beta law."""
    generator = np.random.default_rng(problems + samples)
    hard = np.full((draws, problems), chance)
    if concentration is not None:
        hard = generator.beta(chance * concentration, (1 - chance) * concentration, hard.shape)
    return generator.binomial(samples, hard) / samples


@pytest.mark.parametrize('samples', [1, 8])
@pytest.mark.parametrize('problems', [30, 100])
def test_the_interval_covers_the_truth(problems, samples):
    """Guards against intervals that are a point at 0 and 1, and that take samples of one problem for many problems."""
    for chance in (0.05, 0.3, 0.9):
        for concentration in (None, 5.0):
            found = [estimate(x, samples=samples) for x in shares(problems, samples, chance, concentration, 400)]
            assert all(0 <= e.low <= e.mean <= e.high <= 1 for e in found)
            assert 0.9 <= np.mean([e.low <= chance <= e.high for e in found]), (chance, concentration)
    even = [estimate(x, samples=samples) for x in shares(problems, samples, 0.3, None, 400)]
    widths = np.mean([e.high - e.low for e in even])
    assert widths == pytest.approx(2 * 1.96 * np.sqrt(0.3 * 0.7 / (problems * samples)), rel=0.12)


def test_no_and_every_success():
    """Guards an interval of [0, 0] for 0 of 30 problems; Wilson's, with Student's t in place of 1.96, by hand."""
    t = 2.04523
    for value, other in ((0.0, t * t / (30 + t * t)), (1.0, 30 / (30 + t * t))):
        found = estimate(np.full(30, value))
        np.testing.assert_allclose(found, sorted([value, value, other]) if value == 0 else (1, other, 1), atol=1e-5)
    assert estimate(np.zeros(30), samples=32) == estimate(np.zeros(30)), 'the samples of a problem may be all alike'
    one = estimate(np.array([1.0]))
    assert one.mean == one.high == 1 and 0 <= one.low < 0.5


def test_differences_are_paired():
    """Guards signs, and an interval of no width for two models that differ nowhere."""
    generator = np.random.default_rng(1)
    a = generator.random(200)
    found = estimate_mean(a + 0.1 - a)
    assert found.mean == pytest.approx(0.1) and 0.08 < found.low < found.high < 0.12
    none = estimate_mean(np.zeros(30))
    assert none.mean == 0 and 0.05 < none.high == -none.low < 0.1
    spread = estimate_mean(generator.normal(size=400))
    assert spread.high - spread.low == pytest.approx(2 * 1.966 / 20, rel=0.1)


def test_the_mean_of_sets():
    """Guards against sets that count by their size, and against problems that are drawn across sets."""
    values, fixed = np.random.default_rng(1).random(37), np.full(2000, 0.25)
    alone, both = estimate(values, samples=10**6), estimate(values, fixed, samples=10**6)
    assert both.mean == (values.mean() + 0.25) / 2
    assert both.high - both.low == pytest.approx((alone.high - alone.low) / 2, rel=0.05)


def test_a_problem_that_is_there_twice_counts_once():
    """Guards benchmarks that repeat every problem: 30 problems 32 times are no 960."""
    texts, answers = ['a', 'b', 'a', 'c', 'a'], ['1', '2', '1', '3', '4']
    np.testing.assert_array_equal(distinct(texts, answers), [0, 1, 0, 2, 3])
    rewards = np.array([[1, 1], [0, 1], [0, 0], [0, 0], [1, 0]], np.float32)
    result = Evaluation(texts, answers, rewards, rewards, rewards > 0, [])
    np.testing.assert_allclose(success(result), [0.5, 0.5, 0, 0.5])
    summary = summarise(result)
    assert (summary['problems'], summary['prompts']) == (4, 5)
    assert summary['pass@2']['mean'] == pytest.approx((1 - 1 / 6 + 1 + 0 + 1) / 4)


@pytest.fixture(scope='module')
def tokenizer():
    return character_tokenizer(CHARACTERS)


@pytest.fixture(scope='module')
def prompts(tokenizer):
    return encode_prompts(TASK.load('test'), tokenizer, max_length=6)


@pytest.fixture(scope='module')
def one_device():
    return jax.make_mesh((1, 1, 1, 1), MESH_AXES, devices=jax.devices()[:1], axis_types=(AxisType.Auto,) * 4)


@pytest.fixture(scope='module')
def policy(tokenizer):
    """A sampler and random parameters whose responses differ in length and text, some with an end and some without."""
    config = decoder_config(len(tokenizer), width=8, layers=1, heads=2, kv_heads=1, head_dim=4, rope_theta=100.0)
    sampler = Sampler(
        config,
        samples_per_prompt=SAMPLES,
        max_response_length=ROOM,
        temperature=1.0,
        stop_tokens=[tokenizer.eos_token_id],
        support_size=1,
        support_mass=1.0,
    )
    generator = np.random.default_rng(3)
    draw = lambda leaf: jnp.asarray(0.7 * generator.normal(size=leaf.shape), leaf.dtype)
    return sampler, jax.tree.map(draw, abstract(config)[1])


def grade(response: str, answer: str) -> float:
    """Tells every pair of lengths and answers from any other."""
    return 10.0 * len(response) + float(answer)


def run(sampler, params, prompts, tokenizer, mesh, key=0):
    with Grader(grade, deadline=None) as grader:
        return evaluate(sampler, params, prompts, grader, tokenizer, jax.random.key(key), mesh=mesh)


@pytest.fixture(scope='module')
def together(policy, prompts, tokenizer, one_device):
    return run(*policy, prompts, tokenizer, one_device)


def test_shapes_and_contents(together, prompts):
    """Guards rewards, lengths and ends that belong to another response."""
    assert together.rewards.shape == together.lengths.shape == together.stopped.shape == (PROMPTS, SAMPLES)
    assert [len(responses) for responses in together.responses] == [SAMPLES] * PROMPTS
    for i, answer in enumerate(prompts.answers):
        assert [grade(response, answer) for response in together.responses[i]] == together.rewards[i].tolist()
    assert together.stopped.any() and not together.stopped.all() and len(np.unique(together.lengths)) > 2
    assert np.all(together.lengths[~together.stopped] == ROOM)


def test_the_mesh_changes_nothing(together, policy, prompts, tokenizer):
    """Guards prompts that are laid out over eight devices, of which three hold nothing but filling."""
    sampler, params = policy
    mesh = make_mesh(2, 4, 1)
    with jax.set_mesh(mesh):
        result = run(sampler, params, prompts, tokenizer, mesh)
    jax.tree.map(np.testing.assert_array_equal, result[:3], together[:3])
    assert result.responses == together.responses


def test_the_key_changes_the_responses(together, policy, prompts, tokenizer, one_device):
    """Guards against a key that nothing reads, without which the tests above would prove nothing; and against samples
    of a prompt that are copies of each other."""
    assert run(*policy, prompts, tokenizer, one_device, key=1).responses != together.responses
    assert any(len(set(responses)) == SAMPLES for responses in together.responses)


def echo(params, prompts, keys) -> Rollout:
    """Responds to a prompt with the prompt, the number of the sample, an end, and then rubbish."""
    rows, width = prompts.tokens.shape
    tokens = np.full((rows * SAMPLES, 2 * width + 4), 16)
    for row, i in enumerate(np.repeat(np.arange(rows), SAMPLES)):
        prompt = np.asarray(prompts.tokens[i])[: prompts.lengths[i]]
        number = 2 + row % SAMPLES  # tokens 0 and 1 are special, the digits follow
        response = [*prompt, number, 1]
        tokens[row, : 2 * len(prompt) + 2] = [*prompt, *response]
    lengths = np.repeat(np.asarray(prompts.lengths), SAMPLES)
    nothing = np.zeros((rows * SAMPLES, 1), np.float32)
    return Rollout(
        tokens=tokens,
        prompt_lengths=lengths,
        response_lengths=lengths + 2,
        stop_token=np.ones(rows * SAMPLES, np.int32),
        log_probs=nothing,
        entropy=nothing,
        support=SparseLogProbs(nothing[..., None].astype(np.int32), nothing[..., None]),
    )


def test_responses_meet_their_own_prompt_and_answer(prompts, tokenizer, one_device):
    """Guards the order of prompts, samples and answers, which random responses would not show."""
    result = run(echo, None, prompts, tokenizer, one_device)
    assert result.responses == [[f'{text}{g}' for g in range(SAMPLES)] for text in result.prompts]
    expected = [
        [10.0 * (len(text) + 1) + int(answer)] * SAMPLES
        for text, answer in zip(result.prompts, result.answers, strict=True)
    ]
    np.testing.assert_array_equal(result.rewards, expected)
    assert len(set(result.prompts)) == PROMPTS and len(set(prompts.answers)) > 1


def test_responses_decode_up_to_the_stop_token(tokenizer):
    """Guards against an end-of-sequence text that the grader takes for part of the answer, against tokens of the
    prompt or past the response's end, and against special tokens that a response wrote and nobody sees."""
    ids = lambda text: tokenizer(text)['input_ids']
    rows = [ids('1+1=#2' + EOS + '999'), ids('1+1=' + PAD + '7#3' + '99')]
    nothing = np.zeros((2, 1))
    rollout = Rollout(
        tokens=np.asarray(rows),
        prompt_lengths=np.array([4, 4]),
        response_lengths=np.array([3, 4]),
        stop_token=np.array([1, -1]),
        log_probs=nothing,
        entropy=nothing,
        support=SparseLogProbs(nothing[..., None], nothing[..., None]),
    )
    assert decode_responses(rollout, tokenizer) == ['#2', PAD + '7#3']
