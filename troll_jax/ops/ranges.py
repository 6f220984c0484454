"""Numbers that are out of their range."""

import numbers
from collections.abc import Callable


def check_range(name: str, value, fits: Callable[[float], bool], expected: str) -> None:
    """Raises a ValueError for a number of Python or numpy that does not fit.

    An array is not looked at: under `jax.jit` it has no value yet.
    """
    if isinstance(value, numbers.Real) and not fits(value):
        raise ValueError(f'{name} must be {expected}; got {value}')


def is_positive(value: float) -> bool:
    return value > 0


def is_not_negative(value: float) -> bool:
    return value >= 0
