r"""The final answer of a response, and a check that it has the form that was asked for. Plain string work.

A place is named by its marker:

    'boxed'        the last closed `\boxed{...}`, with nested braces
    '####'         the rest of the line behind the last `####`
    'Answer:'      the rest of the line behind the last "Answer:", "answer is" or "answer is:", in any case
    'last number'  the last number of the text, plain or with commas
"""

import re
from collections.abc import Sequence

PLACES = ('boxed', '####', 'Answer:', 'last number')

NUMBER = r'(?:-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+)'

# An escaped character (so that \{ and \} are no braces), the start of a box, or a brace.
_BRACES = re.compile(r'(?P<box>\\f?boxed\s*\{)|\\.|[{}]', re.DOTALL)
# Markers alone: one that took the rest of its line along would hide another behind it.
_MARKERS = {
    '####': re.compile('####'),
    'Answer:': re.compile(r'\banswer\b[*_]*[^\S\n]*(?::|is\b:?)', re.IGNORECASE),
}
_LAST_NUMBER = re.compile(rf'(?<![\d.])({NUMBER})(?!\d)')
_LINE = {'####': re.compile(r'\s*####(.*)'), 'Answer:': re.compile(r'[\s*_]*answer[*_]*\s*:(.*)', re.IGNORECASE)}


def find_answer(text: str, places: Sequence[str] = PLACES) -> str | None:
    r"""The final answer of a response, from the first of `places` whose marker occurs in it; None if there is none.

    A marker without an answer behind it ends the search: where a `\boxed{` was cut off, half of a number is not taken
    for the number, nor another number for the answer.

    Raises:
        ValueError: a place that does not exist.
    """
    check_places(places)
    for place in places:
        if place == 'boxed' and re.search(r'\\f?boxed', text):
            found = last_boxed(text)
        elif place in _MARKERS and (end := max((m.end() for m in _MARKERS[place].finditer(text)), default=0)):
            found = text[end:].partition('\n')[0]
        elif place == 'last number' and (numbers := _LAST_NUMBER.findall(text)):
            found = numbers[-1]
        else:
            continue
        return (found or '').strip(' \t*_') or None
    return None


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
        return float(closed and content is not None and bool(content.strip()))
    if place not in _LINE:
        raise ValueError(f"place is {place!r}; expected a form of answers: 'boxed', '####' or 'Answer:'.")
    line = _LINE[place].fullmatch(text.rstrip().rpartition('\n')[2])
    return float(line is not None and bool(line[1].strip(' \t*_')))


def check_places(places: Sequence[str]) -> None:
    """Raises a ValueError if there is none, or one that does not exist."""
    if isinstance(places, str) or not places or not set(places) <= set(PLACES):
        raise ValueError(f'places is {places!r}; expected one or more of {PLACES}, in the order of the search.')


def last_boxed(text: str) -> str | None:
    r"""The content of the last closed `\boxed{...}` of a text, with nested braces; None if there is none."""
    return _boxes(text)[0]


def _boxes(text: str) -> tuple[str | None, bool]:
    """The content of the last closed box, and whether every box is closed. Linear in the length of the text."""
    found, content = -1, None
    opened: list[int | None] = []  # per open brace: where the content of its box starts, None if it is no box's
    for match in _BRACES.finditer(text):
        if match['box']:
            opened.append(match.end())
        elif match[0] == '{':
            opened.append(None)
        elif match[0] == '}' and opened:
            start = opened.pop()
            if start is not None and start > found:
                found, content = start, text[start : match.start()]
    return content, all(start is None for start in opened)
