"""The paper's mathematical data sets, from files in their schema to token ids, and back to rewards."""

import json

import datasets
import huggingface_hub
import numpy as np
import pytest

from troll_jax.data.prompts import encode_prompts
from troll_jax.data.tasks.arithmetic import Arithmetic, demonstration
from troll_jax.data.tasks.gsm8k import GSM8K
from troll_jax.data.tasks.interface import load_rows
from troll_jax.data.tasks.math_problems import BENCHMARKS, INSTRUCTION, DAPOMath, EurusMath, MathEval, MathProblems
from troll_jax.data.tasks.verl import VERL
from troll_jax.data.tokenizer import character_tokenizer

ASKED = 'Present the answer in LaTeX: \\boxed{your answer}'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')


def verl_row(data_source, question, truth, *, index=0, ability='math', system='Think first.'):
    """A row as the paper's prepared files have it, parquet or jsonl."""
    return {
        'data_source': data_source,
        'prompt': [{'role': 'system', 'content': system}, {'role': 'user', 'content': f'{question}\n\n{ASKED}'}],
        'ability': ability,
        'reward_model': {'style': 'rule', 'ground_truth': truth},
        'extra_info': {'split': 'train', 'index': index},
    }


MATH = [('math_dapo', '1 + 1?', '2'), ('math_dapo', 'Half of x?', r'\frac{x}{2}'), ('math_dapo', 'Which?', '(1, 2]')]
EVALUATION = [
    ('math_500', 'a?', r'3\sqrt{13}'),
    ('AMC', 'b?', '27.0'),
    ('AIME2024', 'c?', '204'),
    ('aime25', 'd?', '070'),
    ('OMNI-MATH', 'e?', r'\frac{1}{4}'),
    ('OLYMPIAD_BENCH', 'f?', '$2$'),
    ('MINERVA', 'g?', '1.5e-3'),
]


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == '.jsonl':
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)


def verl_rows(problems, **arguments):
    return [verl_row(*problem, index=i, **arguments) for i, problem in enumerate(problems)]


@pytest.fixture
def tasks(tmp_path):
    """Every data set from files in the schema of its own, with the form of a response that its prompts ask for."""
    write(tmp_path / 'dapo/train.parquet', verl_rows(MATH))
    write(tmp_path / 'dapo/test.parquet', verl_rows(MATH[1:]))
    code = verl_row('taco', 'Add.', json.dumps({'inputs': ['1 2'], 'outputs': ['3']}), ability='code')
    eurus = verl_rows([('numina_olympiads', 'Which k?', r'k \geq 2'), ('numina_cn_k12', 'How many?', r'50\%')])
    write(tmp_path / 'eurus/train.parquet', [code, eurus[0], code])
    write(tmp_path / 'eurus/validation.parquet', [eurus[1], code])
    write(tmp_path / 'math_eval/test.parquet', verl_rows(EVALUATION))
    write(tmp_path / 'gsm8k/train.jsonl', [{'question': '3 + 4?', 'answer': '3+4=7\n#### 7'}])
    write(tmp_path / 'gsm8k/test.jsonl', [{'question': '999 + 1?', 'answer': 'Add.\n#### 1,000'}])
    write(tmp_path / 'gsm8k_verl/train.parquet', verl_rows([('openai/gsm8k', '3 + 4?', '7')]))
    write(tmp_path / 'gsm8k_verl/test.parquet', verl_rows([('openai/gsm8k', '999 + 1?', '1,000')]))
    raw = [{'problem': f'{question}', 'answer': answer, 'level': 5} for _, question, answer in EVALUATION]
    write(tmp_path / 'raw/train.jsonl', raw)
    write(tmp_path / 'raw/test.jsonl', [{'problem': 'AIME?', 'answer': 204}])
    at = lambda name: str(tmp_path / name)
    return {
        'dapo': DAPOMath(source=at('dapo')),
        'eurus': EurusMath(source=at('eurus')),
        **{name: MathEval(source=at('math_eval'), benchmark=name) for name in BENCHMARKS},
        'gsm8k': GSM8K(source=at('gsm8k')),
        'gsm8k in verl': GSM8K(source=at('gsm8k_verl')),
        'raw': MathProblems(source=at('raw')),
        'arithmetic': Arithmetic(train_size=5, test_size=5),
    }


