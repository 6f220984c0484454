"""Whether what gin files bind is of the type that the code expects. Gin itself passes on anything."""

import collections.abc
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import gin
from gin.config import ConfigurableReference, macro

_LARGEST = 2**31  # of whole numbers: JAX has them in 32 bits
_PLAIN = {
    int: 'a whole number below 2 ** 31',
    float: 'a finite number',
    bool: 'True or False',
    str: 'text in quotes',
    type(None): 'None',
    dict: 'a dictionary',
    list: 'a list',
    tuple: 'a list',
    collections.abc.Sequence: 'a list',
}


def check_types(targets: Mapping[str, Callable]) -> None:
    """Compares every value that is bound with the annotation, or else the default, of its parameter.

    Args:
      targets: functions and classes by the names that gin knows them by.

    Raises:
      ValueError: a value of another type, or a reference to something that cannot be called as it would be, because it
        is for something else or because a parameter without a default is not bound.
    """
    for name, target in targets.items():
        for parameter, value in gin.get_bindings(name, resolve_references=False).items():
            _check(f'{name}.{parameter}', _resolve(value), _expected(target, parameter))


def _check(name: str, value: Any, expected: Any) -> None:
    if not _fits(value, expected):
        raise ValueError(f'{name} is {_short(value)}; expected {_describe(expected)}. Change the binding.')
    for reference in _references(value):
        if missing := _missing(reference):
            raise ValueError(
                f'{name} is {_short(value)}, which needs {", ".join(missing)}; expected a binding of each.'
            )


def _resolve(value: Any) -> Any:
    """What a macro stands for, or the value itself."""
    names = []
    while isinstance(value, ConfigurableReference) and value.configurable.wrapped is macro and value.evaluate:
        name = '/'.join(value.scopes)
        if name in names:
            raise ValueError(f'the macro %{name} stands for itself; expected a value. Change its line.')
        names.append(name)
        value = gin.query_parameter(f'{name}/gin.macro.value')
    return value


def _expected(target: Callable, parameter: str) -> Any:
    """The type of a parameter. One without an annotation takes a function like its default, or a number instead."""
    hints = _hints(target)
    if parameter in hints:
        return hints[parameter]
    default = inspect.signature(target).parameters[parameter].default
    if callable(default):
        return Callable
    if default is None:
        return Callable | None
    return float | Callable if isinstance(default, (int, float)) else Any


def _hints(target: Callable) -> dict[str, Any]:
    target = getattr(target, 'func', target)  # of a `partial`
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    return hints | {'return': target} if inspect.isclass(target) else hints


def _fits(value: Any, expected: Any) -> bool:
    """Whether a value, as it is written in a gin file, is of a type."""
    value = _resolve(value)
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any or isinstance(expected, typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    kind = origin or expected
    if kind is collections.abc.Callable:
        return isinstance(value, ConfigurableReference) and not value.evaluate and _is_such_a_function(value, arguments)
    if isinstance(value, ConfigurableReference):
        return value.evaluate and _returns(value.configurable.wrapped, kind)
    if type(value) is int and abs(value) >= _LARGEST:
        return False
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind in (int, bool, str, type(None)):
        return type(value) is kind
    if kind is dict:
        return isinstance(value, dict)
    if kind in (list, tuple, collections.abc.Sequence):
        if not isinstance(value, (list, tuple)):
            return False
        if kind is tuple and arguments and arguments[-1] is not Ellipsis:
            return len(value) == len(arguments) and all(map(_fits, value, arguments))
        return all(_fits(item, arguments[0]) for item in value) if arguments else True
    return False  # an object, which only a reference makes


def _is_such_a_function(reference: ConfigurableReference, arguments: tuple) -> bool:
    """Whether a function takes and returns what `Callable[arguments]` says, as far as both are annotated."""
    target = reference.configurable.wrapped
    if not arguments:
        return True
    given, returned = arguments
    if not _returns(target, returned):
        return False
    if given is Ellipsis:
        return True
    try:
        taken = inspect.signature(target).bind_partial(*given).arguments
    except TypeError:  # more than it takes
        return False
    hints = _hints(target)
    return all(_may_be(want, hints.get(name, Any)) for name, want in taken.items())


def _returns(target: Callable, kind: Any) -> bool:
    """Whether what a call of `target` gives may be of a class, as far as that is known."""
    returned = _hints(target).get('return', Any)
    if getattr(kind, '_is_protocol', False) and inspect.isclass(returned) and returned is not Any:
        needed = {*vars(kind), *vars(kind).get('__annotations__', ())}
        return all(hasattr(returned, name) for name in needed if not name.startswith('_'))
    return _may_be(returned, kind)


def _may_be(one: Any, other: Any) -> bool:
    """Whether something of one type may be of another."""
    if Any in (one, other):  # which is a class
        return True
    if typing.get_origin(one) in (typing.Union, types.UnionType):
        return any(_may_be(part, other) for part in typing.get_args(one))
    if typing.get_origin(other) in (typing.Union, types.UnionType):
        return any(_may_be(one, part) for part in typing.get_args(other))
    if not (inspect.isclass(one) and inspect.isclass(other)):
        return typing.get_origin(one) is None or not inspect.isclass(other)
    return issubclass(one, other)


def _references(value: Any) -> list[ConfigurableReference]:
    value = _resolve(value)
    if isinstance(value, ConfigurableReference):
        return [value]
    return [found for item in value for found in _references(item)] if isinstance(value, (list, tuple)) else []


def _missing(reference: ConfigurableReference) -> list[str]:
    """What of a reference's parameters must be bound and is not."""
    configurable = reference.configurable
    bound = gin.get_bindings(configurable.selector, resolve_references=False)
    # What a function takes by position comes from whoever calls it.
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)[: 1 + reference.evaluate]
    return [
        f'{configurable.name}.{p.name}'
        for p in inspect.signature(configurable.wrapped).parameters.values()
        if p.kind in kinds and p.default in (p.empty, gin.REQUIRED)
        if p.name not in bound and p.name not in (configurable.denylist or ())
    ]


def _describe(expected: Any) -> str:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return ' or '.join(_describe(argument) for argument in arguments)
    kind = origin or expected
    if kind is collections.abc.Callable:
        if not arguments or arguments[0] is Ellipsis:
            return 'a function (@name)'
        return f'a function (@name) of {", ".join(map(_name, arguments[0]))}'
    if kind in (list, tuple, collections.abc.Sequence) and arguments:
        listed = [_describe(argument) for argument in arguments if argument is not Ellipsis]
        return f'a list of {listed[0]}' if len(listed) == 1 else f'({", ".join(listed)})'
    article = 'an' if _name(kind)[0] in 'AEIOU' else 'a'
    return _PLAIN.get(kind) or f'{article} {_name(kind)} (@name())'


def _name(kind: Any) -> str:
    return getattr(kind, '__name__', str(kind)).split('.')[-1]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f'{text[:117]}...'
