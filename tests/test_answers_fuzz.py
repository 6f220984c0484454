"""Answers of the golden set, rewritten at random: what is another answer never passes, what is the same never fails."""

import json
import random
import re
from pathlib import Path

import pytest

from troll_jax.rewards.math import grade_math

pytestmark = pytest.mark.slow

GOLDEN = [json.loads(line) for line in (Path(__file__).parent / 'math_answers.jsonl').read_text().splitlines()]
# Not a box in a box, of which the inner one counts, nor a constant of integration.
ANSWERS = sorted(
    {case['answer'] for case in GOLDEN if case['grade'] == 1 and not re.search(r'boxed|\+C$', case['answer'])}
)
NUMBER = re.compile(r'(?<![\d_.{])\d+(?![\d.])')


def another_number(answer: str, draw: random.Random) -> str | None:
    """One more or one less; not where this is the same: behind a base, in a remainder, to the power of zero."""
    if re.search(r'mod|:|0\^|/\d+!|log|_|\\l|gcd|max|\||cos|\\frac\{0', answer) or not (
        found := list(NUMBER.finditer(answer))
    ):
        return None
    match = draw.choice(found)
    return f'{answer[: match.start()]}{int(match[0]) + draw.choice((2, 3, 10))}{answer[match.end() :]}'


def plain(answer: str) -> bool:
    return re.fullmatch(r'-?\d+(\.\d+)?', answer) is not None


OTHER = {
    'another number': another_number,
    'a digit more': lambda answer, draw: answer + str(draw.randint(1, 9)) if re.fullmatch(r'-?\d+', answer) else None,
    'a million': lambda answer, draw: (
        answer + draw.choice((' million', r'\text{ million}')) if plain(answer) and float(answer) else None
    ),
    'the opposite': lambda answer, draw: f'-{answer}' if plain(answer) and float(answer) > 0 else None,
    'another word': lambda answer, draw: draw.choice(('green', 'never', 'x + apple')),
    'a denial': lambda answer, draw: rf'\text{{not }} {answer}',
    'a word behind': lambda answer, draw: (
        None
        if re.search(r'\([A-E]\)', answer)
        else f'{answer} {draw.choice(("minus two", "not", "or so", "plus one", "times"))}'
    ),
    'an item more': lambda answer, draw: f'{answer}, 987' if 'set' not in answer else None,
    'an alternative': lambda answer, draw: rf'{answer} \text{{ or }} 987',
    'all items twice': lambda answer, draw: f'{answer}, {answer}',
    'a summand': lambda answer, draw: f'{answer} + 1' if plain(answer) else None,
    'an item dropped': lambda answer, draw: (
        answer.rpartition(',')[0] if re.fullmatch(r'\d+(, ?\d+)+', answer) else None
    ),
    'another unit': lambda answer, draw: (
        f'{answer.split()[0]} furlongs' if 'base' not in answer and re.fullmatch(r'\d+ [a-z]+', answer) else None
    ),
    'nothing': lambda answer, draw: '',
    'a box cut off': lambda answer, draw: answer + '} and \\boxed{' + answer[:-1] + r'\frac{',
    'a tenth': lambda answer, draw: f'{answer}/10' if plain(answer) and float(answer) else None,
}
SAME = {
    'spaces': lambda answer, draw: f'  {answer} ',
    'dollars': lambda answer, draw: f'${answer}$' if '$' not in answer else None,
    'a stop': lambda answer, draw: f'{answer}.' if answer[-1] not in '.C' else None,
    'display style': lambda answer, draw: rf'\displaystyle {answer}',
    'a thin space': lambda answer, draw: rf'{answer}\,',
    'a tie': lambda answer, draw: f'{answer}~',
    'a large fraction': lambda answer, draw: answer.replace(r'\frac', r'\dfrac'),
    'a minus of Unicode': lambda answer, draw: answer.replace('-', draw.choice('−–')) if 'e-' not in answer else None,
    'a unit': lambda answer, draw: (
        answer + draw.choice((' cm', r'\text{ cm}', r'~\mathrm{kg}', ' apples', r'\,m/s')) if plain(answer) else None
    ),
    'a name': lambda answer, draw: f'x = {answer}' if plain(answer) else None,
    'bold': lambda answer, draw: rf'\mathbf{{{answer}}}' if re.fullmatch(r'[\w ]+', answer) else None,
    'another order': lambda answer, draw: (
        _shuffled(answer, draw) if re.fullmatch(r'[\d-]+(, ?[\d-]+)+', answer) else None
    ),
    'another order of a set': lambda answer, draw: (
        rf'\{{{_shuffled(answer[2:-2], draw)}\}}' if re.fullmatch(r'\\\{[\d., -]+\\\}', answer) else None
    ),
    'a decimal zero': lambda answer, draw: f'{answer}.0' if re.fullmatch(r'-?\d+', answer) else None,
    'groups of digits': lambda answer, draw: f'{int(answer):,}' if re.fullmatch(r'-?\d{4,15}', answer) else None,
    'brackets of text': lambda answer, draw: (
        rf'\left({answer[1:-1]}\right)' if re.fullmatch(r'\([^()]*\)', answer) else None
    ),
}


