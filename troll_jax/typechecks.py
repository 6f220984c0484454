"""Type checks of settings: a value against the annotation of its field or parameter."""

import collections.abc
import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

_LARGEST = 2**31  # of whole numbers: JAX has them in 32 bits
_PLAIN = {
    int: 'a whole number below 2 ** 31',
    float: 'a finite number',
    bool: 'True or False',
    str: 'a string',
    type(None): 'None',
    dict: 'a dictionary',
    list: 'a list',
    tuple: 'a list',
    collections.abc.Sequence: 'a list',
}


def check_fields(settings: Any) -> None:
    """Checks every field of a dataclass. Raises a ValueError, see `check_type`."""
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for name in settings.__dataclass_fields__:
        check_type(f'{type(settings).__name__}.{name}', getattr(settings, name), hints[name])


def check_arguments(name: str, target: Callable, arguments: Mapping[str, Any]) -> None:
    """Checks arguments of a function or class, as far as its parameters are annotated."""
    hints = _hints(target)
    for parameter, value in arguments.items():
        check_type(f'{name}.{parameter}', value, hints.get(parameter, Any))


def check_type(name: str, value: Any, expected: Any) -> None:
    """Checks one value.

    Args:
      name: name for the error.
      value: value to check; of numbers also the range that JAX has, and of functions what they take.
      expected: annotation. `Annotated[Callable[…], 'a', 'b']` is a function that may also have parameters of these
        names, see `troll_jax.ops.needs`.

    Raises:
      ValueError: another type, or a function with a parameter that nothing sets.
    """
    if not _fits(value, expected):
        raise ValueError(f'{name} is {_short(value)}; expected {_describe(expected)}')
    for function, kind in _functions(value, expected):
        if isinstance(function, functools.partial):
            check_arguments(_name(function), function, function.keywords)
        if missing := _missing(function, kind):
            needed = ', '.join(f'{_name(function)}.{parameter}' for parameter in missing)
            raise ValueError(f'{name} is {_short(value)}, which needs {needed}; set each, or use another function.')


def _fits(value: Any, expected: Any) -> bool:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is Annotated:
        return _fits(value, arguments[0])
    if origin is Literal:
        return any(value is option or (type(value) is type(option) and value == option) for option in arguments)
    if expected in (Any, object) or isinstance(expected, typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    kind = origin or expected
    if kind is collections.abc.Callable:
        return callable(value) and not inspect.isclass(value) and _takes(value, arguments)
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, numbers.Integral) and abs(value) >= _LARGEST:
        return False
    if kind is int:
        return isinstance(value, numbers.Integral)
    if kind is float:
        return isinstance(value, numbers.Real) and math.isfinite(value)
    if kind in (list, tuple, collections.abc.Sequence):
        if not isinstance(value, (list, tuple)):
            return False
        if kind is tuple and arguments and arguments[-1] is not Ellipsis:
            return len(value) == len(arguments) and all(map(_fits, value, arguments))
        return all(_fits(item, arguments[0]) for item in value) if arguments else True
    if getattr(kind, '_is_protocol', False):
        return not inspect.isclass(value) and all(hasattr(value, name) for name in _members(kind))
    return isinstance(value, kind)


def _members(protocol: type) -> list[str]:
    return sorted(x for x in {*vars(protocol), *vars(protocol).get('__annotations__', ())} if not x.startswith('_'))


def _takes(function: Callable, arguments: tuple) -> bool:
    """True if a function takes and returns what `Callable[arguments]` says, as far as both are annotated."""
    if not arguments:
        return True
    given, returned = arguments
    hints = _hints(function)
    if not _may_be(hints.get('return', Any), returned):
        return False
    if given is Ellipsis:
        return True
    try:
        taken = _signature(function).bind_partial(*given).arguments
    except TypeError:  # more than it takes
        return False
    return all(_may_be(want, hints.get(name, Any)) for name, want in taken.items())


