r"""The typesetting of an answer: one spelling of what looks different and means the same (`docs/grading.md`)."""

import math
import re
from decimal import Decimal

from troll_jax.rewards.answers import SCALES


def normalised(text: str) -> str:
    """An answer without what only looks different, and without what is read otherwise than a mathematician reads it.

    Not idempotent, and not for display.
    """
    text = _STOP.sub('', ' '.join(text.translate(_SYMBOLS).split()))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip().removesuffix('\\\\').strip(' *')
    text = _STOP.sub('', text).strip()
    for name, opening in (('sqrt', r'\sqrt{'), ('exp', 'e^{')):
        text = _call(text, name, opening)
    if _TRIGONOMETRIC.search(text):  # elsewhere degrees are a unit like others
        text = _DEGREES.sub(r'(\\frac{\1\\pi}{180})', text)
    return text


def _call(text: str, name: str, opening: str) -> str:
    r"""sqrt(2) and \sqrt(2) as \sqrt{2}."""
    pattern = re.compile(rf'\\?(?<![A-Za-z]){name}\s*(?:\\cdot\s*)?\(')
    pieces, end = [], 0
    for match in list(pattern.finditer(text))[:20]:
        depth = 1
        for bracket in re.finditer(r'[()]', text[match.end() :]):
            depth += 1 if bracket[0] == '(' else -1
            if depth == 0:
                close = match.end() + bracket.start()
                if match.start() >= end:
                    pieces += [text[end : match.start()], opening, text[match.end() : close], '}']
                    end = close + 1
                break
    return ''.join(pieces) + text[end:]


def _mixed(match: re.Match) -> str:
    whole, numerator, denominator = (int(group) for group in match.groups() if group is not None)
    return rf'\frac{{{whole * denominator + numerator}}}{{{denominator}}}'


def _repeating(match: re.Match) -> str:
    whole, once, period = match.groups()
    numerator = int(whole + once + period) - int(whole + once or 0) if whole + once else int(period)
    return rf'\frac{{{numerator}}}{{{"9" * len(period)}{"0" * len(once)}}}'


def _scaled(match: re.Match) -> str:
    scale = math.prod(SCALES[word.lower()] for word in match['scales'].split())
    return f'{Decimal(match["number"].replace(",", "")) * scale:f}'.removesuffix('.0')


def _ratio(match: re.Match) -> str:
    parts = [int(part) for part in match[0].split(':')]
    divisor = max(1, math.gcd(*parts))
    return f'({", ".join(str(part // divisor) for part in parts)})'


