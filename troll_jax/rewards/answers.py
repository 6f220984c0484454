r"""The final answer of a response, and a check that it has the form that was asked for. Plain string work.

A place is named by its marker:

    'boxed'        the last `\boxed{...}` or `\fbox{...}`, with nested braces; several with 'and' or a comma between
                   them are a list
    '####'         the rest of the line behind the last `####`, or the next line if that is empty
    'Answer:'      the same behind the last "Answer:", "answer is" or "answer is:", in any case
    'last number'  the last number of the text: plain or with commas, a fraction, a root, in scientific notation

A text ends where a base model runs on with another problem, see `_NEXT_PROBLEM`.
"""

import re
from collections.abc import Sequence

PLACES = ('boxed', '####', 'Answer:', 'last number')

NUMBER = r'(?:-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+)'

# Number words that multiply the number before them.
SCALES = {'hundred': 100, 'thousand': 1000, 'million': 10**6, 'billion': 10**9, 'trillion': 10**12, 'dozen': 12}

# An escaped character (so that \{ and \} are no braces), the start of a box, a box without braces, or a brace.
_BOX = r'\\(?:f?boxed|fbox)(?![A-Za-z])'
_BRACES = re.compile(
    rf'(?P<box>{_BOX}\s*\{{)|{_BOX}\s*(?P<bare>-?\\[dt]?frac\s*\{{[^{{}}]*\}}\s*\{{[^{{}}]*\}}|{NUMBER}|[A-Z]\b)|\\.|[{{}}]',
    re.DOTALL,
)
# What stands in a box that only shows how an answer is to be given.
_SHOWN = re.compile(
    r'(?i)[\s.…]*|\\[lc]?dots|(?:\\text\s*\{)?\s*(?:(?:the|your|my)\s+)?(?:final\s+)?answer\s*(?:here)?\s*\}?'
)
_BETWEEN = re.compile(r'[\s$]*(?:,|;|,?\s*(?:and|or)\b)[\s$]*(?:[A-Za-z]\s*=[\s$]*)?')
# Markers alone: one that took the rest of its line along would hide another behind it.
_MARKERS = {
    '####': re.compile('####'),
    'Answer:': re.compile(r'\banswer\b[*_]*[^\S\n]*(?:[:：]|is\b:?)', re.IGNORECASE),
}
_NEXT_PROBLEM = re.compile(
    r'^[#*\s]{0,9}(?:Question|Problem|Q|Human|User|Exercise)\b[ \t]*\d*[ \t]*[*_]*[:：]|<\|\w+\|>|</s>', re.M
)
_SPECIAL = re.compile(r'<\|\w+\|>|<[A-Z]+_\d+>')  # tokens, whose numbers are no answers
_PART = (
    rf'(?:{NUMBER}(?:[eE][-+]?\d+)?|\\[dtc]?frac\s*(?:\{{[^{{}}]{{0,99}}\}}\s*\{{[^{{}}]{{0,99}}\}}|\d\d)|'
    r'\\sqrt\s*(?:\[\d+\])?\s*(?:\{[^{}]{0,99}\}|\d)|√\d+|\\pi(?![A-Za-z])|π)'
)
_JOIN = r'(?:\s*(?:/|⁄|×|·|\*|\\times|\\cdot)\s*|(?=[\\√π]))'
_POWER = r'(?:[\^_](?:\{[^{}]{0,99}\}|-?\d+)|!)?'
# Glued to something it is no number of its own: x^2, x_2, 3:45, 5x.
_LAST_NUMBER = re.compile(
    r'(?<![\d.])(?P<glued>[\^_⁄{]|\d:)?(?P<number>(?:(?<![\w)}])[-−–]\s?)?(?:\d+\s+(?=\d+/\d))?'
    rf'(?:\d{{1,3}}(?: \d{{3}})+(?!\d)|{_PART}){_POWER}(?:{_JOIN}{_PART}{_POWER})*'
    rf'(?:\s*\\?%|(?:\s+(?:{"|".join(SCALES)})\b)*))(?!\d)(?P<after>[²³⁄]|[A-Za-z]\b)?'
)
_LINE = {'####': re.compile(r'\s*####(.*)'), 'Answer:': re.compile(r'[\s*_]*answer[*_]*\s*:(.*)', re.IGNORECASE)}


