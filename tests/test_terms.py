"""Terms of a reward, by hand."""

import numpy as np
import pytest

from troll_jax.rewards.terms import (
    Responses,
    answer_format,
    check_names,
    soft_overlong,
    task_reward,
    trl_reward,
    weigh,
)


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
    with pytest.raises(ValueError, match=r"\['a'\] take completions; expected @trl_reward"):
        check_names([('a', 1.0, lambda completions, **kwargs: [0.0] * len(completions)), ('b', 1.0, task_reward)])


@pytest.mark.parametrize(
    ('term', 'said'),
    [
        (lambda r: np.array([0, np.nan]), "'odd' gave nan for the response 'text 4'"),
        (lambda r: np.zeros(3), r"'odd' gave \(3,\); expected a finite number for each of 2"),
        (lambda r: [1 / (text != 'text 4') for text in r.texts], "ZeroDivisionError: .*test_terms.py.* 'text 4'; mend"),
    ],
)
def test_what_is_no_reward_is_an_error(term, said):
    """Guards a NaN that would spread over a whole group, a term that gives one number too many, and one that raises on
    one of thousands of responses."""
    with pytest.raises(ValueError, match=said):
        weigh([('odd', 1.0, term)], responses([1, 4], 4))


CHATS = [[{'role': 'user', 'content': 'a?'}], [{'role': 'system', 'content': 'Be.'}, {'role': 'user', 'content': 'b?'}]]


def whole() -> Responses:
    given = responses([1, 2], 4)
    return given._replace(
        tokens=[np.array([5]), np.array([6, 7])], prompts=CHATS, answers=['1', '2'], columns={'topic': ['x', None]}
    )


def test_reward_functions_of_trl():
    """Guards inputs in another form than TRL's trainers give them, and None, which is no number and no NaN."""

    def conversational(prompts, completions, completion_ids, answer, **columns):
        assert completions == [[{'role': 'assistant', 'content': f'text {n}'}] for n in (1, 2)]
        assert (prompts, completion_ids, answer, columns) == (CHATS, [[5], [6, 7]], ['1', '2'], {'topic': ['x', None]})
        return [None, 0.5]

    def text(completions, prompts, log_extra=None):
        assert (completions, prompts, log_extra) == (['text 1', 'text 2'], ['a?', 'b?'], None)
        return [1, 2]

    np.testing.assert_array_equal(trl_reward(whole(), function=conversational), [0, 0.5])
    np.testing.assert_array_equal(trl_reward(whole(), function=text, conversational=False), [1, 2])
    with pytest.raises(
        ValueError,
        match=r"missing a required argument: 'trainer_state', which nothing gives it; expected some of.*'topic'",
    ):
        trl_reward(whole(), function=lambda completions, trainer_state: [0, 0])


def test_a_response_that_a_term_fails_on_is_named_with_its_own_row():
    """Guards an error that quotes another response than the one whose row is at fault."""
    with pytest.raises(ValueError, match="for the response 'text 2'"):
        weigh([('topic', 1.0, lambda r: [len(topic) for topic in r.columns['topic']])], whole())
