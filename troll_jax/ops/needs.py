"""Inputs that a function asks for by name: it has a parameter of that name, and is given it.

An advantage estimator with a parameter `values` needs a critic, one with `greedy_reward` a greedy response to every
prompt; a regulariser with `reference` needs a reference model; a tail rule with `new` the current policy's own support;
an objective with `minibatch` all tokens of an update.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def needs(function: Callable | None, name: str) -> bool:
    """True if a function has a parameter `name` that no `functools.partial` has set. None needs nothing."""
    while isinstance(function, functools.partial):
        if name in function.keywords:
            return False
        if function.args:  # they are the first parameters
            break
        function = function.func
    return function is not None and name in inspect.signature(function).parameters


def give(function: Callable, **inputs: Any) -> dict[str, Any]:
    """Those of `inputs` that a function needs, to be passed by name."""
    return {name: value for name, value in inputs.items() if needs(function, name)}


def by_name(function: Callable, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `inputs` that a function takes by name, all if it takes any. Raises a ValueError if it needs others."""
    signature = inspect.signature(function)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    taken = {name: value for name, value in inputs.items() if takes_any or name in signature.parameters}
    try:
        signature.bind(**taken)
    except TypeError as error:
        name = getattr(function, '__name__', repr(function))
        raise ValueError(f'{name}: {error}, which nothing gives it; expected some of {sorted(inputs)}') from error
    return taken
