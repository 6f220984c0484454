"""Gradients of single tokens by the logits of their distributions: what an objective leaves of the plain one.

A derivative by log-probabilities says less: the network moves logits, and log-probabilities only together. So where
the projection lets nothing of a change pass, its derivative by log-probabilities need not be zero.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from troll_jax.ops.categorical import total_variation
from troll_jax.ops.losses import LossInputs, LossOutputs, Objective, importance_weighted
from troll_jax.ops.needs import give, needs
from troll_jax.ops.projection import kl_divergence
from troll_jax.ops.support import TAIL, bucket_tail
from troll_jax.types import START, Progress, SparseLogProbs
from troll_jax.update import BINS

SILENCED = 0.01  # a token with less of its plain gradient than this is silenced
QUANTILES = 0.1, 0.5, 0.9


def with_logits(row: LossInputs, change: jax.Array) -> LossInputs:
    """The row of a policy whose logits have changed, to first order.

    Args:
      row: T tokens.
      change: [T, K + 1] of the logits of the tokens that `row.new` lists, and of all others, which change alike. Where
        a tail rule has renormalised these, the others count as impossible.
    """
    return jax.vmap(_one_with_logits)(row, change)


def _one_with_logits(row: LossInputs, change: jax.Array) -> LossInputs:
    tokens, log_probs = row.new
    probs = jnp.exp(log_probs)
    others = jnp.maximum(1 - jnp.sum(probs), 0.0)
    moved = change - jnp.sum(jnp.append(probs, others) * change)  # of log-probabilities
    new = SparseLogProbs(tokens, log_probs + moved[:-1])
    move = lambda token: jnp.sum(jnp.where((tokens == token) & (token >= 0), moved[:-1], 0.0))
    # −Σ p (log p + H) δz over the vocabulary; of all p (log p + H) the sum is zero, which gives that of the tail.
    is_token = (tokens >= 0) & (probs > 0)
    slope = jnp.where(is_token, probs * (jnp.where(is_token, log_probs, 0.0) + row.entropy), 0.0)
    tail = jnp.sum(jnp.where(tokens == TAIL, change[:-1], 0.0)) + jnp.where(jnp.any(tokens == TAIL), 0.0, change[-1])
    entropy = row.entropy - jnp.sum(slope * change[:-1]) + jnp.sum(slope) * tail
    reference = row.reference
    if reference is not None:
        listed, at_listed = (x[:-1] for x in reference.policy)  # the last one is the tail, of which nothing is its own
        policy, _ = bucket_tail(at_listed + jax.vmap(move)(listed), SparseLogProbs(listed, at_listed))
        reference = reference._replace(policy=policy)
    return row._replace(
        new_log_probs=row.new_log_probs + move(row.tokens), new=new, entropy=entropy, reference=reference
    )


def by_logits(loss: Callable[[LossInputs], jax.Array], row: LossInputs) -> jax.Array:
    """The gradient [T, K + 1] of the sum of a row's losses [T], by the logits that `with_logits` changes."""
    fixed = jax.lax.stop_gradient(row)
    total = lambda change: jnp.sum(jnp.where(row.segments > 0, loss(with_logits(fixed, change)), 0.0))
    tokens, size = row.new.log_probs.shape
    return jax.grad(total)(jnp.zeros((tokens, size + 1), row.new.log_probs.dtype))


def inspected(objective: Objective) -> Objective:
    """An objective whose logs also compare the gradient of each token by its logits with the plain one.

    The plain one is that of `importance_weighted`. Of a loss that is a function of the advantage plus a pull that does
    not depend on it, `kept` [T] is |gradient of the first| and `pull` [T] |gradient of the second|, both over |plain|.
    `outward` [T] is true where a step along the plain gradient raises KL(π̃ ‖ π_old), `returns` [T] where one along
    the objective's lowers it.
    """

    def with_logs(row: LossInputs, advantages, progress: Progress = START, minibatch=None) -> LossOutputs:
        of = partial(objective, progress=progress, **give(objective, minibatch=minibatch))
        losses = of(row, advantages)
        whole = by_logits(lambda row: of(row, advantages).loss, row)
        pull = by_logits(lambda row: of(row, jnp.zeros_like(advantages)).loss, row)
        plain = by_logits(lambda row: importance_weighted(row, advantages).loss, row)
        divergence = by_logits(lambda row: jax.vmap(kl_divergence)(row.new.log_probs, row.old.log_probs), row)
        norm = partial(jnp.linalg.norm, axis=-1)
        unit = jnp.where(norm(plain) > 0, norm(plain), 1.0)
        logs = {
            'token_loss': losses.loss,
            'token_gradient': norm(whole),
            'log_prob': row.new_log_probs,
            'kept': norm(whole - pull) / unit,
            'pull': norm(pull) / unit,
            'outward': jnp.sum(divergence * plain, axis=-1) < 0,  # a step goes against the gradient of the loss
            'returns': (jnp.sum(divergence * whole, axis=-1) > 0) & (norm(whole) >= SILENCED * norm(plain)),
            'total_variation': jax.vmap(total_variation)(row.new.log_probs, row.old.log_probs),
        }
        return losses._replace(logs=losses.logs | jax.lax.stop_gradient(logs))

    return with_logs if needs(objective, 'minibatch') else partial(with_logs, minibatch=None)


def bins(old_log_probs: np.ndarray) -> dict[str, np.ndarray]:
    """Classes of tokens by their probability under π_old, and which tokens are in each."""
    place = np.searchsorted(BINS[:-1], np.exp(old_log_probs))
    return {
        f'{low:g} < p ≤ {high:g}': place == i for i, (low, high) in enumerate(zip((0, *BINS[:-1]), BINS, strict=True))
    }


def held(constrained: np.ndarray, where: np.ndarray, advantages: np.ndarray, old_log_probs: np.ndarray) -> dict:
    """By sign of the advantage and bin of the probability: the tokens, and the share that is constrained; if any."""
    found = {}
    for sign, has_sign in {'A > 0': advantages > 0, 'A < 0': advantages < 0}.items():
        for name, inside in bins(old_log_probs).items():
            chosen = where & has_sign & inside
            share = float(constrained[chosen].mean()) if chosen.any() else None
            found[f'{sign}, {name}'] = {'tokens': int(chosen.sum()), 'share': share}
    return found


def summarise(logs: dict[str, np.ndarray], where: np.ndarray) -> dict[str, dict]:
    """What is kept of the plain gradients, as quantiles, and the share that returns, outward and back.

    Args:
      logs: those of `inspected`, any shape.
      where: bool, tokens that count; those whose gradient is not finite do not.
    """
    where = where & np.isfinite(logs['token_gradient'])
    found = {}
    for name, inside in {'outward': logs['outward'], 'back': ~logs['outward']}.items():
        chosen = where & inside
        found[name] = {'tokens': int(chosen.sum())}
        if chosen.any():
            quantiles = {x: np.quantile(logs[x][chosen], QUANTILES).tolist() for x in ('kept', 'pull')}
            shares = {'silenced': logs['kept'] < SILENCED, 'returns': logs['returns']}
            found[name] |= quantiles | {x: float(is_so[chosen].mean()) for x, is_so in shares.items()}
    return found
