"""Answers: where they are taken from, the reward for their form, and a golden set of what counts as equal."""

import json
import time
from pathlib import Path

import pytest

from troll_jax.rewards.answers import answer_format, find_answer
from troll_jax.rewards.math import grade_math, normalised, same_answer

GOLDEN = [json.loads(line) for line in (Path(__file__).parent / 'math_answers.jsonl').read_text().splitlines()]


def response(case: dict) -> str:
    """The whole text of a golden case: given as such, or what stands in its box."""
    return case.get('text') or rf'\boxed{{{case["response"]}}}'


def test_the_golden_answers():
    """Guards against right answers that do not parse and wrong ones that look right: a policy learns from either."""
    assert len(GOLDEN) > 1500 and len({(response(case), case['answer']) for case in GOLDEN}) == len(GOLDEN)
    assert min(sum(case['grade'] == grade for case in GOLDEN) for grade in (0, 1)) > 600
    wrong = [case for case in GOLDEN if grade_math(response(case), case['answer']) != case['grade']]
    assert not wrong, wrong


@pytest.mark.parametrize(
    'text, places, answer',
    [
        (r'3, so \boxed{\frac{1}{2}}.', ['boxed'], r'\frac{1}{2}'),
        ('#### 7', ['boxed'], None),
        ('Add.\n#### 1,234 \nDone 5', ['####'], '1,234'),
        ('Answer: 3, no.\n**Answer:** $x = 4$', ['Answer:'], '$x = 4$'),
        ('Answer: 3, no. Answer: 4', ['Answer:'], '4'),
        ('The answer is 3. **Answer:** 4', ['Answer:'], '4'),
        ('#### 3 no #### 4', ['####'], '4'),
        ('the final answer is 5', ['Answer:'], '5'),
        ('The answer is: 5.', ['Answer:'], '5.'),
        ('ANSWER: (C)', ['Answer:'], '(C)'),
        ('answering is 5', ['Answer:'], None),
        ('It takes 3 days, -1,234.50 hours', ['last number'], '-1,234.50'),
        ('12345 and 17-10', ['last number'], '10'),
        ('1/2 of 3/4 of the cake', ['last number'], '3/4'),
        ('no number', ['last number'], None),
        ('Answer: 3 or #### 4 or 5', ['boxed', '####', 'last number'], '4 or 5'),
        ('Answer: 3 or #### 4 or 5', ['Answer:', '####'], '3 or #### 4 or 5'),
        # A marker without an answer behind it is no reason to take another number.
        (r'7, or rather \boxed{7', ['boxed', 'last number'], None),
        ('7, or\n####', ['####', 'last number'], None),
        (r'7 \boxed{}', ['boxed', 'last number'], None),
        ('', ['boxed', '####', 'Answer:', 'last number'], None),
    ],
)
def test_places(text, places, answer):
    """Guards against an earlier answer, also on the same line, the next line, and a fallback that overrules what the
    policy marked."""
    assert find_answer(text, places) == answer


@pytest.mark.parametrize('place, text', [('boxed', r'\boxed{%s}'), ('####', '#### %s'), ('Answer:', 'Answer: %s')])
@pytest.mark.parametrize('answer', ['18', r'\frac{3}{4}', '(1, 2)', r'x^2 + 2x', r'\text{C}'])
def test_every_form_is_graded_alike(place, text, answer):
    response = f'There are 5 steps.\n{text % answer}'
    assert grade_math(response, answer, [place]) == answer_format(response, place) == 1.0
    assert grade_math(response, '5', [place]) == 0.0


@pytest.mark.parametrize(
    'place, text, score',
    [
        ('boxed', r'so $\boxed{7}$, as was to be shown', 1),
        ('boxed', r'\boxed{ }', 0),
        ('boxed', r'\boxed{7} and \boxed{8', 0),
        ('boxed', '7', 0),
        ('####', '3 + 4\n#### 7\n', 1),
        ('####', '#### 7\nthat is all', 0),
        ('####', '3 + 4 #### 7', 0),
        ('####', '####', 0),
        ('Answer:', 'Add.\n**Answer:** 7', 1),
        ('Answer:', 'Answer: 7\n\n', 1),
        ('Answer:', 'The answer is 7', 0),
        ('Answer:', '**Answer:**', 0),
        ('Answer:', '', 0),
    ],
)
def test_the_reward_for_the_form(place, text, score):
    """Guards against paying for a marker alone, and for an answer that more text follows."""
    assert answer_format(text, place) == score


def test_what_is_no_place_is_an_error():
    for places in ('boxed', [], ['box'], ['boxed', None]):
        with pytest.raises(ValueError, match="expected one or more of .*'last number'"):
            find_answer('7', places)
    with pytest.raises(ValueError, match="place is 'last number'; expected a form"):
        answer_format('7', 'last number')


def test_an_empty_reference_is_an_error():
    """Guards against rows without an answer, which would be right for a response that says nothing."""
    with pytest.raises(ValueError, match='reference answer is empty'):
        grade_math(r'\boxed{}', ' ')
    assert not same_answer('', '0')


def test_hostile_text_takes_linear_time():
    """Guards against a pattern that backtracks: such a response would take its whole deadline."""
    for piece in ('answer ', '#', r'\boxed{', '{', '1,', 'Answer:*', '1 ', 'a ', '√ ', '1:', '1', ' ', '1%', '. '):
        text = piece * 20_000
        find_answer(text)
        answer_format(text, 'boxed'), answer_format(text, '####'), answer_format(text, 'Answer:')
        normalised(text)


@pytest.mark.parametrize('piece', ['Answer: 1 ', 'answer is ', '#', '#### 1 ', 'answer ', 'answer***', 'Answer:'])
@pytest.mark.parametrize('place', ['####', 'Answer:'])
def test_one_line_of_a_megabyte_is_searched_in_a_moment(place, piece):
    """Guards against a search for the last marker that starts anew at every one of them, in time against the square."""
    line = piece * (2**20 // len(piece))
    begin = time.process_time()
    find_answer(line + f' {place} 7', [place])
    assert time.process_time() - begin < 1
