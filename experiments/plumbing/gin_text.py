"""Writes settings as a gin file, which `Config` reads back as the same values."""

import dataclasses
import functools
import hashlib
import inspect
import itertools
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from experiments.plumbing.names import FILES, NAMES


def to_bindings(*settings: Any) -> dict[str, str]:
    """Settings as gin bindings: name → value as text, to be compared. Values that are the default are left out.

    A value that no gin file can name, such as a lambda or a function of a notebook, is put in angle brackets.
    """
    return {name: value.replace(_UNNAMED, '') for name, value in _Writer(settings).lines.items()}


def to_gin(*settings: Any) -> str:
    """Settings as a gin file. An argument of a function that was set is written even if it is the default."""
    writer = _Writer(settings, with_defaults=True)
    lines = [f'include {FILES[x].__file__!r}' if x in FILES else f'import {x}' for x in sorted(writer.modules)]
    for name, value in sorted(writer.lines.items(), key=lambda line: line[0].lower()):
        comment = '# not in a gin file: ' if _UNNAMED in value else ''
        lines.append(f'{comment}{name} = {value.replace(_UNNAMED, "")}')
    return '\n'.join(lines) + '\n'


def own_code(*settings: Any) -> dict[str, str]:
    """The source of modules and functions in the settings that are not part of this repository, by name."""
    writer = _Writer(settings)
    found = [(name, sys.modules[name]) for name in sorted(writer.modules)] + [
        (_qualified(x), x) for x in writer.unnamed
    ]
    code = {}
    for name, value in found:
        with suppress(OSError, TypeError):  # it has no file
            code[name] = code.get(name, '') + inspect.getsource(value)
    return code


_UNNAMED = '\0'  # marks a value that no gin file can name


class _Writer:
    def __init__(self, settings: Sequence[Any], *, with_defaults: bool = False):
        self._with_defaults = with_defaults
        self.lines: dict[str, str] = {}
        self.modules: set[str] = set()
        self.unnamed: list[Callable] = []
        self._keys: dict[str, dict[str, str]] = {}  # scope/name → its parameters
        for value in settings:
            self._object(value, '')

    def _text(self, value: Any, owner: str) -> str:
        """A value as gin reads it. `owner` is the name of the object whose field it is."""
        text = functools.partial(self._text, owner=owner)
        if isinstance(value, (list, tuple)):  # alike, so that one is no change of the other
            return f'({", ".join(map(text, value))}{"," * (len(value) == 1)})'
        if isinstance(value, dict):
            return f'{{{", ".join(f"{text(name)}: {text(item)}" for name, item in value.items())}}}'
        if isinstance(value, (bool, str, type(None))):
            return repr(value)
        if isinstance(value, (int, float, np.generic)):
            return repr(value.item() if isinstance(value, np.generic) else value)
        if isinstance(value, functools.partial):
            signature = inspect.signature(value.func)
            given = signature.bind_partial(*value.args, **value.keywords).arguments
            arguments = {}
            for name, argument in given.items():
                parameter = signature.parameters[name]
                if parameter.kind is parameter.VAR_KEYWORD:
                    arguments |= argument
                elif self._with_defaults or not _is_equal(argument, parameter.default):
                    arguments[name] = argument
            return self._reference(value.func, arguments, owner)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return f'{self._object(value, owner)}()'
        if getattr(value, '__dict__', None) == {} and not callable(value) and self._name(type(value)):
            return f'{self._reference(type(value), {}, owner)}()'
        if inspect.isroutine(value) or inspect.isclass(value) or self._name(value):
            return self._reference(value, {}, owner)
        self.unnamed.append(type(value))
        if isinstance(value, np.ndarray):
            return f'{_UNNAMED}<array {value.dtype}{value.shape} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}>'
        plain = (bool, int, float, str, type(None), np.generic, np.ndarray)
        shown = lambda item: text(item) if isinstance(item, plain) else type(item).__name__
        given = ', '.join(f'{name}={shown(item)}' for name, item in getattr(value, '__dict__', {}).items())
        return f'{_UNNAMED}<{_qualified(type(value))}({given})>'

    def _reference(self, target: Any, arguments: dict[str, Any], owner: str, name: str | None = None) -> str:
        """A function or class with arguments, which are written on lines of their own."""
        if name := name or self._name(target):
            return f'@{self._key(name, arguments, owner)}'
        self.unnamed.append(target)
        given = ', '.join(f'{parameter}={self._text(value, owner)}' for parameter, value in arguments.items())
        return f'{_UNNAMED}<{_qualified(target)}{f"({given})" if given else ""}>'

    def _object(self, value: Any, owner: str) -> str:
        """A dataclass, of which all fields are written that do not have their default."""
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        named = {x: known.keywords for x, known in NAMES.items() if getattr(known, 'func', None) is type(value)}
        name, fixed = next(((x, given) for x, given in named.items() if given.items() <= fields.items()), (None, {}))
        changed = {
            field.name: fields[field.name]
            for field in dataclasses.fields(value)
            if field.init and field.name not in fixed and not _is_default(field, fields[field.name])
        }
        return self._reference(type(value), changed, owner, name)

    def _key(self, name: str, arguments: dict[str, Any], owner: str) -> str:
        """The name under which these arguments are bound: with a scope, if others are bound under the name alone."""
        texts = {parameter: self._text(value, name) for parameter, value in arguments.items()}
        scopes = (f'{owner.rpartition(".")[2].lower()}{i or ""}' for i in itertools.count())
        candidates = itertools.chain([name], (f'{scope}/{name}' for scope in scopes))
        key = next(key for key in candidates if self._keys.get(key, texts) == texts)
        self._keys[key] = texts
        self.lines |= {f'{key}.{parameter}': text for parameter, text in texts.items()}
        return key

    def _name(self, target: Any) -> str | None:
        """The name of a function or class in a gin file, None if it has none."""
        for name, known in NAMES.items():
            if known is target:
                return name
        for module, file in FILES.items():  # what it is called there, be it a closure
            if name := next((name for name, x in vars(file).items() if x is target and callable(x)), None):
                self.modules.add(module)
                return f'{module}.{name}'
        module, name = getattr(target, '__module__', None), getattr(target, '__qualname__', '')
        if module in (None, '__main__') or getattr(sys.modules.get(module), name, None) is not target:
            return None
        self.modules.add(module)
        return f'{module}.{name}'


def _qualified(target: Any) -> str:
    return f'{getattr(target, "__module__", "")}.{getattr(target, "__qualname__", type(target).__name__)}'


def _is_default(field: dataclasses.Field, value: Any) -> bool:
    has_factory = field.default_factory is not dataclasses.MISSING
    return _is_equal(value, field.default_factory() if has_factory else field.default)


def _is_equal(value: Any, default: Any) -> bool:
    """True for equal values, a list and a tuple among them, but not for True and 1."""
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return len(value) == len(default) and all(map(_is_equal, value, default))
    return isinstance(value, bool) is isinstance(default, bool) and bool(value == default)
