"""Grades a program: it is run on test cases in a sandbox, and its output is compared outside of it.

A program never sees what is expected of it, with one exception: asserts other than `assert f(…) == value`, which hold
their own expectations (see `AssertTest`).
"""

import ast
import json
import math
import re
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple, Protocol

from troll_jax.rewards.sandbox import Run, Sandbox

# The names that the data's own grader (verl's prime_code) gives to programs. Here they are beside the builtins and not
# among a program's own, which they would hide, or stand in for: `operator` has an `add`.
_SURROUNDINGS = ''.join(
    f'from {module} import *\nimport {module}\n'
    for module in (
        'typing string re datetime collections heapq bisect copy math random statistics itertools functools operator '
        'io sys json'
    ).split()
)
# A program is a module of its own, and what others know as __main__.
_DEFINE = """
import atexit as _atexit, builtins as _builtins, json as _json, linecache as _linecache, sys as _sys, types as _types
_atexit.register(_sys.__stdout__.flush)  # which `stdout` below would keep open
_sys.setrecursionlimit(600000)
if hasattr(_sys, 'set_int_max_str_digits'):
    _sys.set_int_max_str_digits(0)
_module = _sys.modules[{name!r}] = _sys.modules['__main__'] = _types.ModuleType({name!r})
_module.__file__, _space, _names = 'program.py', _module.__dict__, {{}}
exec({surroundings!r}, _names)
for _name, _value in _names.items():
    if _name[0] != '_' and _name != {tested!r}:
        vars(_builtins).setdefault(_name, _value)
_source = {program!r}
_linecache.cache['program.py'] = (len(_source), None, _source.splitlines(True), 'program.py')
"""
# The data's own grader does not look at what a program exits with.
_RUN = """
try:
    exec(compile(_source, 'program.py', 'exec'), _space)
except SystemExit:
    pass
"""
# Its name is not __main__: what a program would do by itself, such as read its input, is not asked for here.
_IMPORT = "exec(compile(_source, 'program.py', 'exec'), _space)\n"
# JSON has no keys but texts. The data's own grader makes integers of those of the first argument, where they are some.
_CALL = """
_arguments = _json.loads({arguments!r})
if _arguments and isinstance(_arguments[0], dict):
    try:
        _arguments[0] = {{int(_key): _item for _key, _item in _arguments[0].items()}}
    except ValueError:
        pass
_owner = _space.get('Solution')
_function = getattr(_owner(), {name!r}) if hasattr(_owner, {name!r}) else _space[{name!r}]
_value = _function(*_arguments)
print('\\n' + {mark!r} + _json.dumps(_value), file=_sys.__stdout__)
"""
# What is printed is a literal again, equal to the value: of a dictionary with defaults the dictionary, of a fraction
# the float, if there is one.
_EVALUATE = """
import collections.abc as _abc, numbers as _numbers
def _plain(value):
    if isinstance(value, dict):
        return {{_plain(key): _plain(item) for key, item in value.items()}}
    for kind, plain in ((list, list), (tuple, tuple), (_abc.Set, set)):
        if isinstance(value, kind):
            return plain(map(_plain, value))
    if isinstance(value, _numbers.Number) and type(value) not in (bool, int, float, complex) and float(value) == value:
        return float(value)
    return value
print('\\n' + {mark!r} + repr(_plain(eval({expression!r}, _space))), file=_sys.__stdout__)
"""
_ASSERT = """
exec(compile({code!r}, 'test.py', 'exec'), _space)
print('\\n' + {mark!r}, file=_sys.__stdout__)
"""
_MARK = '>>> '
_FENCE = re.compile(r'(`{3,}|~{3,})([^`\n]*)')
_LATE_FENCE = re.compile(r'[^`]+(`{3,})((?:python|py)\d*)\s*', re.IGNORECASE)
_PYTHON = re.compile(r'\{?\.?(python|py)[\d.]*(?![\w+#-])', re.IGNORECASE)
_DECIMAL = re.compile(r'[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?')
_RELATIVE, _ABSOLUTE = 1e-5, 1e-6  # the data's own grader allows the first, most judges the second