def _shuffled(items: str, draw: random.Random) -> str:
    if re.fullmatch(r'\d{1,3}(,\d{3})+', items):  # a number
        return items
    return ', '.join(draw.sample(items := [item.strip() for item in items.split(',')], len(items)))


@pytest.mark.parametrize('rewrite, grade', [*((name, 0.0) for name in OTHER), *((name, 1.0) for name in SAME)])
def test_rewritten_answers(rewrite, grade):
    draw = random.Random(rewrite)
    pairs = [((OTHER if grade == 0 else SAME)[rewrite](answer, draw), answer) for answer in ANSWERS]
    pairs = [(text, answer) for text, answer in pairs if text is not None]
    assert len(pairs) > 3
    wrong = [pair for pair in pairs if grade_math(rf'\boxed{{{pair[0]}}}', pair[1]) != grade]
    assert not wrong, wrong


# Around an answer, these say something else or nothing; none is read past.
AROUND = r"""
@ \text{ or something}
@?
@...
\neg @
\neq @
\ne @
> @
\sim @
@ \pm 1
@ \to \infty
\text{never } @
@ \text{ is wrong}
@, x
x, @
@; 99
@ \land 99
@ \lor 99
@ \vee 99
@ | 99
@ / 99
@ \text{ but maybe } 99
@ \quad 99
@ \\ 99
@ & 99
@ = 99
99 = @
@ \approx 99
99 \approx @
@ \neq 99
99 \neq @
@ \Rightarrow 99
99 \Rightarrow @
@ \to 99
99 \to @
@, @
@ @
(@, @)
\{@, 99\}
[@, 99]
@ \cup 99
@ \text{ if } x > 0
@^2 + 99
@ + 99
@ - 99
@ \cdot 99
\sqrt{@} + 99
f(@) + 99
@_{99}
@^{99}
@ \text{ and } 99
@ \text{ versus } 99
@ 99
99 @
@x
x@
\overline{@}
@\text{ million}
@ dozen
@ \text{ thousand}
@ \% \%
@ \mid 99
\text{@ or 99}
\text{between @ and 99}
\text{not} @
\lnot @
-@ \text{ or } @
\pm @, 99
@<99
@ \le 99
99 > @
\binom{@}{99}
@ \mod 99
@ \pmod{99}
@\text{th}
@ \text{ half}
@ squared
@ :: 99
@ : 99
@\ldots 99
@ \ldots
x \in \{@, 99\}
@ \text{ to } 99
\text{A: @} , 99
(A) @ (B) 99
""".strip().splitlines()


@pytest.mark.parametrize('answer', ['7', r'\frac{1}{2}', r'2\sqrt{3}', '(1,2)', r'\text{Monday}', 'x+3'])
def test_what_stands_around_an_answer_is_part_of_it(answer):
    passed = [text for text in AROUND if grade_math(rf'\boxed{{{text.replace("@", answer)}}}', answer)]
    assert not passed, passed
