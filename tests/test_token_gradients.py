"""Gradients by logits of single tokens, against derivatives by the scores of the whole vocabulary."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objectives_contract import (
    ADVANTAGES,
    CASES,
    INSIDE,
    KEPT,
    NEW,
    OBJECTIVES,
    OLD,
    in_float64,  # noqa: F401
    normal,
    row_of,
)

from experiments.studies.token_gradients import by_logits, held, inspected, summarise
from troll_jax.ops.losses import LossInputs, LossOutputs, ReferenceView, ppo_clip, troll
from troll_jax.ops.regularisers import entropy_bonus, kl_to_reference, regularised, trust_region_entropy
from troll_jax.ops.support import TAIL, at_tokens, bucket_tail, default_tail
from troll_jax.types import START, SparseLogProbs


def with_reference(new_scores, old_scores, tail_rule) -> LossInputs:
    row = row_of(new_scores, old_scores, tail_rule)

    def view(new, reference, listed):
        at_reference = SparseLogProbs(listed, at_tokens(jax.nn.log_softmax(reference), listed))
        return ReferenceView(jnp.zeros(()), *bucket_tail(at_tokens(jax.nn.log_softmax(new), listed), at_reference))

    return row._replace(reference=jax.vmap(view)(new_scores, normal(11), row.old.tokens[:, :KEPT]))


def dense_gradient(objective, advantages, tail_rule) -> tuple[np.ndarray, LossInputs]:
    """The gradient [T, V] by scores, and the row."""

    def total(scores):
        row = with_reference(scores, OLD, tail_rule)
        return jnp.sum(jnp.where(INSIDE, objective(row, advantages, START).loss, 0.0)), row

    gradient, row = jax.jit(jax.grad(total, has_aux=True))(NEW)
    return np.asarray(gradient), jax.tree.map(np.asarray, row)


PULLS = {
    'entropy': regularised(ppo_clip, [partial(entropy_bonus, coefficient=0.3)]),
    'TRE': regularised(ppo_clip, [partial(trust_region_entropy, coefficient=0.3)]),
    'reference': regularised(ppo_clip, [partial(kl_to_reference, coefficient=0.3)]),
}
EVERY = [(name, OBJECTIVES[name][0], rule) for name, rule in CASES]
EVERY += [(name, objective, rule) for name, objective in PULLS.items() for rule in (default_tail, bucket_tail)]


@pytest.mark.parametrize(('name', 'objective', 'tail_rule'), EVERY, ids=lambda x: getattr(x, '__name__', str(x))[:30])
def test_gradients_by_logits_are_those_of_the_network(name, objective, tail_rule):
    """Guards against a derivative that misses a way from the logits to the loss: tails, the entropy, a reference."""
    dense, row = dense_gradient(objective, ADVANTAGES, tail_rule)
    got = np.asarray(jax.jit(partial(by_logits, lambda row: objective(row, ADVANTAGES, START).loss))(row))
    for t in np.flatnonzero(INSIDE):
        tokens = row.new.tokens[t]
        listed = tokens >= 0
        np.testing.assert_allclose(got[t, :-1][listed], dense[t, tokens[listed]], atol=1e-10, err_msg=name)
        others = got[t, -1] + got[t, :-1][tokens == TAIL].sum()
        rest = dense[t].sum() - dense[t, tokens[listed]].sum()
        np.testing.assert_allclose(others, rest, atol=1e-10, err_msg=name)


def inspect(objective, new, old, tokens, advantages) -> LossOutputs:
    """Logs of tokens whose distributions [T, V] are listed as a whole."""
    new, old, tokens = (jnp.asarray(x) for x in (new, old, tokens))
    count, size = new.shape
    listed = jnp.broadcast_to(jnp.arange(size), new.shape)
    at = lambda x: jnp.take_along_axis(x, tokens[:, None], axis=1)[:, 0]
    row = LossInputs(
        tokens,
        jnp.arange(1, count + 1),
        at(new),
        at(old),
        SparseLogProbs(listed, new),
        SparseLogProbs(listed, old),
        jnp.zeros(count),
    )
    return jax.jit(inspected(objective))(row, jnp.asarray(advantages)).logs


def test_the_projection_silences_what_moved_in_one_direction():
    """Guards the finding of docs/projection_derivative.md: where d has two values, nothing of the advantage is left.

    Two tokens; and a long tail of which only the sampled token has moved, up or down. Advantages lead out and back.
    The same tail with a second token that moved keeps the share that the formula gives.
    """
    tail = np.append(np.log(0.4), np.full(99, np.log(0.6 / 99)))
    moved = np.append(2.0, np.zeros(99)) + tail
    both = moved + np.append(np.zeros(99), 4.0)
    old = np.stack([tail] * 4)
    new = np.asarray(jax.nn.log_softmax(np.stack([moved, moved, both, both])))
    advantages = np.array([1.0, -1.0, 1.0, -1.0])
    logs = inspect(partial(troll, alpha=0.0), new, old, np.zeros(4, int), advantages)
    assert logs['projected'].all() and list(logs['outward']) == [True, False, True, False]
    assert np.all(logs['kept'][:2] < 1e-6) and np.all(logs['kept'][2:] > 0.05)
    assert np.all(logs['pull'] == 0)
    np.testing.assert_array_equal(logs['returns'][:3], [False, False, False])  # silenced, or outward
    clip = inspect(ppo_clip, new, old, np.zeros(4, int), advantages)
    np.testing.assert_allclose(clip['kept'], [0, 1, 0, 1], atol=1e-12)
    assert list(clip['returns']) == [False, True, False, True]

    # w r (e − π − (d − μ)_0 π (d − μ) / σ²), over the plain A r (e − π̃).
    weight, d = np.asarray(logs['weight'][2]), new[2] - old[2]
    probs = np.exp(old[2] + weight * d)
    probs /= probs.sum()
    centred = d - probs @ d
    first = np.arange(100) == 0
    left = first - probs - centred[0] * probs * centred / (probs @ centred**2)
    size = weight * probs[0] * np.linalg.norm(left) / (np.exp(new[2, 0]) * np.linalg.norm(first - np.exp(new[2])))
    np.testing.assert_allclose(logs['kept'][2:], size, rtol=1e-4)


def test_the_regression_pulls_whatever_the_advantage():
    """Guards a pull that counts as kept, or is not seen to lead back: TROLL's, where nothing passes the projection."""
    old = np.log([[0.5, 0.5]] * 2)
    new = np.log([[0.9, 0.1]] * 2)
    logs = inspect(troll, new, old, np.zeros(2, int), np.array([1.0, 3.0]))
    assert np.all(logs['kept'] < 1e-6)
    np.testing.assert_allclose(logs['pull'][0], 3 * logs['pull'][1], rtol=1e-6)
    assert np.all(logs['returns'])


