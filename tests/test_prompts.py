"""Prompts: exact token ids, one BOS, long ones dropped aloud; batches visit every prompt once per epoch."""

import functools

import datasets
import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from troll_jax.data.prompts import batch_indices, distinct_rows, draw_indices, encode_prompts, hold_out
from troll_jax.data.tasks.arithmetic import CHARACTERS, Arithmetic
from troll_jax.data.tokenizer import character_tokenizer
from troll_jax.experiment import Experiment
from troll_jax.ops.schedules import linear_level

WORDS = ['?', '<s>', '</s>', '<user>', '<assistant>', '<think>', 'one', 'two', 'three']
TEMPLATE = (
    '{{ bos_token }}'
    "{% for m in messages %} <user> {{ m['content'] }}{% endfor %}"
    '{% if add_generation_prompt %} <assistant>{% if thinking %} <think>{% endif %}{% endif %}'
)


@pytest.fixture
def tokenizer():
    """One that adds a BOS of its own, as Llama's does, next to a template that writes it too."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token='?'))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token='<s>', eos_token='</s>', pad_token='</s>', chat_template=TEMPLATE
    )
    assert tokenizer('one')['input_ids'] == [1, 6]
    return tokenizer


def dataset(*contents):
    return datasets.Dataset.from_dict(
        {
            'messages': [[{'role': 'user', 'content': content}] for content in contents],
            'answer': [f'answer {i}' for i in range(len(contents))],
        }
    )


def test_golden_ids(tokenizer):
    """Guards against a second BOS, a missing generation prompt, and padding counted into lengths when pad is EOS."""
    prompts = encode_prompts(dataset('one', 'two three'), tokenizer, max_length=7)
    tokens, lengths = prompts[:]
    np.testing.assert_array_equal(tokens, [[1, 3, 6, 4, 0, 0, 0], [1, 3, 7, 8, 4, 0, 0]])
    np.testing.assert_array_equal(lengths, [4, 5])
    np.testing.assert_array_equal(prompts[np.array([1, 0, 1])].tokens, tokens[[1, 0, 1]])
    assert tokens.dtype == lengths.dtype == np.int32
    assert prompts.answers == ['answer 0', 'answer 1'] and len(prompts) == 2
    assert prompts.decode(tokenizer) == ['<s> <user> one <assistant>', '<s> <user> two three <assistant>']


def test_template_arguments_reach_the_template(tokenizer):
    """Guards against `enable_thinking` and the like that are misspelt and change nothing."""
    prompts = encode_prompts(dataset('one'), tokenizer, max_length=5, template_arguments={'thinking': True})
    np.testing.assert_array_equal(prompts.tokens, [1, 3, 6, 4, 5])
    with pytest.raises(ValueError, match=r"does not mention \['enable_thinking'\]"):
        encode_prompts(dataset('one'), tokenizer, max_length=5, template_arguments={'enable_thinking': True})


def test_long_prompts_are_dropped_with_one_warning(tokenizer, caplog):
    """Guards against prompts cut in the middle, dropped in silence, or paired with their neighbour's answer."""
    rows = dataset('one two', 'one', 'one two three', 'two')
    prompts = encode_prompts(rows, tokenizer, max_length=4)
    np.testing.assert_array_equal(prompts.tokens, [1, 3, 6, 4, 1, 3, 7, 4])
    assert prompts.answers == ['answer 1', 'answer 3']
    (record,) = caplog.records
    assert record.message.startswith('2 of 4 prompts are longer than max_length = 4 tokens; the longest has 6')


def test_no_prompt_left_is_an_error(tokenizer):
    with pytest.raises(ValueError, match='2 of 2 prompts are longer than max_length = 3.*raise max_length'):
        encode_prompts(dataset('one', 'two'), tokenizer, max_length=3)


def test_no_rows_are_an_error(tokenizer):
    with pytest.raises(ValueError, match='no rows'):
        encode_prompts(dataset(), tokenizer, max_length=3)


def test_a_doubled_bos_is_an_error(tokenizer):
    """Guards against the template and the message both writing it."""
    tokenizer.chat_template = '{{ bos_token }} ' + TEMPLATE
    with pytest.raises(ValueError, match='row 0 begins with two BOS tokens'):
        encode_prompts(dataset('one'), tokenizer, max_length=9)


def test_an_empty_prompt_is_an_error():
    """Guards against length 0, for which there is no position to sample the first token from."""
    with pytest.raises(ValueError, match='row 1 has no tokens'):
        encode_prompts(dataset('1', ''), character_tokenizer('1'), max_length=3)


def test_arithmetic_prompts_are_twelve_characters():
    prompts = encode_prompts(Arithmetic(train_size=13).load('train'), character_tokenizer(CHARACTERS), max_length=12)
    assert prompts[:].tokens.shape == (13, 12)
    np.testing.assert_array_equal(prompts.lengths, np.full(13, 12))


