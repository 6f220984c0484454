"""The critic of PPO: a decoder whose head is one number, what reward to expect from a token on."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from troll_jax.models import decoder as decoders
from troll_jax.models.layers import exact_products
from troll_jax.ops.ranges import check_range, is_not_negative, is_positive
from troll_jax.ops.values import value_loss
from troll_jax.optimizer import Optimizer, adamw, apply_gradients, state_shapes
from troll_jax.score import for_each_micro_batch
from troll_jax.sharding import constrain, named_sharding
from troll_jax.typechecks import check_fields
from troll_jax.types import Batch, CriticState
from troll_jax.update import gradients_of


@dataclasses.dataclass(frozen=True)
class Critic:
    """Settings of a critic.

    Args:
      optimizer: function that builds its optimizer.
      value_clip: limit of `value_loss`; None turns it off.
      warmup_steps: rollout batches from which the critic learns and the policy does not yet.
    """

    optimizer: Optimizer = partial(adamw, learning_rate=1e-5)
    value_clip: float | None = 0.5
    warmup_steps: int = 0

    def __post_init__(self):
        check_fields(self)
        check_range('Critic.warmup_steps', self.warmup_steps, is_not_negative, 'at least 0')
        check_range('Critic.value_clip', self.value_clip, is_positive, 'above 0, or None')


def critic_config(config: decoders.DecoderConfig) -> decoders.DecoderConfig:
    """The sizes of a critic's decoder: the policy's without an unembedding."""
    return dataclasses.replace(config, tied_embeddings=True)


def abstract_critic(config: decoders.DecoderConfig, optimizer: optax.GradientTransformation, mesh) -> CriticState:
    """Shapes and shardings of the critic of a policy with this `config`."""
    _, decoder = decoders.abstract(critic_config(config), mesh)
    head = jax.ShapeDtypeStruct((config.width,), jnp.float32, sharding=named_sharding(mesh, (None,)))
    params = {'decoder': decoder, 'head': head}
    return CriticState(params, state_shapes(optimizer, params))


def init_critic(policy: dict[str, Any], optimizer: optax.GradientTransformation, shapes: CriticState) -> CriticState:
    """A critic with the weights of a policy and a head of zeros: all values are 0.

    Args:
      policy: parameters of the policy, which are copied.
      optimizer: optimizer of the critic.
      shapes: result of `abstract_critic`.
    """

    def start(policy):
        # Copied by hand: what a program only passes on is the array that came in, and an update consumes that.
        decoder = jax.tree.map(jnp.copy, {name: policy[name] for name in shapes.params['decoder']})
        params = {'decoder': decoder, 'head': jnp.zeros(shapes.params['head'].shape)}
        return CriticState(params, optimizer.init(params))

    return jax.jit(start, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))(policy)


def make_values(config: decoders.DecoderConfig) -> Callable[[dict, Batch], jax.Array]:
    """Builds the jitted values(params, batch) → [M, Z, S]: the value of each token, before it is seen."""
    graphdef, _ = decoders.abstract(critic_config(config))

    @jax.jit
    def values(params, batch: Batch) -> jax.Array:
        return for_each_micro_batch(partial(_values, graphdef, params), batch, jnp.zeros_like(batch.loss_weights))

    return values


def make_critic_update(
    config: decoders.DecoderConfig, optimizer: optax.GradientTransformation, *, value_clip: float | None
) -> Callable[[CriticState, Batch], tuple[CriticState, dict[str, jax.Array]]]:
    """Builds the jitted update(critic, batch) → (critic, metrics). The critic that is passed in is consumed.

    The loss is the mean of `value_loss` over the tokens with a loss weight. A gradient that is not finite changes
    nothing.

    Args:
      config: sizes of the policy.
      optimizer: optimizer of the critic.
      value_clip: see `value_loss`.
    """
    graphdef, _ = decoders.abstract(critic_config(config))

    @partial(jax.jit, donate_argnums=0)
    def update(critic: CriticState, batch: Batch) -> tuple[CriticState, dict[str, jax.Array]]:
        count = jnp.maximum(jnp.sum(batch.loss_weights > 0), 1)

        def loss(params, part: Batch):
            values = _values(graphdef, params, part)
            losses = value_loss(values, part.values, part.returns, clip=value_clip)
            moved = jnp.abs(values - part.values)
            return jnp.sum(jnp.where(part.loss_weights > 0, losses, 0.0)) / count, moved

        with exact_products(config.compute_dtype):
            gradients, total, moved = gradients_of(loss, critic.params, batch)
        critic, metrics = apply_gradients(optimizer, gradients, critic, partial(abstract_critic, config, optimizer))
        moved = jnp.sum(jnp.where(batch.loss_weights > 0, moved, 0.0)) / count
        return critic, metrics | {'loss': total, 'moved': moved}

    return update


def token_rewards(rewards: np.ndarray, penalties: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Rewards of tokens [R, T]: of a response [R] at its last token, less what each token costs [R, T]."""
    out = -penalties
    out[np.arange(len(lengths)), lengths - 1] += rewards
    return out


def _values(graphdef, params, part: Batch) -> jax.Array:
    """Values [Z, S]; 0 where the loss weight is zero."""
    with jax.named_scope('critic'):
        hidden = decoders.bind(graphdef, params['decoder'])(part.tokens, part.positions, part.segment_ids)
        values = jnp.einsum('zsd,d->zs', hidden.astype(jnp.float32), params['head'], precision='highest')
        # The hidden state before a token does not see it.
        return constrain(jnp.where(part.loss_weights > 0, jnp.roll(values, 1, axis=1), 0.0), 'rows', 'length')