def test_summary_by_class():
    """Guards counts and quantiles of the wrong tokens; classes without a token have none."""
    logs = {
        'kept': np.array([0.0, 1.0, 0.5, 9.0]),
        'pull': np.zeros(4),
        'token_gradient': np.ones(4),
        'outward': np.array([True, True, False, False]),
        'returns': np.array([True, False, True, True]),
    }
    found = summarise(logs, np.array([True, True, True, False]))
    assert {name: row['tokens'] for name, row in found.items()} == {'outward': 2, 'back': 1}
    assert found['outward']['kept'] == pytest.approx([0.1, 0.5, 0.9]) and found['outward']['silenced'] == 0.5
    assert found['outward']['returns'] == 0.5 and found['back']['returns'] == 1
    assert summarise(logs, np.zeros(4, bool)) == {'outward': {'tokens': 0}, 'back': {'tokens': 0}}


def test_held_tokens_by_sign_and_probability():
    """Guards bins that miss a probability of one, and tokens without an advantage that count with a sign."""
    probs = np.array([0.01, 0.04, 0.3, 1.0, 1.0 + 1e-7, 0.96])
    advantages, where = np.array([1.0, 1.0, -1.0, 1.0, 1.0, 0.0]), np.array([1, 1, 1, 1, 1, 1], bool)
    found = held(np.array([1, 0, 1, 1, 1, 1], bool), where, advantages, np.log(probs))
    assert {name: tuple(cell.values()) for name, cell in found.items() if cell['tokens']} == {
        'A > 0, 0 < p ≤ 0.05': (2, 0.5),
        'A > 0, 0.95 < p ≤ 1': (2, 1.0),
        'A < 0, 0.05 < p ≤ 0.5': (1, 1.0),
    }
    assert found['A < 0, 0 < p ≤ 0.05']['share'] is None
