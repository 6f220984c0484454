"""Grades a program: it is run on test cases in a sandbox, and its output is compared outside of it.

A program never sees what is expected of it, with one exception: asserts other than `assert f(…) == value`, which hold
their own expectations (see `AssertTest`).
"""

import ast
import json
import math
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple, Protocol

from troll_jax.rewards.sandbox import Sandbox

# A function is called in the surroundings that LeetCode gives to solutions.
_SURROUNDINGS = ''.join(
    f'from {module} import *\nimport {module}\n'
    for module in 'typing collections string re math heapq bisect itertools functools'.split()
)
# Not run as __main__: what a program would do by itself, such as read its input, is not asked for here.
_DEFINE = """
import json as _json, sys as _sys
_space = {{'__name__': 'program'}}
exec({surroundings!r}, _space)
exec(compile({program!r}, 'program.py', 'exec'), _space)
"""
_CALL = """
_owner = _space.get('Solution')
_function = getattr(_owner(), {name!r}) if hasattr(_owner, {name!r}) else _space[{name!r}]
_value = _function(*_json.loads({arguments!r}))
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
_FENCE = re.compile(r'```(python3?|py)', re.IGNORECASE)
_DECIMAL = re.compile(r'[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?')
_TOLERANCE = 1e-6  # relative, and absolute below 1: what most judges of such problems allow


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
        return program, self.given

    def accepts(self, output: str) -> bool:
        return same_output(output, self.expected)


class CallTest(NamedTuple):
    """A call of a function, or of a method of `class Solution`, by its JSON value."""

    name: str
    arguments: list
    expected: object

    def case(self, program: str) -> tuple[str, str]:
        call = _CALL.format(name=self.name, arguments=json.dumps(self.arguments), mark=_MARK)
        return _DEFINE.format(surroundings=_SURROUNDINGS, program=program) + call, ''

    def accepts(self, output: str) -> bool:
        value = json.loads(output.rpartition('\n' + _MARK)[2])
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
        return _DEFINE.format(surroundings=_SURROUNDINGS, program=program) + code, ''

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
        return _DEFINE.format(surroundings=_SURROUNDINGS, program=program) + code, ''

    def accepts(self, output: str) -> bool:
        return output.rstrip().endswith('\n' + self.mark)


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
    """The content of the last closed ```python block; None if there is none."""
    program, opened = None, None
    for line in response.split('\n'):
        text = line.strip()
        if _FENCE.fullmatch(text):
            opened = []
        elif opened is not None:
            if text.endswith('```'):
                program, opened = '\n'.join([*opened, line.rstrip()[:-3]]), None
            else:
                opened.append(line)
    return program


def grade_code(
    response: str,
    answer: str,
    *,
    sandbox: Sandbox,
    program_seconds: float,
    max_tests: int | None = None,
    partial: bool = False,
) -> CodeGrade:
    """Runs the last ```python block of a response on the tests of `answer`.

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
        CannotGrade: the sandbox is out of order.
    """
    tests = parse_tests(answer)[:max_tests]
    program = last_program(response)
    if program is None:
        return CodeGrade(0.0, 0, len(tests), 'no closed ```python block')
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
    """Equal lines, of equal tokens between white space; white space at the ends and blank lines at the end are free.

    Where a decimal fraction is expected (a number with a point or an exponent), any number within 1e-6 of it will do,
    relative or absolute. Whole numbers and words are compared as texts.
    """
    lines, expected_lines = ([line.split() for line in text.strip().split('\n')] for text in (output, expected))
    return len(lines) == len(expected_lines) and all(
        len(tokens) == len(others) and all(map(_same_token, tokens, others))
        for tokens, others in zip(lines, expected_lines, strict=True)
    )


def same_value(value: object, expected: object) -> bool:
    """Equal JSON values; numbers to within 1e-6 where either is a fraction, and `true` is not 1."""
    match value, expected:
        case (bool(), _) | (_, bool()):
            return value is expected
        case int() | float(), int() | float():
            exact = isinstance(value, int) and isinstance(expected, int)
            return value == expected if exact else _near(value, expected)
        case list(), list():
            return len(value) == len(expected) and all(map(same_value, value, expected))
        case dict(), dict():
            return value.keys() == expected.keys() and all(same_value(value[key], expected[key]) for key in value)
    return value == expected


def _why_not(test: Test, run) -> str:
    """The reason that a test failed, or ''."""
    if run.status != 'finished':
        return f'{run.status}: {run.detail}'
    try:
        return '' if test.accepts(run.output) else f'wrong output: {run.output[:200]!r}'
    except (ValueError, RecursionError, OverflowError) as error:
        return f'output that cannot be read ({type(error).__name__}): {run.output[:200]!r}'


def _same_token(token: str, expected: str) -> bool:
    if token == expected:
        return True
    if len(token) > 400 or expected.lstrip('+-').isdecimal():
        return False
    numbers = _DECIMAL.fullmatch(token) and _DECIMAL.fullmatch(expected)
    return bool(numbers) and _near(float(token), float(expected))


def _near(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)


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