def find_answer(text: str, places: Sequence[str] = PLACES) -> str | None:
    r"""The final answer of a response, from the first of `places` whose marker occurs in it; None if there is none.

    A marker without an answer behind it ends the search: where a `\boxed{` was cut off, half of a number is not taken
    for the number, nor another number for the answer. A box that is empty, or only shows the form ('...'), leaves the
    word to other boxes and to other markers, but not to the last number.

    Raises:
        ValueError: a place that does not exist.
    """
    check_places(places)
    text = _first_problem(text)
    shown = False
    for place in places:
        if place == 'boxed' and re.search(_BOX, text):
            found, closed = _boxes(text)
            if not closed:
                return None
            if found is None:
                shown = True
                continue
        elif place in _MARKERS and (end := max((m.end() for m in _MARKERS[place].finditer(text)), default=0)):
            line, _, rest = text[end:].partition('\n')
            found = next((line for line in (line, *rest.splitlines()) if line.strip(' \t*_$\r\\[]')), '')
        elif place == 'last number' and not shown and (numbers := [*_LAST_NUMBER.finditer(_SPECIAL.sub(' ', text))]):
            found = '' if numbers[-1]['glued'] or numbers[-1]['after'] else numbers[-1]['number']
        else:
            continue
        return found.strip(' \t*_') or None
    return None


def _first_problem(text: str) -> str:
    """A text up to where another problem begins, behind the first marker of an answer."""
    markers = (re.compile(_BOX), *_MARKERS.values())
    first = min((match.end() for marker in markers if (match := marker.search(text))), default=len(text))
    following = _NEXT_PROBLEM.search(text, first)
    return text[: following.start()] if following else text


def answer_format(text: str, place: str = 'boxed') -> float:
    r"""1.0 if a response gives an answer in the form that was asked for, right or wrong, else 0.0.

    Args:
        text: the policy's text.
        place: 'boxed': there is a closed `\boxed{...}` with something in it, and none that was left open. '####' or
            'Answer:': the last line that is not blank begins with this, and something follows.

    Raises:
        ValueError: another place; a number anywhere is no form.
    """
    if place == 'boxed':
        content, closed = _boxes(text)
        return float(closed and content is not None)
    if place not in _LINE:
        raise ValueError(f"place is {place!r}; expected a form of answers: 'boxed', '####' or 'Answer:'.")
    line = _LINE[place].fullmatch(text.rstrip().rpartition('\n')[2])
    return float(line is not None and bool(line[1].strip(' \t*_')))


def check_places(places: Sequence[str]) -> None:
    """Raises a ValueError if there is none, or one that does not exist."""
    if isinstance(places, str) or not places or not set(places) <= set(PLACES):
        raise ValueError(f'places is {places!r}; expected one or more of {PLACES}, in the order of the search.')


def _boxes(text: str) -> tuple[str | None, bool]:
    """The content of the last closed box that has one, with those that are joined to it, and whether every box is
    closed. Linear in the length of the text."""
    boxes: list[tuple[int, int, str]] = []  # start, end and content of closed boxes
    opened: list[tuple[int, int] | None] = []  # per open brace: start and content's start of its box, if it is one's
    for match in _BRACES.finditer(text):
        if match['box']:
            opened.append((match.start(), match.end()))
        elif match['bare']:
            boxes.append((match.start(), match.end(), match['bare']))
        elif match[0] == '{':
            opened.append(None)
        elif match[0] == '}' and opened and (box := opened.pop()):
            content = text[box[1] : match.start()]
            if not (len(content) < 60 and _SHOWN.fullmatch(content)):
                boxes.append((box[0], match.end(), content))
    boxes.sort()
    content, start = None, 0
    for begin, end, inside in reversed(boxes):
        if content is not None and not (end <= start and _BETWEEN.fullmatch(text, end, start)):
            break
        content, start = inside if content is None else f'{inside}, {content}', begin
    return content, all(box is None for box in opened)
