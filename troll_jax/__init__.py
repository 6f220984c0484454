"""TROLL in JAX: trust regions for reinforcement learning of language models."""

from troll_jax.ops.projection import Projection, kl_divergence, project, project_sparse
from troll_jax.ops.support import sparsify
from troll_jax.types import SparseLogProbs

__all__ = ['Projection', 'SparseLogProbs', 'kl_divergence', 'project', 'project_sparse', 'sparsify']
