"""Is a mathematical answer right? A thin layer over math-verify, which parses LaTeX and compares with sympy.

Importing this costs what sympy costs, under a second, and no array library. It is not put off to the first call, which
would charge it to the deadline of the first grading.
"""

import re

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

_LATEX = LatexExtractionConfig(boxed_match_priority=0)

# 1\,234 and 1{,}234: LaTeX's ways to group digits; math-verify takes the first for a sum.
_DIGIT_GROUP = re.compile(r'(?<=\d)(?:\\[,!; ]|\{,\})(?=\d{3}(?!\d))')
# An escaped character (so that \{ and \} are no braces), the start of a box, or a brace.
_BRACES = re.compile(r'(?P<box>\\f?boxed\s*\{)|\\.|[{}]', re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""What stands in the last closed `\boxed{...}` of a text, with nested braces; None if there is none."""
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
    return content


def grade_math(response: str, answer: str) -> float:
    r"""1.0 if a response's final answer equals `answer`, else 0.0.

    The final answer is what stands in the last closed `\boxed{...}`. A response that never writes `\boxed` is searched
    for a final answer by math-verify's own rules ("the answer is ...", LaTeX, a last number). A response whose only box
    was cut off has no answer: half of a number is not taken for the number.

    Args:
        response: what the policy wrote.
        answer: the reference, LaTeX or plain, without dollar signs or box around it; a boxed one is accepted.

    Hangs for as long as sympy does on hostile input, since math-verify's own time limits rest on signals, which only
    work in a main thread. `rewards.pool.Grader` runs it in a worker with a deadline.

    Raises:
        ValueError: `answer` is empty or only white space.
    """
    if not answer.strip():
        raise ValueError('The reference answer is empty; expected LaTeX or a number. Drop such rows from the data.')
    content = last_boxed(response)
    if content is not None:
        predicted = _parse_latex(content)
    elif '\\boxed' in response:
        return 0.0
    else:
        predicted = parse(response, [_LATEX, ExprExtractionConfig()], parsing_timeout=None)
    boxed_answer = last_boxed(answer)
    expected = _parse_latex(answer if boxed_answer is None else boxed_answer)
    return float(verify(expected, predicted, timeout_seconds=None))


def _parse_latex(text: str) -> list:
    return parse(rf'\boxed{{{_DIGIT_GROUP.sub("", text)}}}', [_LATEX], parsing_timeout=None)