def test_every_task_takes_its_own_reference_for_right(tasks):
    """Guards against data whose references do not parse, or whose instruction asks for a form that is not read; and
    the whole way of a user, from files to token ids."""
    tokenizer = character_tokenizer(''.join(map(chr, [10, *range(32, 127)])))
    sizes = {}
    for name, task in tasks.items():
        for split in ('test',) if isinstance(task, MathEval) else ('train', 'test'):
            rows = task.load(split)
            prompts = encode_prompts(rows, tokenizer, max_length=211)
            sizes[name, split] = len(prompts)
            assert prompts.dropped == prompts.cut == 0
            for row, text, answer in zip(rows, prompts.decode(tokenizer), prompts.answers, strict=True):
                if name == 'arithmetic':
                    right, wrong = demonstration(row['messages'][-1]['content'], worked=True), '#'
                else:
                    assert '\\boxed' in text
                    right, wrong = rf'First, 11. So it is $\boxed{{{answer}}}$.', rf'{answer}, or \boxed{{911}}.'
                assert task.grade(right, answer) == 1.0, (name, answer)
                assert task.grade(wrong, answer) == 0.0, (name, answer)
    assert sizes == {
        **{('dapo', 'train'): 3, ('dapo', 'test'): 2, ('eurus', 'train'): 1, ('eurus', 'test'): 1},
        **{(name, 'test'): 1 for name in BENCHMARKS},
        **{(name, split): 1 for name in ('gsm8k', 'gsm8k in verl') for split in ('train', 'test')},
        **{('raw', 'train'): 7, ('raw', 'test'): 1, ('arithmetic', 'train'): 5, ('arithmetic', 'test'): 5},
    }


def test_rows_in_verls_schema(tasks):
    """Guards against an instruction given twice, a lost system message, and rows that were to be left out."""
    rows = tasks['dapo'].load('train')
    assert rows.column_names == ['messages', 'answer'] and rows['answer'][:] == [truth for *_, truth in MATH]
    assert rows[0]['messages'] == [
        {'role': 'system', 'content': 'Think first.'},
        {'role': 'user', 'content': f'1 + 1?\n\n{ASKED}'},
    ]
    assert tasks['eurus'].load('train')['answer'][:] == [r'k \geq 2']
    assert tasks['eurus'].load('test')['answer'][:] == [r'50\%']
    assert [tasks[name].load('test')['answer'][0] for name in BENCHMARKS] == [truth for *_, truth in EVALUATION]
    gsm8k = tasks['gsm8k in verl'].load('test')
    assert gsm8k['answer'][:] == ['1000'] and gsm8k[0]['messages'][1]['content'] == f'999 + 1?\n\n{ASKED}'


def test_rows_with_columns_of_their_own(tmp_path, tasks):
    assert tasks['raw'].load('test').to_list() == [
        {'messages': [{'role': 'user', 'content': f'AIME?\n\n{INSTRUCTION}'}], 'answer': '204'}
    ]
    write(tmp_path / 'mine/train.jsonl', [{'q': 'a?', 'a': '7'}])
    mine = MathProblems(source=str(tmp_path / 'mine'), question='q', answer='a', instruction=None, system_prompt='Be.')
    assert mine.load('train')[0]['messages'] == [
        {'role': 'system', 'content': 'Be.'},
        {'role': 'user', 'content': 'a?'},
    ]


@pytest.mark.parametrize('system_prompt, system', [(None, ['Think first.']), ('Be brief.', ['Be brief.']), ('', [])])
def test_a_system_prompt_takes_the_place_of_the_datas(tasks, system_prompt, system):
    """Guards against two system messages, which templates drop or refuse."""
    task = DAPOMath(source=tasks['dapo'].source, system_prompt=system_prompt)
    messages = task.load('train')[0]['messages']
    assert [m['content'] for m in messages if m['role'] == 'system'] == system
    assert messages[-1]['role'] == 'user' and len(messages) == len(system) + 1


GOOD = verl_row('math_dapo', 'a?', '7')
TRUTH = r"row 1 of '.*train.jsonl' is {}; expected \{{style, ground_truth}} with a ground_truth that is text"
PROMPT = r"row 1 of '.*train.jsonl' is {}; expected a list of \{{role, content}}"


