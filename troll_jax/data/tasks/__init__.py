"""Tasks: a data set, how its problems are put to the policy, and how answers are graded. One file per kind of problem.

Import the task you use from its own file: one with a heavy verifier should not slow down the others.
"""

from troll_jax.data.tasks.interface import Task

__all__ = ['Task']
