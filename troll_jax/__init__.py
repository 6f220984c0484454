"""TROLL in JAX: trust regions for reinforcement learning of language models."""

import importlib

_PUBLIC = {
    'Projection': 'troll_jax.ops.projection',
    'SparseLogProbs': 'troll_jax.types',
    'kl_divergence': 'troll_jax.ops.projection',
    'project': 'troll_jax.ops.projection',
    'project_sequence': 'troll_jax.ops.projection',
    'project_sparse': 'troll_jax.ops.projection',
    'sparsify': 'troll_jax.ops.support',
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    # Imported when asked for (PEP 562): grading workers import this package and have no use for JAX.
    if name not in _PUBLIC:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