@pytest.mark.parametrize(
    'change, message',
    [
        ({'reward_model': {'style': 'rule', 'ground_truth': ' '}}, TRUTH.format(r"\{'style'.*' '}")),
        ({'reward_model': {'style': 'rule'}}, TRUTH.format(r"\{'style': 'rule'}")),
        ({'reward_model': None}, TRUTH.format('None')),
        ({'prompt': []}, PROMPT.format(r'\[]')),
        ({'prompt': None}, PROMPT.format('None')),
        ({'prompt': [{'role': 'user', 'content': ''}]}, PROMPT.format(".*''}]")),
        ({'prompt': [{'role': 'human', 'content': 'a?'}]}, PROMPT.format('.*human.*')),
        ({'prompt': [{'content': 'a?'}]}, PROMPT.format(r"\[{'content': 'a\?'}]")),
    ],
)
def test_a_row_that_is_not_as_it_should_be_is_named(tmp_path, change, message):
    """Guards against training on an empty prompt or against an empty answer; the code rows before it do not count."""
    write(tmp_path / 'data/train.jsonl', [{**GOOD, 'ability': 'code'}, {**GOOD, **change}])
    with pytest.raises(ValueError, match=message):
        MathProblems(source=str(tmp_path / 'data'), ability='math').load('train')


def test_other_types_are_errors(tmp_path):
    """Guards against numbers or text where verl has text and lists, which other preparations of the data have."""
    for change, message in [
        ({'reward_model': {'style': 'rule', 'ground_truth': True}}, 'is {.*: True}; expected'),
        ({'reward_model': {'style': 'rule', 'ground_truth': ['7', '8']}}, "is {.*'8']}; expected"),
        ({'reward_model': '7'}, "is '7'; expected"),
        ({'prompt': 'a?'}, "is 'a\\?'; expected a list"),
        ({'prompt': [{'role': 'user', 'content': 7}]}, "'content': 7}]; expected"),
    ]:
        write(tmp_path / 'data/train.jsonl', [{**GOOD, **change}])
        with pytest.raises(ValueError, match=message):
            MathProblems(source=str(tmp_path / 'data')).load('train')


@pytest.mark.parametrize('truth, answer', [(7, '7'), (0.5, '0.5'), (['7'], '7'), ([7], '7')])
def test_ground_truths_of_other_preparations(tmp_path, truth, answer):
    """Guards numbers and lists of one, which other preparations of the same data have; and `Math` for `math`."""
    row = {**GOOD, 'reward_model': {'style': 'rule', 'ground_truth': truth}, 'ability': 'Math'}
    write(tmp_path / 'data/train.jsonl', [row])
    assert MathProblems(source=str(tmp_path / 'data'), ability='math').load('train')['answer'] == [answer]


def test_of_several_files_the_right_one_is_named(tmp_path):
    write(tmp_path / 'data/train-0.parquet', [GOOD] * 3)
    write(tmp_path / 'data/train-1.parquet', [GOOD, verl_row('math_dapo', 'b?', '')])
    with pytest.raises(ValueError, match="row 1 of '.*train-1.parquet'"):
        MathProblems(source=str(tmp_path / 'data')).load('train')


def test_missing_columns_and_rows_are_errors(tmp_path, tasks):
    write(tmp_path / 'data/train.jsonl', [{'problem': 'a?', 'result': '7'}])
    write(tmp_path / 'data/test.jsonl', [{'problem': 'a?', 'answer': None}])
    raw = MathProblems(source=str(tmp_path / 'data'))
    with pytest.raises(
        ValueError, match=r"train.jsonl' has no column \['answer or solution'\]; got \['problem', 'result'\]"
    ):
        raw.load('train')
    with pytest.raises(ValueError, match="'answer' in row 0 of '.*test.jsonl' is None; expected"):
        raw.load('test')
    with pytest.raises(ValueError, match='expected the schema of verl'):
        EurusMath(source=raw.source, test_split='test').load('train')
    with pytest.raises(ValueError, match=r"No row has ability 'chess'; got \['math'\]"):
        DAPOMath(source=tasks['dapo'].source, ability='chess').load('train')
    with pytest.raises(ValueError, match=r"No row has data_source .*; got \['math_dapo'\]"):
        MathEval(source=tasks['dapo'].source, benchmark='AMC').load('test')
    write(tmp_path / 'bare/train.jsonl', [{name: GOOD[name] for name in ('prompt', 'reward_model')}])
    with pytest.raises(ValueError, match="has no column 'ability'"):
        EurusMath(source=str(tmp_path / 'bare')).load('train')
    assert len(MathProblems(source=str(tmp_path / 'bare')).load('train')) == 1
    with pytest.raises(ValueError, match='benchmark is .*; expected one of'):
        MathEval(benchmark='AIME')
    with pytest.raises(ValueError, match='places is'):
        DAPOMath(places=('box',))


