"""LoRA: low-rank adapters of weights that stay as they are (Hu et al., arXiv 2106.09685).

    y = x W + s (x A) B,   W [I, O], A [I, r], B [r, O], s = alpha / r

A begins uniform within ±1/√I, as in PEFT, and B at zero, so that the first policy is the start model to the bit. In the
nested dict of a decoder's parameters the adapter of `attention/query` is `attention/lora/query/a` and `…/b`: `split`
and `types.join` take the dict apart and put it together.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from troll_jax import sharding
from troll_jax.ops.ranges import check_range, is_not_negative, is_positive
from troll_jax.typechecks import check_fields


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Settings of the adapters.

    Args:
      rank: r.
      alpha: the change of a weight is alpha / rank · A B.
      targets: names of the weights to adapt, of query, key, value, output, gate, up and down, or patterns such as '*'.
      seed: seed of A.

    Raises:
      ValueError: a value of another type or out of its range. A pattern without a weight is one where the decoder is
        built.
    """

    rank: int = 32
    alpha: float = 64.0
    targets: Sequence[str] = ('*',)
    seed: int = 0

    def __post_init__(self):
        check_fields(self)
        check_range('Lora.rank', self.rank, is_positive, 'above 0')
        check_range('Lora.alpha', self.alpha, is_positive, 'above 0')
        check_range('Lora.seed', self.seed, is_not_negative, 'at least 0')
        object.__setattr__(self, 'targets', tuple(self.targets))  # hashable, as part of a decoder's configuration

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Adapter(nnx.Module):
    """A and B of one weight, sharded along its inputs and its outputs as the weight is."""

    def __init__(self, lora: Lora, weight: nnx.Param, key: jax.Array):
        (inputs, outputs), (input_axis, output_axis) = weight.shape, weight.axes
        drawn = jax.random.uniform(key, (inputs, lora.rank), minval=-1.0, maxval=1.0)
        self.a = nnx.Param(inputs**-0.5 * drawn, axes=(input_axis, None))
        self.b = nnx.Param(jnp.zeros((lora.rank, outputs)), axes=(None, output_axis))
        self.scale = lora.scale


def adapt(lora: Lora | None, key: jax.Array, *parts: nnx.Module) -> None:
    """Gives each part of a layer a dict `lora`, from the names of its weights [I, O] to their adapters.

    Raises:
      ValueError: a pattern of `targets` that no weight matches, with the names that there are.
    """
    weights = [(p, name, x) for p in parts for name, x in vars(p).items() if isinstance(x, nnx.Param) and x.ndim == 2]
    names = [name for _, name, _ in weights]
    for part in parts:
        part.lora = nnx.Dict()
    for pattern in () if lora is None else lora.targets:
        if not (chosen := fnmatch.filter(names, pattern)):
            raise ValueError(f'Lora.targets: no weight of a layer matches {pattern!r}; expected some of {names}')
        for i, (part, name, weight) in enumerate(weights):
            if name in chosen:
                part.lora[name] = Adapter(lora, weight, jax.random.fold_in(key, i))


def split(params: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Parameters, or their shapes, as the frozen and the trained ones; without adapters None and all."""
    flat = flatten_dict(params)
    trained = {path: x for path, x in flat.items() if 'lora' in path}
    if not trained:
        return None, params
    return unflatten_dict({path: x for path, x in flat.items() if path not in trained}), unflatten_dict(trained)


def merge(params: dict[str, Any], lora: Lora | None) -> dict[str, Any]:
    """The parameters of the same decoder without adapters: W + s A B, summed in float32, in the dtype of W."""
    frozen, trained = split(params)
    if frozen is None:
        return params
    flat, adapters = flatten_dict(frozen), flatten_dict(trained)
    for (*where, _, name, factor), a in adapters.items():
        if factor == 'a':
            b, path = adapters[*where, 'lora', name, 'b'], (*where, name)
            a, b, weight = (x.astype(jnp.float32) for x in (a, b, flat[path]))
            change = jnp.einsum('...ir,...ro->...io', a, b, precision='highest')
            flat[path] = (weight + lora.scale * change).astype(flat[path].dtype)
    return unflatten_dict(flat)


def checksum(params: Any) -> jax.Array:
    """[] uint32: of all parameters in bfloat16, the same for any mesh and in any compute dtype."""
    return sharding.checksum(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
