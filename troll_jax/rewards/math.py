"""Grades a mathematical answer: a layer over math-verify, which parses LaTeX and compares with sympy.

Importing this costs what sympy costs, under a second, and no array library. It is not put off to the first call, which
would charge it to the deadline of the first grading.

`tests/math_answers.jsonl` says what counts as equal, case by case.
"""

import math
import re
from collections.abc import Sequence

from math_verify import LatexExtractionConfig, parse, verify
from sympy import I, Integer

from troll_jax.rewards.answers import NUMBER, PLACES, find_answer

_LATEX = LatexExtractionConfig(boxed_match_priority=0)


def grade_math(response: str, answer: str, places: Sequence[str] = PLACES) -> float:
    r"""1.0 if a response's final answer equals `answer`, else 0.0.

    Args:
        response: the policy's text.
        answer: the reference, LaTeX or plain; dollar signs or a box around it do no harm.
        places: markers of the final answer, of which the first that occurs is taken, see `answers.find_answer`.

    Hangs for as long as sympy does on hostile input, since math-verify's own time limits rest on signals, which only
    work in a main thread. `rewards.pool.Grader` runs it in a worker with a deadline.

    Raises:
        ValueError: `answer` is empty or only white space, or a place does not exist.
    """
    if not answer.strip():
        raise ValueError('The reference answer is empty; expected LaTeX or a number. Drop such rows from the data.')
    found = find_answer(response, places)
    return 0.0 if found is None else float(same_answer(found, answer))


def same_answer(found: str, answer: str) -> bool:
    """True if two mathematical answers are the same in value and kind; `answer` is the reference."""
    found, answer = normalised(found), normalised(answer)
    if found == answer != '':
        return True
    numerals = [_NUMERAL.fullmatch(text) for text in (found, answer)]
    if all(numerals):
        return numerals[0].groups() == numerals[1].groups()
    pairs = [(answer, found)]
    if ('%' in answer) != ('%' in found):  # 12.5% is an eighth, and also 12.5 where a percentage was asked for
        pairs.append((_PERCENT.sub('', answer), _PERCENT.sub('', found)))
    return any(verify(_parse(a), _parse(f), allow_set_relation_comp=True, timeout_seconds=None) for a, f in pairs)