@pytest.mark.parametrize('n, batch_size', [(13, 5), (12, 4), (7, 7), (7, 1)])
def test_every_epoch_visits_every_prompt_once(n, batch_size):
    """Guards against a remainder that is left out of every epoch, also where a batch joins two of them."""
    epochs = 5
    steps = -(-epochs * n // batch_size)
    walked = np.concatenate([batch_indices(n, batch_size, seed=3, step=step) for step in range(steps)])
    orders = walked[: epochs * n].reshape(epochs, n)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(n), (epochs, 1)))
    assert len({tuple(order) for order in orders}) == epochs


def test_batches_are_a_function_of_seed_and_step():
    """Guards against a resumed run that sees other data: no state may come from the steps before."""
    later = batch_indices(101, 8, seed=0, step=1000)
    assert later.shape == (8,)
    for step in range(3):
        batch_indices(101, 8, seed=0, step=step)
    np.testing.assert_array_equal(batch_indices(101, 8, seed=0, step=1000), later)
    assert not np.array_equal(batch_indices(101, 8, seed=1, step=1000), later)


@pytest.mark.parametrize('batch_size', [0, 14])
def test_a_batch_that_does_not_fit_is_an_error(batch_size):
    with pytest.raises(ValueError, match=f'batch_size is {batch_size} and there are 13 prompts'):
        batch_indices(13, batch_size, seed=0, step=0)


def test_a_curriculum_draws_from_the_levels_that_are_open(tokenizer):
    """Guards against levels that open late or never, prompts left out of a level, levels of other prompts behind one
    that was dropped, and order that depends on what was drawn before."""
    rows = dataset('one two three one', *['one'] * 5, *['two'] * 5, *['three'] * 5)
    rows = rows.add_column('level', [9, *[0] * 5, *[1] * 5, *[2] * 5])
    prompts = encode_prompts(rows, tokenizer, max_length=4, template_arguments={'thinking': False})
    level = functools.partial(linear_level, end=2, draws=20)
    draw = lambda n, level=level, prompts=prompts: draw_indices(prompts, 3, seed=1, draw=n, level=level)
    drawn = [
        set(prompts.levels[np.concatenate([draw(n) for n in range(*span)])]) for span in ((10,), (10, 20), (20, 30))
    ]
    assert drawn == [{0}, {0, 1}, {0, 1, 2}]
    assert set(np.concatenate([draw(n) for n in range(20, 30)])) == set(range(15))
    np.testing.assert_array_equal(draw(15), draw(15))
    np.testing.assert_array_equal(draw(7, None), batch_indices(15, 3, seed=1, step=7))
    with pytest.raises(ValueError, match='0 prompts do not exceed.* begin at a higher level'):
        draw(0, lambda draw: -1)
    with pytest.raises(ValueError, match='the prompts have no levels'):
        draw(0, prompts=encode_prompts(dataset('one'), tokenizer, max_length=9))
    for wrong in ({'end': 2, 'draws': 0}, {'start': 2, 'end': 1, 'draws': 3}):
        with pytest.raises(ValueError, match='schedule|no fall'):
            linear_level(0, **wrong)


def rows_of(*answers: str) -> Dataset:
    messages = [[{'role': 'user', 'content': f'What is {answer}?'}] for answer in answers]
    return Dataset.from_dict({'messages': messages, 'answer': list(answers)})


def test_repeated_problems_are_left_out_of_training_and_said(caplog):
    """Guards data that are published with every problem a hundred times: a batch would hold one twice."""
    rows = rows_of('1', '2', '1', '3', '2')
    assert distinct_rows(rows, repeated=False)['answer'] == ['1', '2', '3']
    assert '2 of 5 rows repeat a problem; they are left out' in caplog.text
    assert distinct_rows(rows, repeated=True)['answer'] == rows['answer']
    assert 'they stay' in caplog.text
    caplog.clear()
    assert len(distinct_rows(rows_of('1', '2'), repeated=False)) == 2 and not caplog.text


def test_held_out_rows_are_not_trained_on():
    """Guards a test split made of training data that the run then trains on, and one that changes between runs."""
    rows = rows_of(*map(str, range(50)))
    train, test = (hold_out(rows, 8, split)['answer'] for split in ('train', 'test'))
    assert len(test) == 8 and sorted([*train, *test], key=int) == rows['answer']
    assert test == hold_out(rows, 8, 'test')['answer'] != rows['answer'][:8]
    with pytest.raises(ValueError, match='held_out = 50 of 50 rows leaves nothing'):
        hold_out(rows, 50, 'train')


def test_an_experiment_holds_out_a_part_of_train():
    """Guards data without a test split, which could not be trained on with validation."""
    task = Arithmetic(operands=2, train_size=31, test_size=7)
    experiment = Experiment(model='none', task=task, max_prompt_length=4, max_response_length=3, held_out=5)
    tokenizer = character_tokenizer(CHARACTERS)
    train, test = (experiment.load_prompts(split, tokenizer).decode(tokenizer) for split in ('train', 'test'))
    assert len(train) == 26 and len(test) == 5 and not set(train) & set(test)
