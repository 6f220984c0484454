"""Terms of a reward, by hand."""

import numpy as np
import pytest

from troll_jax.rewards.terms import Responses, answer_format, check_names, soft_overlong, task_reward, weigh


def responses(lengths, max_length, grades=None) -> Responses:
    grades = np.zeros(len(lengths)) if grades is None else grades
    return Responses([f'text {n}' for n in lengths], np.array(lengths), max_length, np.asarray(grades, np.float32))


def test_soft_overlong_by_hand():
    """Guards the three parts of DAPO's penalty, in tokens: none, a line from 0 to −1, and its end at the limit."""
    penalties = soft_overlong(responses([1, 16384, 16385, 18432, 20480], 20480))
    np.testing.assert_allclose(penalties, [0, 0, -1 / 4096, -0.5, -1], atol=1e-6)
    np.testing.assert_allclose(soft_overlong(responses([2, 4], 4), share=1.0), [-0.5, -1])


@pytest.mark.parametrize('share', [0.0, 1.5, -0.1])
def test_a_share_that_is_none_is_refused(share):
    """Guards a division by zero, and a penalty that begins before the response."""
    with pytest.raises(ValueError, match=rf'in \(0, 1\]; got {share}'):
        soft_overlong(responses([3], 5), share=share)


def test_answer_format():
    """Guards a reward for form that looks at another place than it was asked for."""
    given = responses([1, 2], 4)._replace(texts=['so \\boxed{7}', '#### 7'])
    np.testing.assert_array_equal(answer_format(given), [1, 0])
    np.testing.assert_array_equal(answer_format(given, place='####'), [0, 1])


def test_weighted_sum():
    """Guards weights that are forgotten or used twice: terms are logged as they are, and the reward is their sum."""
    given = responses([1, 4], 4, grades=[0.5, 1])
    total, terms = weigh([('task', 2.0, task_reward), ('length', 0.5, lambda r: -r.lengths)], given)
    np.testing.assert_array_equal(total, [0.5, 0.0])
    np.testing.assert_array_equal(terms['task'], [0.5, 1])
    np.testing.assert_array_equal(terms['length'], [-1, -4])


def test_names_of_terms():
    """Guards two terms of one name, of which the second would count twice, and a name that the log uses."""
    for names in ([], ['a', 'a'], ['mean']):
        with pytest.raises(ValueError, match='rewards are named'):
            check_names([(name, 1.0, task_reward) for name in names])


@pytest.mark.parametrize(
    ('term', 'said'),
    [
        (lambda r: np.array([0, np.nan]), "'odd' gave nan for the response 'text 4'"),
        (lambda r: np.zeros(3), r"'odd' gave \(3,\); expected a finite number for each of 2"),
    ],
)
def test_what_is_no_reward_is_an_error(term, said):
    """Guards a NaN that would spread over a whole group, and a term that gives one number too many."""
    with pytest.raises(ValueError, match=said):
        weigh([('odd', 1.0, term)], responses([1, 4], 4))