_STOP = re.compile(r'(?<![.\s\\])[.,;:]\s*$')
# The sine of 30^\circ was that of 30 radians.
_TRIGONOMETRIC = re.compile(r'\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])')
_DEGREES = re.compile(r'(?<![\d.])(\d+(?:\.\d+)?)\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})')
_SYMBOLS = str.maketrans(
    {'−': '-', '–': '-', '⁄': '/', '€': '', '£': '', '²': '^2', '³': '^3', '½': r'\frac{1}{2}', '∅': r'\emptyset '}
    | {'×': r'\times ', '·': r'\cdot ', '÷': r'\div ', '±': r'\pm ', '°': r'^\circ ', 'π': r'\pi ', '∞': r'\infty '}
    | {'≈': r'\approx ', '≤': r'\le ', '≥': r'\ge ', '≡': r'\equiv ', '∪': r'\cup ', '∈': r'\in '}
)
DIGITS = r'\d{1,18}'  # of what is computed with here: Python refuses to read numbers of many thousand digits
FUNCTIONS = 'arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|gcd|lcm|max|min|det'
_SCALES = '|'.join(SCALES)
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        # Looks.
        (r'\\?\$|(?<!\\)\\[()\[\]]', ''),
        (r'\\(?:text)?color\s*\{\w+\}|\\(?:bf|rm|it|displaystyle|[bB]igg?[lrm]?|left|right)(?![A-Za-z])\.?|\\!', ''),
        (r'^\s*\\f?box(?:ed)?\s*\{(.*)\}\s*$', r'\1'),
        # 1\,234, 1{,}234, 1~234 and 1 234 group digits; read as sums and products.
        (r'(?<=\d)(?:\\[,;: ]|\{,\}|~| )(?=\d{3}(?!\d))', ''),
        (r'(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])', ' '),
        (r'(?<!_\{)\\(?:text|math|m)(?:bf|it|rm|sf|normal|box)?\s*\{([^{}]*)\}', r' \1'),
        (r'^\s*[A-Za-z]?\s*\\approx|^\s*[A-Za-z]\s*\\in(?![A-Za-z])', ''),
        (r'(?<![A-Za-z\\])pi(?![A-Za-z])', r'\\pi '),
        (r'\\langle(?![A-Za-z])', '('),
        (r'\\rangle(?![A-Za-z])', ')'),
        (r'\\(?:varnothing|emptyset)(?![A-Za-z])', r'\\{\\}'),
        (r'\\(leq|geq)(?:slant)?(?![A-Za-z])', lambda match: '\\' + match[1][:2]),
        (r'√\s*(\d+|[A-Za-z])', r'\\sqrt{\1}'),
        (r'√\s*(?=\()', r'\\sqrt'),
        (rf'\\operatorname\s*\{{({FUNCTIONS})\}}', r'\\\1'),
        (r'\\imath(?![A-Za-z])', 'i'),
        (r'(?<![A-Za-z\\])oo(?![A-Za-z])', r'\\infty'),
        (r'(?<![A-Za-z\\])abs\(([^()]*)\)', r'|\1|'),
        (r'\*\*(?=[\s\d({A-Za-z-])(?!$)', '^'),
        (r'\^\s*(-?\d+)', r'^{\1}'),
        (rf'(?<![A-Za-z\\])({FUNCTIONS})(?=\s*\(|\s+[A-Za-z\d])', r'\\\1'),
        (r'(?<=[\w)}])\s*\*\s*(?=[\w(\\])', r' \\cdot '),
        (r'\s*(?:\\?%|\b(?:percentage|percent|per cent|pct)\b)', r'\\%'),
        # 0.1\overline{6} is 15/90.
        (r'(?<!\d)(\d{0,18})\.(\d{0,18})\s*\\(?:overline|bar|dot)\s*\{(\d{1,18})\}', _repeating),
        # 1\frac{1}{2} and 1 1/2 are three halves; the first was read so unless a percent sign follows.
        (
            rf'(?<![\d.}}])({DIGITS})\s*\\[dtc]?frac\s*(?:\{{\s*({DIGITS})\s*\}}\s*\{{\s*({DIGITS})\s*\}}|(\d)\s*(\d))',
            _mixed,
        ),
        (rf'(?<![\d.}}])({DIGITS})\s+({DIGITS})/({DIGITS})(?!\d)', _mixed),
        # 2.5e-4; e was Euler's number.
        (r'(?<![A-Za-z\d.])(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d+)(?![\d.])', r'\1 \\times 10^{\2}'),
        # 5 million is 5000000, 2 dozen eggs are 24 eggs.
        (
            rf'(?i)(?<![\d.,])(?P<number>\d{{1,18}}(?:,\d{{3}}){{0,5}}(?:\.\d{{1,18}})?)(?P<scales>(?:\s+(?:{_SCALES})\b)+)',
            _scaled,
        ),
        # 312 (base 8), 312_{\text{eight}}.
        (r'(?<=\d)\s*_\s*\{?\s*\(?(?:base\s+)?(\d{1,2})\)?\s*\}?', r'_{\1}'),
        (r'(?<=\d)\s*_\s*\{\s*\\(?:text|mathrm)\s*\{\s*\(?(?:base\s+)?(\d{1,2})\)?\s*\}\s*\}', r'_{\1}'),
        (r'(?<=\d)\s*\(?\bbase\s+(\d{1,2})\b\)?', r'_{\1}'),
        # 1:2:3 was the number 1/6.
        (rf'^\s*{DIGITS}(?:\s*:\s*{DIGITS}){{2,}}\s*$', _ratio),
        # 2 hours 30 minutes are two quantities.
        (r'(?<=\d)(\s+[A-Za-z]+)\s+(?=\d)', r'\1, '),
    ]
]