@contextmanager
def _numbers_of_any_length() -> Iterator[None]:
    """Lifts Python's limit of 4,300 digits."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(limit)


def _define(program: str, name: str, test: str = '') -> str:
    tested = re.search(r'(\w+)\(', test)  # an assert's function, which the program has to bring
    return _DEFINE.format(program=program, name=name, surroundings=_SURROUNDINGS, tested=tested and tested[1])


class CodeGrade(NamedTuple):
    """The result of a program on its tests."""

    reward: float
    passed: int  # of the tests; those after a failed one are not run if all must pass
    tests: int
    reason: str  # why the first failed test failed; '' if none did


class Test(Protocol):
    def case(self, program: str) -> tuple[str, str]:
        """The source to run, and its standard input."""

    def accepts(self, output: str) -> bool:
        """May raise a ValueError or RecursionError on output that cannot be read."""


class StdinTest(NamedTuple):
    """A whole program, from standard input to standard output."""

    given: str
    expected: str

    def case(self, program: str) -> tuple[str, str]:
        return _define(program, '__main__') + _RUN, self.given

    def accepts(self, output: str) -> bool:
        return same_output(output, self.expected)


class CallTest(NamedTuple):
    """A call of a function, or of a method of `class Solution`, by its JSON value."""

    name: str
    arguments: list
    expected: object

    def case(self, program: str) -> tuple[str, str]:
        call = _CALL.format(name=self.name, arguments=json.dumps(self.arguments), mark=_MARK)
        return _define(program, 'program') + _IMPORT + call, ''

    def accepts(self, output: str) -> bool:
        longest = 4300 + len(json.dumps(self.expected))  # no integer as long as this is equal, or worth the time
        read = lambda digits: int(digits) if len(digits) < longest else math.nan
        value = json.loads(output.rpartition('\n' + _MARK)[2], parse_int=read)
        # Data of this kind may wrap an expected value into a list of one.
        wrapped = isinstance(self.expected, list) and len(self.expected) == 1
        return same_value(value, self.expected) or wrapped and same_value(value, self.expected[0])


class ValueTest(NamedTuple):
    """An expression, such as a call of a function, and its value: `assert f(1) == 2` without the program seeing the 2.

    Values are compared as the assert does: exactly, and a tuple is no list. They are of types that literals have, or of
    classes made from dict, list, tuple and set, keys of dictionaries, or numbers that a float equals.
    """

    expression: str
    expected: object  # of literals

    def case(self, program: str) -> tuple[str, str]:
        code = _EVALUATE.format(expression=self.expression, mark=_MARK)
        return _define(program, 'program', self.expression) + _IMPORT + code, ''

    def accepts(self, output: str) -> bool:
        value = output.rpartition('\n' + _MARK)[2].strip()
        # Nothing as long as this is equal, and reading it could take all memory.
        if len(value) > 100 + 4 * len(repr(self.expected)):
            return False
        try:
            return bool(ast.literal_eval(value) == self.expected)
        except (SyntaxError, TypeError, MemoryError) as error:
            raise ValueError(str(error)) from None


@dataclass(frozen=True)
class AssertTest:
    """Code that raises if the program is wrong.

    It runs in the program's process, where a program that is out for it finds the code and what it expects (by
    `sys._getframe` or `gc`), or returns an object that equals everything.
    """

    code: str
    # Printed at the end, and new each time: neither an early exit nor a memorised text passes for it.
    mark: str = field(default_factory=lambda: _MARK + secrets.token_hex(8))

    def case(self, program: str) -> tuple[str, str]:
        code = _ASSERT.format(code=self.code, mark=self.mark)
        return _define(program, 'program', self.code) + _IMPORT + code, ''

    def accepts(self, output: str) -> bool:
        return output.rstrip().endswith('\n' + self.mark)


@_numbers_of_any_length()
def parse_tests(text: str) -> list[Test]:
    """The tests in a ground truth, which is JSON of one of

        {"inputs": [...], "outputs": [...]}                    standard input and output
        {"inputs": [...], "outputs": [...], "fn_name": "f"}    arguments and value; arguments are a list, or text with
                                                               the JSON of one argument on each line
        {"assert_case": ["assert f(1) == 2", ...]}             see `ValueTest` and `AssertTest`

    Raises:
        ValueError: it is none of these, or has no tests.
    """
    try:
        truth = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'The tests are no JSON ({error}): {text[:80]!r}.') from None
    if not isinstance(truth, dict):
        raise ValueError(f'The tests are {text[:80]!r}; expected a JSON object with inputs and outputs, or asserts.')
    asserts = truth.get('assert_case')
    if isinstance(asserts, list) and asserts and all(isinstance(code, str) for code in asserts):
        return [_assert_test(code) for code in asserts]
    inputs, outputs, name = truth.get('inputs'), truth.get('outputs'), truth.get('fn_name')
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not 0 < len(inputs) == len(outputs):
        raise ValueError(
            f'The tests have the keys {sorted(truth)}; expected "inputs" and "outputs", lists of one length that are '
            f'not empty, or "assert_case", a list of code. They begin {text[:80]!r}.'
        )
    if name not in (None, '') and not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f'The tests are of the function {name!r}; expected its name, or no "fn_name".')
    if name:
        return [CallTest(name, _arguments(a), _value(b)) for a, b in zip(inputs, outputs, strict=True)]
    return [StdinTest(_lines(a), _lines(b)) for a, b in zip(inputs, outputs, strict=True)]


def _assert_test(code: str) -> Test:
    """A comparison of an expression with a literal is made outside of the sandbox; whatever else it may be, inside."""
    broken = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
    with suppress(*broken):
        match ast.parse(code).body:
            case [ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]))]:
                for expression, literal in ((left, right), (right, left)):
                    with suppress(*broken):
                        value = ast.literal_eval(literal)
                        return ValueTest(f'({ast.get_source_segment(code, expression)})', value)
    return AssertTest(code)


def last_program(response: str) -> str | None:
    """The program in a response, of what follows the last `</think>` if there is one; None if there is none.

    It is the last closed block of Markdown (``` or ~~~) whose first word is python or py, in any case, with or without
    a version (```python, ```py3, ``` Python title="a.py", Code:```python); without such a block, the last closed one
    that names no language; without any fence, all of the text. Blocks of other languages are left out.
    """
    text = response.rpartition('</think>')[2]
    programs: dict[bool | None, str] = {}  # by `python`
    lines, fence, python, indent = [], '', None, 0  # python: None in blocks of other languages
    for line in text.split('\n'):
        line = line[min(indent, len(line) - len(line.lstrip())) :]
        found = _FENCE.fullmatch(line.strip()) or not fence and _LATE_FENCE.fullmatch(line)
        named = bool(found and _PYTHON.match(found[2].strip()))
        if found and (not fence or named and found[1].startswith(fence)):
            fence, lines, indent = found[1], [], len(line) - len(line.lstrip())
            python = named if named or not found[2].strip() else None
        elif fence and line.rstrip().endswith(fence):
            programs[python] = '\n'.join([*lines, line.rstrip().rstrip(fence[0])])
            fence, indent = '', 0
        elif fence:
            lines.append(line)
    programs.setdefault(False, None if _FENCE.search(text) else text.strip() and text or None)
    return programs.get(True, programs[False])


def grade_code(
    response: str,
    answer: str,
    *,
    sandbox: Sandbox,
    program_seconds: float,
    max_tests: int | None = None,
    partial: bool = False,
) -> CodeGrade:
    """Runs the program in a response (see `last_program`) on the tests of `answer`.

    It is run as by the data's own grader, verl's prime_code: its names are imported, calls of functions may be nested
    600,000 deep, and integers may have any number of digits. Its rules decide what is right; see `same_output` and
    `same_value` for where these are more tolerant.

    Args:
        response: the policy's text.
        answer: see `parse_tests`.
        sandbox: runs the program.
        program_seconds: time limit of all tests together, from the start of the sandbox; those that have not begun by
            then count as failed.
        max_tests: number of tests that are run, the first ones; None for all.
        partial: true: the reward is the share of tests that passed, and not 1.0 for all and else 0.0.

    Raises:
        ValueError: the tests cannot be read.
        RuntimeError: the sandbox cut the output, which was right up to there; no program is to blame for it.
        CannotGrade: the sandbox is out of order.
    """
    tests = parse_tests(answer)[:max_tests]
    program = last_program(response)
    if program is None:
        return CodeGrade(0.0, 0, len(tests), 'no program')
    try:
        program.encode()
    except UnicodeEncodeError:
        return CodeGrade(0.0, 0, len(tests), 'not a text that UTF-8 can hold')
    passed, reasons = 0, []
    end = math.inf

    def cases() -> Iterator[tuple[str, str]]:
        nonlocal end
        end = time.monotonic() + program_seconds  # the sandbox has started: how long that took is no fault of a program
        for test in tests:
            yield test.case(program)

    with closing(sandbox.run(cases())) as runs:
        for test, run in zip(tests, chain(runs, [None]), strict=False):
            reason = 'the sandbox ended' if run is None else _why_not(test, run)
            if reason:
                reasons.append(reason)
            else:
                passed += 1
            if run is None or reason and not partial:
                break
            if time.monotonic() > end:
                reasons.append(f'timeout: {program_seconds} s for all tests')
                break
    complete = passed == len(tests)
    reward = passed / len(tests) if partial else float(complete)
    return CodeGrade(reward, passed, len(tests), '' if complete else reasons[0])


def same_output(output: str, expected: str) -> bool:
    """Equal lines, of equal tokens between white space; white space at the ends of lines and blank lines are free.

    `Yes` is not `YES`, and a line break is no space. A number is within 1e-5 of the expected one, relative, or 1e-6,
    absolute, if a decimal fraction is expected (a number with a point or an exponent), or if it is one and fills its
    line: 2.0 for 2. Other whole numbers and words are compared as texts.

    The rules are those of the data's own grader, which however does not allow more than one space within a line,
    fractions beside other tokens that are close and not equal, or 1e-6 next to zero.
    """
    return _same_lines(_tokens(output), _tokens(expected))


def same_value(value: object, expected: object) -> bool:
    """Equal JSON values, where tuples are lists, keys are texts, and `true` is 1, as for the data's own grader.

    Unlike there, tuples may be nested, and numbers are compared as in `same_output` where either is a fraction.
    """
    match value, expected:
        case int() | float(), int() | float():
            exact = isinstance(value, int) and isinstance(expected, int)
            return value == expected if exact else _near(value, expected)
        case list(), list():
            return len(value) == len(expected) and all(map(same_value, value, expected))
        case dict(), dict():
            return value.keys() == expected.keys() and all(same_value(value[key], expected[key]) for key in value)
    return value == expected


@_numbers_of_any_length()
def _why_not(test: Test, run: Run) -> str:
    """The reason that a test failed, or ''. Raises a RuntimeError if that may be the sandbox."""
    if run.status not in ('finished', 'cut'):
        return f'{run.status}: {run.detail}'
    try:
        reason = '' if test.accepts(run.output) else f'wrong output: {run.output[:200]!r}'
    except (ValueError, RecursionError, OverflowError) as error:
        reason = f'output that cannot be read ({type(error).__name__}): {run.output[:200]!r}'
    if reason and run.status == 'cut' and (not isinstance(test, StdinTest) or _begins(test.expected, run.output)):
        raise RuntimeError(f'a program could not be graded: {run.detail}')
    return reason


def _begins(expected: str, start: str) -> bool:
    """True if `start`, whose last token may have been cut, is the same as the beginning of `expected`."""
    lines, others = _tokens(start), _tokens(expected)
    if not 0 < len(lines) <= len(others):
        return not lines
    *line, cut = lines.pop()
    same, (token, *_) = others[len(lines)][: len(line)], [*others[len(lines)][len(line) :], '']
    number = len(cut) <= 400  # which may be close when it is whole
    return (number or token.startswith(cut)) and _same_lines([*lines, line], [*others[: len(lines)], same])


def _tokens(text: str) -> list[list[str]]:
    """Those of each line that has some."""
    return [tokens for line in text.splitlines() if (tokens := line.split())]


def _same_lines(lines: list[list[str]], expected: list[list[str]]) -> bool:
    return len(lines) == len(expected) and all(
        len(tokens) == len(others)
        and all(_same_token(a, b, alone=len(tokens) == 1) for a, b in zip(tokens, others, strict=True))
        for tokens, others in zip(lines, expected, strict=True)
    )


def _same_token(token: str, expected: str, *, alone: bool) -> bool:
    if token == expected:
        return True
    whole = expected.lstrip('+-').isdecimal()
    if len(token) > 400 or whole and (not alone or token.lstrip('+-').isdecimal()):
        return False
    numbers = _DECIMAL.fullmatch(token) and _DECIMAL.fullmatch(expected)
    return bool(numbers) and _near(float(token), float(expected))


def _near(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)


def _lines(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return '\n'.join(map(str, value))
    return str(value)


def _arguments(value: object) -> list:
    if isinstance(value, str):
        return [_value(line) for line in value.removesuffix('\n').split('\n')] if value else []
    return value if isinstance(value, list) else [value]


def _value(value: object) -> object:
    """JSON in a text, or the text itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