def _missing(function: Callable, expected: Any) -> list[str]:
    """Parameters without a default that are neither given by the caller nor set."""
    names = ()
    if typing.get_origin(expected) is Annotated:
        expected, *names = typing.get_args(expected)
    given = (typing.get_args(expected) or (..., None))[0]
    if given is Ellipsis:
        return []
    signature = _signature(function)
    taken = signature.bind_partial(*given).arguments
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        p.name
        for p in signature.parameters.values()
        if p.default is p.empty and p.kind not in kinds and p.name not in taken and p.name not in names
    ]


def _functions(value: Any, expected: Any) -> Iterator[tuple[Callable, Any]]:
    """The functions in a value that fits, each with its annotation."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        yield from _functions(value, next(argument for argument in arguments if _fits(value, argument)))
    elif origin is collections.abc.Callable or (origin is Annotated and callable(value)):
        yield value, expected
    elif isinstance(value, (list, tuple)) and arguments:
        kinds = arguments if origin is tuple and arguments[-1] is not Ellipsis else [arguments[0]] * len(value)
        for item, kind in zip(value, kinds, strict=True):
            yield from _functions(item, kind)


def _signature(function: Callable) -> inspect.Signature:
    """The signature, without the parameters that a `functools.partial` has set."""
    signature, bound = inspect.signature(function), getattr(function, 'keywords', {})
    return signature.replace(parameters=[p for p in signature.parameters.values() if p.name not in bound])


def _hints(target: Callable) -> dict[str, Any]:
    while isinstance(target, functools.partial):
        target = target.func
    target = target.__init__ if inspect.isclass(target) else target
    target = target if hasattr(target, '__annotations__') else type(target).__call__
    try:
        return typing.get_type_hints(target, include_extras=True)
    except NameError:  # an annotation that cannot be read here
        return {}


def _may_be(one: Any, other: Any) -> bool:
    """True if something of one type may be of another."""
    plain = lambda kind: typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    one, other = plain(one), plain(other)
    if Any in (one, other) or object in (one, other):
        return True
    if typing.get_origin(one) in (typing.Union, types.UnionType):
        return any(_may_be(part, other) for part in typing.get_args(one))
    if typing.get_origin(other) in (typing.Union, types.UnionType):
        return any(_may_be(one, part) for part in typing.get_args(other))
    if not (inspect.isclass(one) and inspect.isclass(other)):
        return typing.get_origin(one) is None or not inspect.isclass(other)
    return issubclass(one, other)


def _describe(expected: Any) -> str:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is Annotated:
        return _describe(arguments[0])
    if origin is Literal:
        return f'one of {arguments}'
    if origin in (typing.Union, types.UnionType):
        return ' or '.join(_describe(argument) for argument in arguments)
    kind = origin or expected
    if kind is collections.abc.Callable:
        if not arguments or arguments[0] is Ellipsis:
            return 'a function'
        return f'a function of {", ".join(map(_name, arguments[0])) or "nothing"} that returns {_name(arguments[1])}'
    if kind in (list, tuple, collections.abc.Sequence) and arguments:
        listed = [_describe(argument) for argument in arguments if argument is not Ellipsis]
        return f'a list of {listed[0]}' if len(listed) == 1 else f'({", ".join(listed)})'
    article = 'an' if _name(kind)[0] in 'AEIOU' else 'a'
    members = f', with {", ".join(_members(kind))}' if getattr(kind, '_is_protocol', False) else ''
    return _PLAIN.get(kind) or f'{article} {_name(kind)}{members}'


def _name(kind: Any) -> str:
    while isinstance(kind, functools.partial):
        kind = kind.func
    return getattr(kind, '__name__', str(kind)).split('.')[-1]


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)) and any(map(callable, value)):
        text = f'[{", ".join(map(_short, value))}]'
    else:
        text = _name(value) if inspect.isroutine(value) or isinstance(value, functools.partial) else repr(value)
    return text if len(text) <= 120 else f'{text[:117]}...'
