r"""Grades a mathematical answer: a layer over math-verify, which parses LaTeX and compares with sympy.

Lists, tuples, units, words, bases and decimal numbers are compared here, by the table of `docs/grading.md`; what is
left, one expression against another, by math-verify. `tests/math_answers.jsonl` has examples of every rule.

Importing this costs what sympy costs, under a second, and no array library. It is not put off to the first call, which
would charge it to the deadline of the first grading.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Expr, Float, I, Integer, Rational
from sympy.core.relational import Relational

from troll_jax.rewards.answers import PLACES, SCALES, find_answer
from troll_jax.rewards.notation import DIGITS, FUNCTIONS, normalised
from troll_jax.rewards.units import THOUSANDS, quantity

ENOUGH_DIGITS = 6  # significant digits of a decimal number that may stand for a longer one

_LATEX = LatexExtractionConfig(
    boxed_match_priority=0,
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed='all', equations=False
    ),
)


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
    return _same(normalised(found), normalised(answer))


def _same(found: str, answer: str) -> bool:
    """Whether two normalised texts are the same answer."""
    if found == answer != '':
        return True
    if not found or not answer:
        return False
    options = [_OPTION.fullmatch(text) for text in (found, answer)]
    if any(options):
        return _same_option(options, (found, answer))
    congruences = [_CONGRUENCE.fullmatch(text) for text in (found, answer)]
    if any(congruences):
        return all(congruences) and _same_congruence(*congruences)
    (kind, items), (other_kind, other_items) = _items(found), _items(answer)
    if 'list' in (kind, other_kind) or 'set' in (kind, other_kind):
        if {kind, other_kind} <= {'list', 'set', 'one'}:
            return _same_items(items, other_items) or kind == other_kind == 'set' and _same_expression(found, answer)
        if kind in ('list', 'set'):  # from here on one of the two is a tuple
            (kind, items, found), (other_items, answer) = (other_kind, other_items, answer), (items, found)
        if len(other_items) == 1:  # the set of one pair
            return _same(found, other_items[0])
        named = kind[0] == '(' and all(map(_NAMED.match, other_items))  # x = 1, y = 2 is the pair (1, 2)
        return named and _same_in_order(items, [_NAMED.sub('', item) for item in sorted(other_items)])
    if 'one' not in (kind, other_kind):
        return (kind == other_kind or len(items) != 2) and _same_in_order(items, other_items)
    if kind != other_kind and not _RANGE.search(found + answer):
        return False  # an interval may be the same as an inequality, which math-verify sees
    return _same_one(found, answer)


def _same_in_order(items: list[str], others: list[str]) -> bool:
    return len(items) == len(others) and all(map(_same, items, others))


def _same_items(items: list[str], others: list[str]) -> bool:
    """Whether two lists have the same items, as often, in any order."""
    if len(items) != len(others):
        return False
    left = list(others)
    for item in items:
        match = next((n for n, other in enumerate(left) if _same(item, other)), None)
        if match is None:
            return False
        left.pop(match)
    return True


def _same_option(options: list[re.Match | None], texts: tuple[str, str]) -> bool:
    """Choices: (A) 18 is A, and is 18; where both say letter and content, both have to agree."""
    letters = [(option['letter'] or option['only']) if option else None for option in options]
    contents = [option['content'] if option else text for option, text in zip(options, texts, strict=True)]
    if any(option and _NOT_CONTENT.search(option['content']) for option in options):
        return False
    if all(letters):
        return letters[0] == letters[1] and (not all(contents) or _same(*contents))
    letter, text = letters[0] or letters[1], texts[1] if letters[0] else texts[0]
    return text == letter or all(contents) and _same(*contents)


def _same_congruence(found: re.Match, answer: re.Match) -> bool:
    if not _same(found['modulus'], answer['modulus']):
        return False
    left = [(match['left'] or '').strip() for match in (found, answer)]
    if all(left) and left[0] != left[1]:
        return False
    rests, modulus = [match['rest'].strip() for match in (found, answer)], answer['modulus']
    if all(_INTEGER.fullmatch(text) for text in (*rests, modulus)) and int(modulus):
        return (int(rests[0]) - int(rests[1])) % int(modulus) == 0
    return _same(*rests)


def _same_one(found: str, answer: str) -> bool:
    """Whether two answers that are no lists, sets or tuples are the same: numbers, quantities, words, expressions."""
    for text, other in ((found, answer), (answer, found)):
        exact, mark, rounded = (part.strip() for part in text.partition('\\approx'))
        if mark:
            return _is_close(exact.rpartition('=')[2], rounded) and _same(exact, other)
    sides, other_sides = _cut(found, _EQUAL), _cut(answer, _EQUAL)
    if len(sides) > 1 or len(other_sides) > 1:
        if len(sides) == len(other_sides) == 2:
            return _same_expression(found, answer)
        sides, other_sides = ([side.strip() for side in parts] for parts in (sides, other_sides))
        for parts in (sides, other_sides):
            if len(parts) > 1 and _UNSOLVED.search(_ARGUMENT.sub('', parts[-2])) and re.search('[A-Za-z]', parts[-2]):
                return False
            if _NOT.search(''.join(parts[:-1])):
                return False
            if not all(_same(part, parts[-1]) for part in parts[:-1] if not _LETTER.search(part)):
                return False
        return (len(other_sides) != 2 or bool(_NAMED.match(answer))) and _same(sides[-1], other_sides[-1])
    (value, unit), (other, other_unit) = quantity(found), quantity(answer)
    if unit and other_unit and unit != other_unit:
        return False
    if value != found or other != answer:
        return _same(value, other)
    if any(_WORDS.search(text) for text in (value, other)):
        return _spelling(value) == _spelling(other)
    if max(value.count('%'), other.count('%')) > 1:
        return False
    if ('%' in value) != ('%' in other):  # 12.5% is an eighth, and also 12.5 where a percentage was asked for
        plain, percent = (value, other) if '%' in other else (other, value)
        bare = _PERCENT.sub('', percent).strip()
        return _same(plain, bare) or _same_number(
            plain, bare + r' \times 10^{-2}' if _DECIMAL.fullmatch(bare) else rf'\frac{{{bare}}}{{100}}'
        )
    if '%' in value:
        return _same(_PERCENT.sub('', value).strip(), _PERCENT.sub('', other).strip())
    return _same_number(value, other)


def _same_number(found: str, answer: str) -> bool:
    """Whether two numbers or expressions are the same. A decimal number of `ENOUGH_DIGITS` significant digits or more
    is also the same as a number that it is rounded or cut off from."""
    if _INFINITY.fullmatch(found) or _INFINITY.fullmatch(answer):
        return found.strip('+ ').replace(' ', '') == answer.strip('+ ').replace(' ', '')
    numbers = [_number(text) for text in (found, answer)]
    if None not in numbers and numbers[0][0] == numbers[1][0]:
        return True
    short = [n for n, number in enumerate(numbers) if number and number[1] >= ENOUGH_DIGITS]
    if short:
        n = max(short, key=lambda n: numbers[n][2])
        value, _, unit = numbers[n]
        if numbers[1 - n]:
            return _is_rounded(value, unit, numbers[1 - n][0])
        exact = _evaluated(_parse((found, answer)[1 - n]))
        within = isinstance(exact, Float) and Float('1e-400') < abs(exact) < Float('1e400')
        return within and _is_rounded(value, unit, Fraction(str(exact)))
    return False if None not in numbers else _same_expression(found, answer)


def _is_close(exact: str, rounded: str) -> bool:
    """Whether two texts are numbers within a twentieth."""
    one, other = (_evaluated(_parse(text)) for text in (exact, rounded))
    return one is not None and other is not None and bool(abs(one - other) <= abs(one) / 20)


def _is_rounded(value: Fraction, unit: Fraction, exact: Fraction) -> bool:
    """Whether `value`, whose last digit counts `unit`, is `exact` rounded or cut off."""
    if (exact < 0) != (value < 0):
        return False
    exact, value = abs(exact), abs(value)
    return value == exact or value == exact // unit * unit or abs(exact - value) * 2 <= unit


def _evaluated(parsed: list) -> Expr | None:
    """The value of what was parsed, to 50 digits; None where it is not a finite number."""
    try:
        value = parsed[0].evalf(50) if parsed[0].is_number else None
        return value if value is not None and value.is_finite else None
    except (
        AttributeError,
        IndexError,
        TypeError,
        ValueError,
        ArithmeticError,
        RecursionError,
    ):  # no expression, or not of numbers
        return None


def _number(text: str) -> tuple[Fraction, int, Fraction] | None:
    """A plain number, of a base too: value, significant digits (0: it is exact) and value of the last digit."""
    if match := _NUMERAL.fullmatch(text):
        try:
            return Fraction(int(match[1], int(match[2]))), 0, Fraction(1)
        except ValueError:
            return None
    if (match := _DECIMAL.fullmatch(text)) is None:
        return None
    digits, places = match['digits'].replace(',', ''), match['places'] or ''
    if not digits + places:
        return None
    power = int(match['power'] or 0) - len(places)
    value = Fraction(int(digits + places)) * Fraction(10) ** power
    significant = len((digits + places).lstrip('0')) if places or match['power'] else 0
    return -value if match['sign'] == '-' else value, significant, Fraction(10) ** power


def _spelling(text: str) -> str:
    return ' '.join(re.sub(r'[-{}]', ' ', text).casefold().split())


def _items(text: str) -> tuple[str, list[str]]:
    r"""The kind of an answer and its items: 'list' for 1, 2; 'set' for \{1, 2\}; the brackets of a tuple or an
    interval, such as '()'; 'one' for all others."""
    if text.startswith('\\{') and text.endswith('\\}') and _closes(text):
        distinct: list[str] = []
        for item in _split(text[2:-2].strip()):
            if item and not any(_same(item, other) for other in distinct):
                distinct.append(item)
        return 'set', distinct
    items = _split(text)
    if len(items) > 1:
        return 'list', items
    if text.startswith('{') and _closes(text):
        return _items(text[1:-1].strip())
    behind = _NAMED.sub('', text)
    if behind[:1] in ('(', '[') and behind[-1:] in (')', ']') and _closes(behind):
        inner = _split(behind[1:-1])
        if len(inner) > 1:
            return behind[0] + behind[-1], inner
    return 'one', [text]


def _split(text: str) -> list[str]:
    r"""The items of a list: between commas, semicolons, 'and' and 'or' outside of brackets, \pm being two."""
    pieces = [piece for part in _cut(text, _SEPARATOR) for piece in _cut_commas(part.strip())]
    items = []
    for piece in filter(None, pieces):
        if '\\pm' in piece:  # it was not seen within a fraction, nor behind x =
            piece = _NAMED.sub('', piece)
            items += [piece.replace('\\pm', upper).replace('\\mp', lower) for upper, lower in ('+-', '-+')]
        else:
            items.append(piece)
    return [item.strip() for item in items]


def _cut_commas(text: str) -> list[str]:
    return [text] if THOUSANDS.match(text) else [piece.strip() for piece in _cut(text, _COMMA)]


def _cut(text: str, separator: re.Pattern) -> list[str]:
    """A text cut at the separators outside of all brackets."""
    pieces, start, depth = [], 0, 0
    for match in separator.finditer(text):
        if match[0] in '([{' or match[0].startswith('\\begin'):
            depth += 1
        elif match[0] in ')]}' or match[0].startswith('\\end'):
            depth -= 1
        elif depth == 0:
            pieces.append(text[start : match.start()])
            start = match.end()
    return [*pieces, text[start:]]


def _closes(text: str) -> bool:
    """Whether the bracket at the beginning of a text is closed by the one at its end."""
    depth = 0
    for match in re.finditer(r'[()\[\]{}]', text):
        depth += 1 if match[0] in '([{' else -1
        if depth == 0:
            return match.end() == len(text)
    return False


def _same_expression(found: str, answer: str) -> bool:
    """What math-verify says, without tolerance: decimal numbers are read as fractions."""
    if bool(_MARKS.search(found)) or bool(_MARKS.search(answer)):  # math-verify drops them
        return _spelling(found) == _spelling(answer)
    pair = [_parse(text) for text in (answer, found)]
    one, other = map(_evaluated, pair)
    if one is not None and other is not None and abs(one - other) > abs(one) * Float('1e-40'):
        return False
    return verify(*pair, numeric_precision=100, allow_set_relation_comp=True, timeout_seconds=None)


def _parse(text: str) -> list:
    """A text as math-verify reads it: an expression and its string. i is the imaginary unit, if it is alone."""
    if _INTEGER.fullmatch(text):  # the most common answer; a parse takes milliseconds
        return [Integer(text)]
    parsed = parse(rf'\boxed{{{text}}}', [_LATEX], extraction_mode='first_match', parsing_timeout=None)
    for n, expression in enumerate(parsed):
        if isinstance(expression, Relational):
            continue
        letters = getattr(expression, 'free_symbols', None)
        if letters and {letter.name for letter in letters} == {'i'}:
            parsed[n] = expression = expression.subs({letter: I for letter in letters})
        if not isinstance(expression, str) and (floats := expression.atoms(Float)):
            parsed[n] = expression.xreplace({number: Rational(str(number)) for number in floats})
    return parsed


_SCALE_WORDS = '|'.join(SCALES)
_INTEGER = re.compile(rf'-?{DIGITS}')
_INFINITY = re.compile(r'[-+]?\s*\\infty')
_MARKS = re.compile(r'(?<![A-Za-z_{\d])\d+_\{|\}\s*_|\'|"|\.\.|…|\\[lcv]?dots|\?')
_PERCENT = re.compile(r'\\?%')
_NUMERAL = re.compile(r'(\d[\dA-Z]{0,99})_\{(\d+)\}')
_DECIMAL = re.compile(
    r'(?P<sign>[-+]?)\s*(?P<digits>\d{1,3}(?:,\d{3}){1,9}|\d{0,400})(?:\.(?P<places>\d{0,400}))?(?<=[\d.])'
    r'(?:\s*(?:\\times|\\cdot)\s*10\s*\^\s*\{?\s*(?P<power>[-+]?\d{1,3})\s*\}?)?'
)
_BRACKETS = r'\\(?:begin|end)\s*\{\w+\}|[()\[\]{}]'
_SEPARATOR = re.compile(_BRACKETS + r'|;|,\s*(?:and|or)\b|,(?=\s)|(?<![A-Za-z])(?:and|or)(?![A-Za-z])')
_COMMA = re.compile(_BRACKETS + '|,')
_RANGE = re.compile(r'<|>|\\(?:le|ge|cup|cap|setminus|mathbb|ne|neq|lt|gt)(?![A-Za-z])')
_NAMED = re.compile(
    r'^\s*(?!(?:not|never|no)\b)(?:\\?[A-Za-z]+(?:_\{?\w+\}?)?|[A-Za-z]+\s*\([^()=]*\)|\([^()=]*\))\s*=(?!=)\s*'
)
_EQUAL = re.compile(_BRACKETS + r'|(?<![<>!=])=')
_LETTER = re.compile(r'(?<![\\A-Za-z])[A-Za-z]|\\(?:alpha|beta|gamma|theta|lambda|mu|angle|triangle)')
# 2x = 18 and x + 3 = 18 say something else than 18.
_UNSOLVED = re.compile(r'\d\s*\\?[A-Za-z(]|[-+*/]\s*\d|\d\s*[-+*/]|\^')
_ARGUMENT = re.compile(r'\([^()]*\)|_\{?\w+\}?|\{[^{}]*\}')
_CONGRUENCE = re.compile(
    r'(?:(?P<left>.*?)(?:\\equiv|=))?(?P<rest>[^=]*?)[\s({]*\\?[pb]?mod(?:ulo)?(?![a-z])'
    r'[\s({]*(?P<modulus>\d+|\\?[A-Za-z]+)[\s)}]*'
)
# One of several choices, with or without its content.
_OPTION = re.compile(
    r'(?:\(\s*(?P<letter>[A-J])\s*\)|(?P<only>[A-J])[.:)])\s*[.:]?\s*(?!,|;|(?:and|or)\b)(?P<content>.*)', re.DOTALL
)
_NOT_CONTENT = re.compile(
    r'^(?:[?!.…&|/+=<>^_:;]|-\s|\\(?![dt]?frac|sqrt|pi|left|infty|sin|cos|tan|log|ln|\{)|(?:but|maybe|if|to|versus|th|squared|mod)\b)|'
    rf'^(?:{_SCALE_WORDS})\b|'
    r'(?i:\b(?:not|wrong|incorrect|or|and|nor)\b)|(?<![A-Za-z\\])\(?[A-HJ](?![A-Za-z_(])'
)
# Words and units.
_NOT = re.compile(r'(?i)\b(?:not|never|no|none|nor|wrong)\b')
_WORDS = re.compile(
    rf'(?<![\\A-Za-z])(?<!\\begin\{{)(?<!\\end\{{)(?!(?:{FUNCTIONS})(?![A-Za-z]))'
    r'(?:[A-Za-z]{4,}|(?=[A-Za-z]*[eiouEIOU])[A-Za-z]{3}|(?i:not|and|or|to|no|mod))(?![A-Za-z])'
)
