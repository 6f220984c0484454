"""What may be bound of a class or a function, as text: names, types, defaults and the docstring's words."""

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

from experiments.plumbing.gin_files import settable


def describe(name: str, target: Callable) -> str:
    """A line for each setting, with the first sentence that is said of it."""
    base = getattr(target, 'func', target)
    words, lines = documented(base), [f'{name}: {_first(inspect.getdoc(base) or "")}']
    for parameter in map(inspect.signature(target).parameters.get, settable(target)):
        kind, default = _kind(parameter.annotation), re.sub(r'<function (.*?) at .*?>', r'@\1', repr(parameter.default))
        usual = '' if parameter.default is parameter.empty else f' = {default}'
        line = f'  {name}.{parameter.name}{usual} ({kind}): {_first(words.get(parameter.name, ""))}'
        lines.append(textwrap.fill(line, 120, subsequent_indent='      '))
    return '\n'.join(lines)


def documented(target: Callable) -> dict[str, str]:
    """What the section Args of its docstring, and of those of its base classes, says of each parameter."""
    words = {}
    for base in reversed(inspect.getmro(target) if inspect.isclass(target) else [target]):
        section = re.search(r'^Args:\n((?: +.*\n?)*)', inspect.getdoc(base) or '', re.MULTILINE)
        entries = r'^(\w+(?:, \w+)*): (.*(?:\n .*)*)'
        for names, text in re.findall(entries, textwrap.dedent(section[1]) if section else '', re.MULTILINE):
            words |= dict.fromkeys(names.split(', '), ' '.join(text.split()))
    return words


def _first(text: str) -> str:
    """The first sentence."""
    return re.split(r'\.(?=\s+[A-Z0-9])|\.?\n\n', text)[0].rstrip('.').replace('\n', ' ')


def _kind(annotation: Any) -> str:
    """A type as it is written, in short."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r'\b(\w+\.)+', '', text)
    return 'function' if 'Callable' in text else re.sub(r'^Literal\[(.*)\]$', r'\1', text)
