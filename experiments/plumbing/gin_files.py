"""Reads gin files into values. Nothing else knows gin, which is no more than a parser here.

`Method.objective = @troll` with `troll.bound = 0.1` is `functools.partial(troll, bound=0.1)`, and `@GSM8K()` is a call.
Bindings behind a scope are those of one use alone: `Critic.optimizer = @critic/adamw` with
`critic/adamw.learning_rate = 1e-5`. A line `import my_losses` makes the functions and classes of that module known, and
`include 'my_losses.py'` those of a file. `'my_losses.py:quadratic'` as a value is that and `@quadratic`; a class is
called. The file is looked for beside the gin file, or, on the command line, in the working folder.
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from gin import config_parser

from experiments.plumbing.names import NAMES, OBJECTIVES, REGIONS, load_file
from troll_jax.typechecks import check_arguments

# Given by the caller; or, of MathEval, to be bound for one benchmark at a time.
_FIXED = {'MathEval': ('data_source',)} | {region.__name__: ('bound',) for region in REGIONS}
_FIXED |= {objective.__name__: ('progress', 'minibatch') for objective in OBJECTIVES}

_IN_FILE = re.compile(r'(.+\.py):(\w+)')
_HERE = Path(__file__).parents
ROOT = _HERE[1] if (_HERE[1] / 'configs').is_dir() else _HERE[2]
"""The folder of `configs`: that of `experiments` in an installation, and this repository otherwise."""
FILES = sorted((ROOT / 'configs').rglob('*.gin'))


@dataclasses.dataclass(frozen=True)
class Reference:
    """@scope/name, or a call of it."""

    key: str  # scope/name
    call: bool

    def __repr__(self) -> str:
        return f'@{self.key}{"()" if self.call else ""}'


@dataclasses.dataclass(frozen=True)
class Macro:
    """%name."""

    name: str

    def __repr__(self) -> str:
        return f'%{self.name}'


class _Values(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        return Reference(scoped_configurable_name, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


class Config:
    """Bindings of gin files, and the values that they describe.

    Args:
      files: as in `find_file`, of which later ones win. A `config.gin` is that of a run: no code in its folder is run.
      bindings: lines of gin that win over all files.
      commands: functions besides `NAMES` whose arguments may be bound.

    Raises:
      ValueError: a file, name or parameter that does not exist, with the nearest that does; a macro that nothing uses;
        a value that is not of its parameter's type.
    """

    def __init__(self, files: Sequence[str | Path], bindings: Sequence[str] = (), commands: Sequence[Callable] = ()):
        self.names = NAMES | {command.__name__: command for command in commands}
        self.modules: list[ModuleType] = []
        self.bindings: dict[str, dict[str, Any]] = {}  # scope/name → parameter → value as it was read
        self.macros: dict[str, Any] = {}
        self.used: set[str] = set()
        self._open: list[str] = []  # whose arguments are being resolved
        self._runs = [file.parent.resolve() for file in map(Path, files) if file.name == 'config.gin']
        for file in files:
            file = find_file(file)
            self._read(str(file), file, within=(file.resolve(),))
        self._on_command_line: list[str] = []
        for binding in bindings:
            self._read(repr(binding), binding, self._on_command_line)
        self._check_macros()
        for key in list(self.bindings):
            self.arguments(key)  # their types, also of what is not used
        self.used.clear()

    def build(self, target: type) -> Any:
        """Builds one of the five settings, or another class.

        Raises:
          ValueError: a field without a default that is not bound, or what the class raises.
        """
        return self._call(target.__name__)

    def function(self, target: Callable, *given: Any) -> functools.partial:
        """A function with its bound arguments behind those that are given. Errors as in `build`."""
        bound = functools.partial(target, *given, **self.arguments(target.__name__))
        if missing := _missing(bound):
            raise ValueError(_needs(target.__name__, missing))
        return bound

    def setdefault(self, name: str, value: Any) -> None:
        """Binds a parameter, such as 'Run.folder', that is not bound."""
        key, parameter = name.rsplit('.', 1)
        self.bindings.setdefault(key, {}).setdefault(parameter, value)

    def check_used(self) -> None:
        """Raises a ValueError if a binding of the command line has changed nothing, once all values are built.

        Files may bind what an experiment does not use, such as the parameters of another objective.
        """
        for name in self._on_command_line:
            if name not in self.used:
                raise ValueError(
                    f'nothing that this experiment uses reads {name!r}: it would change nothing. Leave it out, or bind '
                    f'what uses {name.rsplit(".", 1)[0]!r}.'
                )

    def get(self, name: str) -> Any:
        """The value of one binding, such as 'Run.checkpoint_folder'; None if there is none."""
        key, parameter = name.rsplit('.', 1)
        return self.arguments(key, only=parameter).get(parameter)

    def arguments(self, key: str, only: str | None = None) -> dict[str, Any]:
        """The bound arguments of scope/name, as values."""
        if key in self._open:
            raise ValueError(f'@{key} is one of its own settings; expected another value. Change that line.')
        target, sources = self._target(key), {}
        if isinstance(target, functools.partial):  # a class under another name
            base = target.func.__name__
            sources = {p: f'{base}.{p}' for p in self.bindings.get(base, {}) if p not in target.keywords}
        sources |= {parameter: f'{key}.{parameter}' for parameter in self.bindings.get(key, {})}
        values = {}
        for parameter, source in sources.items():
            if only not in (None, parameter):
                continue
            owner, _ = source.rsplit('.', 1)
            raw = self.bindings[owner][parameter]
            self._open.append(key)
            try:
                values[parameter] = self._value(raw)
            except ValueError as error:
                raise ValueError(f'{source} = {raw!r}: {error}') from error
            finally:
                self._open.pop()
            try:
                check_arguments(owner, target, {parameter: values[parameter]})
            except ValueError as error:
                meant = f'. Did you mean {Reference(raw.key, not raw.call)}?' if isinstance(raw, Reference) else ''
                raise ValueError(f'{error}{meant}') from None
            self.used.add(source)
        return values

    def _call(self, key: str) -> Any:
        target, arguments = self._target(key), self.arguments(key)
        if missing := _missing(functools.partial(target, **arguments)):
            if not inspect.isclass(target) and not isinstance(target, functools.partial):
                raise ValueError(f'@{key}() calls {key}, which takes {", ".join(missing)}; expected @{key}, or a class')
            raise ValueError(_needs(key, missing))
        return target(**arguments)

    def _value(self, raw: Any, seen: tuple[str, ...] = ()) -> Any:
        """The value of what was read: macros and references are resolved."""
        if isinstance(raw, Macro):
            if raw.name in seen:
                raise ValueError(f'the macro %{raw.name} stands for itself; expected a value. Change its line.')
            if raw.name not in self.macros:
                raise ValueError(f'nothing defines the macro %{raw.name}; expected a line {raw.name} = value')
            return self._value(self.macros[raw.name], (*seen, raw.name))
        if isinstance(raw, Reference):
            key = self._full(raw.key)
            if raw.call:
                return self._call(key)
            target, arguments = self._target(key), self.arguments(key)
            return functools.partial(target, **arguments) if arguments else target
        if isinstance(raw, dict):
            return {self._value(name, seen): self._value(value, seen) for name, value in raw.items()}
        return type(raw)(self._value(item, seen) for item in raw) if isinstance(raw, (list, tuple)) else raw

    # Reading.

    def _read(self, where: str, source: str | Path, noted: list[str] | None = None, within: tuple[Path, ...] = ()):
        """Reads a file, or a text of bindings, whose names are appended to `noted`."""
        try:
            text = source.read_text(encoding='utf-8') if isinstance(source, Path) else source
            statements = list(config_parser.ConfigParser(text, _Values()))
        except Exception as error:  # of many kinds: Python's own tokenizer and parser read these files
            if meant := _meant(getattr(error, 'text', None) or '', self.names):
                meant = f'"{meant}"' if noted is not None else f'{meant} in line {error.lineno}'
                raise ValueError(f'{where}: not a value; write {meant}') from error
            raise ValueError(
                f'{where}: cannot be read ({error}); expected name.parameter = value, and text in quotes'
            ) from error
        base = (source.parent if isinstance(source, Path) else Path()).resolve()
        for statement in statements:
            try:
                if isinstance(statement, config_parser.IncludeStatement):
                    self._include(statement.filename, base, within)
                elif isinstance(statement, config_parser.ImportStatement):
                    self._import(statement.module)
                elif isinstance(statement, config_parser.BindingStatement):
                    self._bind(statement._replace(value=self._from_files(statement.value, base)), noted)
            except ValueError as error:
                raise ValueError(f'{where}: {error}') from error

    def _include(self, name: str, base: Path, within: tuple[Path, ...]) -> None:
        if name.endswith('.py'):
            self._load(name, base)
            return
        file = find_file(name, *(path.parent for path in within[-1:]))
        if file.resolve() in within:
            raise ValueError(f'{name} includes itself; leave that line out')
        self._read(name, file, within=(*within, file.resolve()))

    def _import(self, name: str) -> None:
        for folder in sys.path:
            place = Path(folder, *name.split('.')).resolve()
            if any(place.parent.glob(f'{place.name}*')):
                self._refuse_code_of_runs(name, place, *place.parents)
        try:
            self.modules.append(importlib.import_module(name))
        except ImportError as error:
            raise ValueError(f'cannot import {name!r} ({error}); expected a module in the working folder') from error

    def _load(self, name: str, base: Path) -> ModuleType:
        """The module of a Python file, by its path from `base`. Code that came with a run is not run."""
        path = Path(name).expanduser()
        file = (base / path).resolve()
        self._refuse_code_of_runs(name, *file.parents, *(() if path.is_absolute() else (base, *base.parents)))
        self.modules.append(load_file(file))
        return self.modules[-1]

    def _refuse_code_of_runs(self, name: str, *folders: Path) -> None:
        if run := next((run for run in self._runs if run in folders), None):
            raise ValueError(
                f'the code {name!r} came with the run {str(run)!r}, so it is not run; expected the full path of a file '
                'elsewhere. Copy it there once you trust it.'
            )

    def _from_files(self, value: Any, base: Path) -> Any:
        """A value with references in place of what it names with a Python file."""
        if isinstance(value, dict):
            return {self._from_files(name, base): self._from_files(item, base) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._from_files(item, base) for item in value)
        if not isinstance(value, str) or not (match := _IN_FILE.fullmatch(value)):
            return value
        module, name = self._load(match[1], base), match[2]
        if not callable(found := getattr(module, name, None)):
            known = [name for name, x in vars(module).items() if callable(x) and not name.startswith('_')]
            raise ValueError(f'{match[1]!r} has no function or class {name!r}.\n{_instead(name, known)}')
        return Reference(self._full(f'{module.__name__}.{name}'), call=inspect.isclass(found))

    def _bind(self, statement: config_parser.BindingStatement, noted: list[str] | None) -> None:
        scope, name, parameter, value = statement[:4]
        key = f'{scope}/{name}' if scope else name
        if not parameter:
            self.macros[key] = value
            return
        key = self._full(key)
        known = settable(self._target(key))
        takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(self._target(key)).parameters.values())
        if parameter not in known and not takes_any:
            raise ValueError(f'{name!r} has no parameter {parameter!r}.\n{_instead(parameter, known)}')
        for item in _leaves(value):
            if isinstance(item, Reference):
                self._full(item.key)
        self.bindings.setdefault(key, {})[parameter] = value
        if noted is not None:
            noted.append(f'{key}.{parameter}')

    def _full(self, key: str) -> str:
        """Scope and name of a function or class; of one that was imported with its module."""
        scope, slash, name = key.rpartition('/')
        if name in self.names:
            return key
        for module in self.modules:
            attribute = name.removeprefix(f'{module.__name__}.')
            if callable(found := getattr(module, attribute, None)):
                owner = getattr(getattr(found, 'func', found), '__module__', None) or ''
                if owner.partition('.')[0] in sys.stdlib_module_names:
                    raise ValueError(f'{name!r} is part of Python ({owner}); expected a function or class of yours')
                full = f'{module.__name__}.{attribute}'
                self.names[full] = found
                return f'{scope}{slash}{full}'
        last = name.split('.')[-1]
        near = difflib.get_close_matches(last, self.names) or [_nearest(last, self.names)]
        raise ValueError(
            f'nothing is called {name!r}.\nDid you mean {" or ".join(map(repr, near))}? A line `import module` or '
            "`include 'file.py'` above adds the functions and classes of yours."
        )

    def _target(self, key: str) -> Callable:
        return self.names[key.rpartition('/')[2]]

    def _check_macros(self) -> None:
        """Raises a ValueError for `steps = 3`, which defines a macro and does not set `Run.steps`."""
        values = [value for bound in (*self.bindings.values(), self.macros) for value in bound.values()]
        used = {item.name for value in values for item in _leaves(value) if isinstance(item, Macro)}
        for macro in self.macros:
            if macro not in used:
                meant = ' or '.join(map(repr, nearest_bindings(macro, self.names)))
                raise ValueError(f'nothing uses the macro {macro!r}.\nDid you mean {meant}?')


def find_file(name: str | Path, beside: Path | None = None) -> Path:
    """The gin file of a name.

    Args:
      name: if it ends with '.gin', a path, which is looked for beside the file that includes it, in the working folder,
        and in that of `configs`. Else a file of `configs`: 'troll', or 'objectives/troll' if others are called so.
      beside: folder of the file that includes it.

    Raises:
      ValueError: there is none or there are several, with the nearest that there is.
    """
    if (path := Path(name)).suffix == '.gin':
        folders = (*filter(None, [beside]), Path(), ROOT)
        if found := [folder / path for folder in folders if (folder / path).is_file()]:
            return found[0]
        raise ValueError(
            f'no configuration file {str(name)!r}, in {" or in ".join(str(x.absolute()) for x in folders)}'
        )
    shipped = {file.relative_to(ROOT / 'configs').with_suffix('').as_posix(): file for file in FILES}
    found = [known for known in shipped if f'/{known}'.endswith(f'/{name}')]
    if len(found) == 1:
        return shipped[found[0]]
    if found:
        raise ValueError(f'several configurations are called {name!r}; write {" or ".join(found)}')
    near = _nearest(str(name), [*(file.stem for file in FILES), *shipped, *map(str, Path().glob('*.gin'))])
    raise ValueError(f'no configuration is called {name!r}. Did you mean {near!r}? Files of your own end with .gin.')


def settable(target: Callable) -> list[str]:
    """The parameters of a function or class that may be bound."""
    name = getattr(target, '__name__', '')
    is_ours = NAMES.get(name) is target
    fixed = (*(_FIXED.get(name, ()) if is_ours else ()), *getattr(target, 'keywords', ()))
    parameters = inspect.signature(target).parameters.values()
    if inspect.isroutine(target) and is_ours:  # whose caller gives the first ones
        parameters = [p for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
    unnamed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.name not in fixed and p.kind not in unnamed]


def nearest_bindings(parameter: str, names: Mapping[str, Callable] = NAMES) -> list[str]:
    """The bindings of the parameter whose name is nearest, such as 'Run.steps', of all that have one."""
    known = [(p, f'{name}.{p}') for name, target in names.items() for p in settable(target)]
    near = _nearest(parameter, [name for name, _ in known])
    return [full for name, full in known if name == near]


def _meant(line: str, names: Mapping[str, Callable]) -> str | None:
    """The binding that is meant by a line with a bare word for a value, None for any other."""
    found = re.match(r'\s*([\w./]+)\s*=\s*([A-Za-z./~][^\s\'"(){}\[\],%@]*)\s*(#|$)', line)
    if found is None:
        return None
    name, value = found.groups()[:2]
    constants = {'true': 'True', 'false': 'False', 'none': 'None', 'null': 'None'}
    return f'{name} = {constants.get(value.lower()) or (f"@{value}" if value in names else repr(value))}'


def _missing(function: Callable) -> list[str]:
    """Parameters that a call has to give."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variable]


def _needs(key: str, missing: Sequence[str]) -> str:
    names = ', '.join(f'{key}.{name}' for name in missing)
    return f'{key} needs {names}; bind each, or add a gin file that does'


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _instead(name: str, known: Sequence[str]) -> str:
    return f'Did you mean {_nearest(name, known)!r}? It has: {", ".join(sorted(known))}.' if known else 'It has none.'


def _nearest(name: str, known: Sequence[str]) -> str:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