def test_a_folder_of_the_hub_is_asked_for(monkeypatch):
    """Guards the ids that are the defaults; there is no network here, so what is asked of `datasets` is looked at."""
    asked = []

    def load_dataset(*arguments, **named):
        asked.append((*arguments, named['data_dir'], named['split']))
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    DAPOMath().load('train')
    EurusMath().load('test')
    load_rows('openai/gsm8k', 'test', VERL, config='main')
    assert asked == [
        ('philippbecker/troll_data', None, None, 'train'),
        ('PRIME-RL/Eurus-2-RL-Data', None, None, 'validation'),
        ('openai/gsm8k', 'main', None, 'test'),
    ]


def test_another_layout_than_was_assumed_is_listed(monkeypatch, tmp_path):
    """Guards an error that leaves a user to guess how somebody else has named files, columns or sets."""
    monkeypatch.setattr(huggingface_hub.HfApi, 'list_repo_files', lambda *_, **__: ['eval/amc.parquet', 'dapo.parquet'])
    with pytest.raises(ValueError, match=r"has the files \['dapo.parquet', 'eval/amc.parquet'\] on the hub"):
        MathEval().load('test')
    write(tmp_path / 'data/eval.parquet', [GOOD])
    with pytest.raises(ValueError, match=r"No file matches .*test\*'.* has \['eval.parquet'\]. .*test_split"):
        MathEval(source=str(tmp_path / 'data')).load('test')
    assert MathEval(source=str(tmp_path / 'data'), test_split='eval', data_source='').load('test')['answer'] == ['7']


@pytest.mark.parametrize(
    'name', ['HuggingFaceH4/MATH-500', 'math500', 'MATH_500', 'lighteval/MATH-500', 'Minerva_MATH500']
)
def test_names_of_math500(tmp_path, name):
    """Guards the name that verl gives it, and another benchmark on the same problems."""
    write(tmp_path / 'data/test.jsonl', [verl_row(name, 'a?', '7'), verl_row('AMC', 'b?', '8')])
    task = MathEval(source=str(tmp_path / 'data'), benchmark='Minerva' if 'Minerva' in name else 'MATH500')
    assert task.load('test')['answer'] == ['7']
    if 'Minerva' in name:
        with pytest.raises(ValueError, match='No row has data_source'):
            MathEval(source=str(tmp_path / 'data')).load('test')


def test_places_reach_the_grading():
    """Guards an argument that nothing reads."""
    assert DAPOMath(places=('boxed',)).grade('Answer: 7', '7') == 0.0
    assert DAPOMath(places=('boxed', 'Answer:')).grade('Answer: 7', '7') == 1.0
    assert GSM8K(places=('####',)).grade(r'\boxed{7}', '7') == 0.0


def test_long_prompts_of_a_data_set(tmp_path):
    """Guards the count that is logged, and that what is kept of a cut prompt still asks for the answer's form."""
    problems = [('math_dapo', question, '7') for question in ('a?', 'So ' * 40 + 'b?', 'c?')]
    write(tmp_path / 'data/train.parquet', verl_rows(problems))
    rows = MathProblems(source=str(tmp_path / 'data')).load('train')
    tokenizer = character_tokenizer(''.join(map(chr, [10, *range(32, 127)])))
    dropped = encode_prompts(rows, tokenizer, max_length=79)
    assert (len(dropped), dropped.dropped, dropped.cut) == (2, 1, 0)
    cut = encode_prompts(rows, tokenizer, max_length=79, long_prompts='cut')
    assert (len(cut), cut.dropped, cut.cut) == (3, 0, 1)
    shorter = cut.decode(tokenizer)[1]
    assert shorter.startswith('Think first.') and shorter.endswith(f'So b?\n\n{ASKED}')
    np.testing.assert_array_equal(cut.lengths, [len('Think first.') + len(f'a?\n\n{ASKED}'), 79, cut.lengths[0]])