def normalised(text: str) -> str:
    """Rewrites what math-verify reads otherwise than a mathematician; not idempotent, and not for display."""
    text = text.translate(_SYMBOLS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip().removesuffix('\\\\').strip(' *').rstrip('.,;')
    if _TRIGONOMETRIC.search(text):  # elsewhere degrees are a unit like others
        text = _DEGREES.sub(r'(\\frac{\1\\pi}{180})', text)
    if '\\pm' in text and '\\{' not in text:  # it was not seen within a fraction, nor behind x =
        text = re.sub(r'^\s*[A-Za-z]\s*=', '', text)
        text = ', '.join(text.replace('\\pm', upper).replace('\\mp', lower) for upper, lower in ('+-', '-+'))
    if _RATIO.fullmatch(text):
        parts = [int(part) for part in text.split(':')]
        text = f'({", ".join(str(part // max(1, math.gcd(*parts))) for part in parts)})'
    if quantity := _QUANTITY.fullmatch(text):
        text = quantity['sign'] + quantity['number'].replace(',', '')
    return text


def _parse(text: str) -> list:
    """A text as math-verify reads it: an expression and its string. i is the imaginary unit, if it is alone."""
    if _INTEGER.fullmatch(text):  # the most common answer; a parse takes milliseconds
        return [Integer(text)]
    parsed = parse(rf'\boxed{{{text}}}', [_LATEX], parsing_timeout=None)
    for n, expression in enumerate(parsed):
        letters = getattr(expression, 'free_symbols', None)
        if letters and {letter.name for letter in letters} == {'i'}:
            parsed[n] = expression.subs({letter: I for letter in letters})
    return parsed


def _mixed(match: re.Match) -> str:
    whole, numerator, denominator = (int(group) for group in match.groups() if group is not None)
    return rf'\frac{{{whole * denominator + numerator}}}{{{denominator}}}'


def _repeating(match: re.Match) -> str:
    whole, once, period = match.groups()
    numerator = int(whole + once + period) - int(whole + once or 0) if whole + once else int(period)
    return rf'\frac{{{numerator}}}{{{"9" * len(period)}{"0" * len(once)}}}'


_SYMBOLS = str.maketrans(
    {
        '−': '-',
        '×': r'\times ',
        '·': r'\cdot ',
        '÷': r'\div ',
        '±': r'\pm ',
        '°': r'^\circ ',
        '≈': r'\approx ',
        '∞': r'\infty ',
        '≤': r'\le ',
        '≥': r'\ge ',
        '∪': r'\cup ',
        '∈': r'\in ',
        '∅': r'\emptyset ',
        '²': '^2',
        '³': '^3',
        '½': r'\frac{1}{2}',
        '€': r'\$',
        '£': r'\$',
    }
)
_D = r'\d{1,18}'  # of what is computed with here: Python refuses to read numbers of many thousand digits
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        # Looks.
        (r'\\(?:text)?color\s*\{\w+\}|\\(?:bf|rm|it|displaystyle|[bB]igg?[lrm]?)(?![A-Za-z])|\\!', ''),
        (r'^\s*\\approx', ''),
        (r'(?<![A-Za-z\\])pi(?![A-Za-z])', r'\\pi'),
        (r'\\langle(?![A-Za-z])', '('),
        (r'\\rangle(?![A-Za-z])', ')'),
        (r'\\varnothing(?![A-Za-z])', r'\\emptyset'),
        (r'√\s*(\d+|[A-Za-z])', r'\\sqrt{\1}'),
        (r'√\s*(?=\()', r'\\sqrt'),
        # 1\,234, 1{,}234, 1~234 and 1 234 group digits; read as sums and products.
        (r'(?<=\d)(?:\\[,;: ]|\{,\}|~| )(?=\d{3}(?!\d))', ''),
        # 0.1\overline{6} is 15/90.
        (r'(?<!\d)(\d{0,18})\.(\d{0,18})\s*\\(?:overline|bar|dot)\s*\{(\d{1,18})\}', _repeating),
        # 1\frac{1}{2} and 1 1/2 are three halves; the first was read so unless a percent sign follows.
        (rf'(?<![\d.}}])({_D})\s*\\[dtc]?frac\s*(?:\{{\s*({_D})\s*\}}\s*\{{\s*({_D})\s*\}}|(\d)\s*(\d))', _mixed),
        (rf'(?<![\d.}}])({_D})\s+({_D})/({_D})(?!\d)', _mixed),
        # 2.5e-4; e was Euler's number.
        (r'(?<![A-Za-z\d.])(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d+)(?![\d.])', r'\1 \\times 10^{\2}'),
    ]
]
_INTEGER = re.compile(rf'-?{_D}')
_PERCENT = re.compile(r'\\?%')
# The sine of 30^\circ was that of 30 radians.
_TRIGONOMETRIC = re.compile(r'\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])')
_DEGREES = re.compile(r'(?<![\d.])(\d+(?:\.\d+)?)\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})')
# 1:2:3 was the number 1/6.
_RATIO = re.compile(rf'{_D}(?:\s*:\s*{_D}){{2,}}')
# A numeral with its base, such as 312_8, was 312.
_NUMERAL = re.compile(r'(\d[\dA-F]*)_\{?(\d+)\}?')
# "$1,234.00", "7 eggs", "18 dollars.": words were products of letters.
_WORD = r'(?!(?:pi|sin|cos|tan|cot|sec|csc|log|exp|percent|and|or)\b)[A-Za-z]{3,}\.?'
_QUANTITY = re.compile(rf'(?P<sign>[-+]?)\s*(?:\\?\$)?\s*(?P<number>{NUMBER})\.?(?:\s+{_WORD})*')
