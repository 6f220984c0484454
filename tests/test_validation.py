"""Evaluation as a user starts it: of runs, checkpoints and models, on several sets; and comparing two of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from loop import settings
from tiny import save_qwen3

import experiments.compare_evaluations
import experiments.evaluate
from experiments.compare_evaluations import compare, compare_seeds, find_responses, read_success
from experiments.export import export
from experiments.plumbing import validation
from experiments.plumbing.gin_files import Config
from experiments.train import train
from troll_jax.checkpoint import Checkpoints
from troll_jax.data.tasks.arithmetic import CHARACTERS
from troll_jax.data.tasks.math_problems import MathProblems
from troll_jax.data.tokenizer import character_tokenizer
from troll_jax.evaluate import Evaluation
from troll_jax.experiment import Experiment
from troll_jax.metrics import read_metrics
from troll_jax.rewards.worker import CannotGrade

REPOSITORY = Path(__file__).parent.parent
FILES = [str(REPOSITORY / 'configs/quickstart.gin'), str(REPOSITORY / 'configs/objectives/troll.gin')]
PROBLEMS = 7  # of the second set


class OddLength(MathProblems):
    """Rewards what random weights do half of the time."""

    def grade(self, response: str, answer: str) -> float:
        return float(sum(map(ord, response)) % 2)


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> str:
    """Random weights, and so responses of all kinds."""
    folder = tmp_path_factory.mktemp('model')
    tokenizer = character_tokenizer(CHARACTERS)
    save_qwen3(folder, tokenizer, seed=3, num_hidden_layers=1, initializer_range=0.5)
    return str(folder)


@pytest.fixture(scope='module')
def bindings(tmp_path_factory) -> list[str]:
    """A small experiment that is evaluated on two sets: another task, greedy, and its own, with three samples."""
    folder = tmp_path_factory.mktemp('problems')
    for split, count in [('train', 2 * PROBLEMS + 2), ('test', PROBLEMS)]:
        rows = [{'problem': f'{i % 10}+{1 + (split == "train")}=', 'answer': str(i)} for i in range(count)]
        (folder / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return [
        'Arithmetic.operands = 2',
        'import test_validation',
        'Experiment.task = @OddLength()',
        'Arithmetic.train_size = 60',
        'Arithmetic.test_size = 11',
        f"OddLength.source = '{folder}'",
        'OddLength.instruction = None',
        'OddLength.deadline = None',
        "Experiment.validation = [('modulo', @Arithmetic(), 1), ('sums', @OddLength(), 3)]",
        'Experiment.validation_top_p = 0.5',
        'Experiment.max_prompt_length = 4',
        'Experiment.max_response_length = 5',
    ]


TRAINING = [
    'Run.steps = 1',
    'Sampling.prompts_per_step = 16',
    'Sampling.samples_per_prompt = 4',
    'Run.evaluate_every = 1',
    'adamw.learning_rate = 1e-2',
]


@pytest.fixture(scope='module')
def run_dir(model, bindings, tmp_path_factory) -> Path:
    """A run of one step, whose start model is gone."""
    folder = tmp_path_factory.mktemp('run')
    start = shutil.copytree(model, folder / 'start')
    train(*settings(FILES, [*bindings, *TRAINING, f"Experiment.model = '{start}'", f"Run.folder = '{folder / 'run'}'"]))
    shutil.rmtree(start)
    return folder / 'run'


def evaluate(monkeypatch, *arguments: str) -> None:
    """The command."""
    monkeypatch.setattr('sys.argv', ['evaluate', *map(str, arguments)])
    experiments.evaluate.main()


def read(folder: Path, name: str):
    text = (folder / name).read_text()
    return json.loads(text) if name.endswith('.json') else [json.loads(line) for line in text.splitlines()]


def test_training_evaluates_every_set(run_dir):
    """Guards a set that is loaded and not used, and a mean that large sets dominate."""
    for row in read_metrics(run_dir / 'metrics.jsonl'):
        of_sets = [row['eval/modulo/success'], row['eval/sums/success']]
        assert row['eval/success'] == pytest.approx(np.mean(of_sets))
        assert of_sets[0] * 11 == pytest.approx(round(of_sets[0] * 11))
        assert of_sets[1] * 3 * PROBLEMS == pytest.approx(round(of_sets[1] * 3 * PROBLEMS))
        assert row['eval/response_length'] > 0


def test_a_run_is_evaluated_on_every_set(run_dir, monkeypatch, capsys):
    """Guards responses of one set under the name of another, a number of samples that a set does not ask for, and an
    evaluation that wants more than the run's folder."""
    evaluate(monkeypatch, run_dir)
    names = ('modulo_1', 'sums_3')
    modulo, sums = (read(run_dir, f'responses_1_{name}_top_p_0.5.jsonl') for name in names)
    assert [len(modulo), len(sums)] == [11, PROBLEMS] and [row['prompt'] for row in sums] == [
        f'{i}+1=' for i in range(PROBLEMS)
    ]
    assert {len(row['responses']) for row in modulo} == {1} and {len(row['responses']) for row in sums} == {3}
    assert any(len(set(row['responses'])) > 1 for row in sums), 'several samples are drawn'
    summary = read(run_dir, 'evaluation_1_sums_3_top_p_0.5.json')
    assert (summary['temperature'], summary['problems'], summary['step']) == (1.0, PROBLEMS, 1)
    greedy = read(run_dir, 'evaluation_1_modulo_1_top_p_0.5.json')
    assert (greedy['temperature'], greedy['top_p'], summary['top_p']) == (0.0, None, 0.5)
    means = [read(run_dir, f'evaluation_1_{name}_top_p_0.5.json')['success']['mean'] for name in names]
    assert read(run_dir, 'evaluation_1_mean_top_p_0.5.json')['success']['mean'] == pytest.approx(np.mean(means))
    assert means[1] == pytest.approx(np.mean([np.mean(row['rewards']) for row in sums])) and 0 < means[1] < 1
    logged = read_metrics(run_dir / 'metrics.jsonl')[-1]
    # Of one seed: what training sampled, at the same temperature and top_p.
    assert [logged['eval/modulo/success'], logged['eval/sums/success']] == pytest.approx(means)
    assert 'sums' in capsys.readouterr().out


def test_a_checkpoint_a_bucket_and_an_export_are_the_run(run_dir, model, bindings, tmp_path, monkeypatch):
    """Guards the three other ways to name parameters: every one finds the same, and needs what it says it needs."""
    one_set = "Experiment.validation = [('sums', @OddLength(), 3)]"
    evaluate(monkeypatch, run_dir, one_set, 'evaluation.seed = 5')
    everything = [
        'Experiment.validation_temperature = 0.7',
        'evaluation.top_p = 1.0',
        f"evaluation.folder = '{tmp_path}'",
    ]
    evaluate(monkeypatch, run_dir, one_set, *everything)
    summary = read(tmp_path, 'evaluation_1_sums_3_temperature_0.7_top_p_1.0.json')
    assert (summary['temperature'], summary['top_p']) == (0.7, 1.0)
    expected = read(run_dir, 'responses_1_sums_3_top_p_0.5_seed_5.jsonl')
    assert expected != read(run_dir, 'responses_1_sums_3_top_p_0.5.jsonl'), 'the seed was meant to matter'

    def found(source, *arguments, step=1) -> list[dict]:
        to = ['evaluation.seed = 5', f"evaluation.folder = '{tmp_path}/results'"]
        arguments = [argument for argument in arguments if not argument.startswith('Arithmetic.')]
        evaluate(monkeypatch, source, *arguments, one_set, *to)
        return read(tmp_path / 'results', f'responses_{step}_sums_3_top_p_0.5_seed_5.jsonl')

    assert found(run_dir / 'checkpoints/1') == expected
    # Checkpoints alone: sizes and tokenizer are those of a model that gin names.
    shutil.copytree(run_dir / 'checkpoints', tmp_path / 'bucket/checkpoints')
    shutil.rmtree(tmp_path / 'results')
    assert found(tmp_path / 'bucket', *FILES, *bindings, f"Experiment.model = '{model}'") == expected
    # A model in Hugging Face format: what the run exports, with what it was configured to do.
    export(str(run_dir), str(tmp_path / 'exported'))
    assert found(tmp_path / 'exported', *FILES, *bindings, step=0) == expected
    # It is not the model that the run started from.
    assert found(model, *FILES, *bindings, step=0) != expected


@pytest.mark.parametrize('binding', ['Run.steps = 5', 'GSM8K.deadline = 2.0', 'troll.bound = 0.1'])
def test_a_binding_that_nothing_reads_is_an_error(run_dir, monkeypatch, binding):
    """Guards an evaluation of something else than was meant; what the run has bound for its training is no matter, and
    how it decodes is read."""
    monkeypatch.setattr('troll_jax.experiment.Sampler', None)
    monkeypatch.setattr(Checkpoints, 'restore_params', None)
    with pytest.raises(ValueError, match=f'reads {binding.split()[0]!r}: it would change nothing'):
        evaluate(monkeypatch, run_dir, 'Compute.slots = 8', binding)


@pytest.mark.parametrize(
    ('source', 'settings', 'message'),
    [
        ('runs/typo', [], 'no folder here, so it would be the id of a model'),
        ('./typo', FILES, r"'./typo' is neither a run \(with config.gin\).*has \['results'\]"),
        ('some/run/typo', FILES, 'neither a run'),
        ('results', FILES, r"'results' is neither a run.*results' has \['notes'\]"),
    ],
)
def test_what_cannot_be_evaluated_is_said(source, settings, message, tmp_path, monkeypatch):
    """Guards a mistyped folder that is taken for a model's id, and then for an incomplete configuration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'results').mkdir()
    (tmp_path / 'results/notes').touch()
    with pytest.raises(ValueError, match=message):
        evaluate(monkeypatch, source, *settings)


def test_a_set_is_written_when_it_is_done(run_dir, monkeypatch, tmp_path):
    """Guards hours of work on the first sets that are lost with what goes wrong in a later one."""

    def one_set(sampler, params, prompts, grader, tokenizer, *_, **__):
        if len(prompts) == PROBLEMS:
            raise RuntimeError('the service is down')
        ones = np.ones((len(prompts), 1), np.float32)
        return Evaluation(prompts.decode(tokenizer), prompts.answers, ones, ones, ones, [['#']] * len(prompts))

    monkeypatch.setattr(validation, 'evaluate', one_set)
    with pytest.raises(RuntimeError, match='the service is down'):
        evaluate(monkeypatch, run_dir, f"evaluation.folder = '{tmp_path}'")
    assert read(tmp_path, 'evaluation_1_modulo_1_top_p_0.5.json')['success']['mean'] == 1


def test_the_log_and_the_files_count_the_same_as_success(run_dir, monkeypatch, tmp_path, capsys):
    """Guards rewards that are shares, of which a mean in the log was called success and files said otherwise."""

    def one_set(sampler, params, prompts, grader, tokenizer, *_, **__):
        rewards = np.tile(np.float32([1.0, 0.5]), len(prompts))[: len(prompts), None]
        return Evaluation(prompts.decode(tokenizer), prompts.answers, rewards, rewards, rewards, [['#']] * len(prompts))

    monkeypatch.setattr(validation, 'evaluate', one_set)
    evaluate(monkeypatch, run_dir, f"evaluation.folder = '{tmp_path}'")
    summary = read(tmp_path, 'evaluation_1_sums_1_top_p_0.5.json')
    correct = (PROBLEMS + 1) // 2 / PROBLEMS
    assert (
        summary['success']['mean'] == summary['mean@1']['mean'] == summary['pass@1']['mean'] == pytest.approx(correct)
    )
    assert summary['reward']['mean'] == pytest.approx(correct + (1 - correct) / 2)
    assert f'sums: {correct:.4f}' in capsys.readouterr().err
    assert read_success(tmp_path / 'responses_1_sums_1_top_p_0.5.jsonl').success.mean() == pytest.approx(correct)


def test_programs_need_a_sandbox_before_a_model_is_loaded(model, tmp_path, monkeypatch):
    """Guards minutes of loading before that error, and a sandbox that is asked for where no program will run."""
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setattr('troll_jax.experiment.load_pretrained', None)
    code = ['Experiment.task = @EurusCode()', f"EurusCode.source = '{tmp_path}'", f"Experiment.model = '{model}'"]
    built = experiment, *_, compute, _ = settings(FILES, [*code, f"Run.folder = '{tmp_path / 'run'}'"])
    assert experiment.decoder_config(compute).layers == 1  # all that planning asks for
    with pytest.raises(CannotGrade, match='apt install bubblewrap'):
        train(*built)
    with pytest.raises(CannotGrade, match='apt install bubblewrap'):
        evaluate(monkeypatch, model, *FILES, *code[:2])


def test_a_checkpoint_that_is_not_there_is_an_error(run_dir, monkeypatch):
    with pytest.raises(ValueError, match=r'no checkpoint of step 5 in .*; there are \[1\]'):
        evaluate(monkeypatch, run_dir / 'checkpoints/5')


def test_the_benchmarks_of_the_paper(monkeypatch):
    """Guards the paper's protocol, and a source that only one of the seven would read."""
    config = Config([*FILES, REPOSITORY / 'configs/data/math_eval.gin'], ["MathEval.source = 'there'"])
    sets = config.build(Experiment).validation
    assert {name: samples for name, _, samples in sets} == {
        'MATH500': 1,
        'AMC': 32,
        'AIME24': 32,
        'AIME25': 32,
        'OMNI-MATH': 1,
        'OlympiadBench': 1,
        'Minerva': 1,
    }
    for name, task, _ in sets:
        assert (task.benchmark, task.source) == (name, 'there')


@pytest.mark.parametrize(
    ('validation', 'message'),
    [
        ("[('a', @Arithmetic(), 1), ('a', @Arithmetic(), 2)]", "names the sets \\['a', 'a'\\]"),
        ("[('a/b', @Arithmetic(), 1)]", 'of letters, digits'),
        ("[('mean', @Arithmetic(), 1)]", "not 'mean'"),
        ("[('a', @Arithmetic(), 0)]", "0 samples of 'a'"),
        ('[]', 'at least one'),
        ('None\nExperiment.validation_top_p = 0.9', 'changes nothing for greedy samples'),
    ],
)
def test_sets_that_cannot_be_evaluated_are_an_error(validation, message):
    """Guards files of results that overwrite each other, and a mean of nothing."""
    config = Config(FILES, [f'Experiment.validation = {validation}'])
    with pytest.raises(ValueError, match=message):
        config.build(Experiment)


def write_responses(folder: Path, name: str, rewards, answers=None) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [
        {
            'prompt': '?',
            'answer': str(i) if answers is None else answers[i],
            'responses': [],
            'rewards': list(of_problem),
        }
        for i, of_problem in enumerate(rewards)
    ]
    (folder / name).write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return folder / name


# Eight problems, of which B solves all that A does and two more; and three with two samples each.
A = [[1], [1], [1], [1], [0], [0], [0], [0]]
B = [[1], [1], [1], [1], [1], [1], [0], [0]]
A2, B2 = [[1, 0], [0, 0], [1, 1]], [[1, 1], [0, 0], [0, 1]]


def test_a_comparison_by_hand(tmp_path):
    """Guards signs, pairs and shares; and the paired interval, whose spread is that of the differences."""
    row = compare(write_responses(tmp_path, 'a.jsonl', A), write_responses(tmp_path, 'b.jsonl', B))['b']
    assert (row['problems'], row['a_better'], row['b_better']) == (8, 0, 2)
    assert (row['a'].mean, row['b'].mean, row['difference'].mean) == (0.5, 0.75, 0.25)
    half = 2.36462 * np.sqrt((8 / 7 * 0.25 * 0.75 + 1 / 8) / 8)  # Student's t with 7 degrees, and one answer more
    np.testing.assert_allclose(row['difference'][1:], [0.25 - half, 0.25 + half], atol=1e-5)
    # If B were another model on other problems, the difference would have the spread of two independent means.
    many = compare(write_responses(tmp_path, 'c.jsonl', 10 * A), write_responses(tmp_path, 'd.jsonl', 10 * B))['d']
    unpaired = np.hypot(*(many[model].high - many[model].low for model in 'ab'))
    assert many['difference'].high - many['difference'].low < 0.75 * unpaired


def test_folders_are_compared_set_by_set(tmp_path):
    """Guards pairs of sets with other samples or of older steps, and a mean that weighs problems alike."""
    a, b = tmp_path / 'a', tmp_path / 'b'
    for folder, one, other in [(a, A, A2), (b, B, B2)]:
        write_responses(folder, 'responses_9_one_set_1.jsonl', one)
        write_responses(folder, 'responses_9_other_2.jsonl', other)
    write_responses(a, 'responses_10_one_set_1.jsonl', B)
    write_responses(b, 'responses_9_one_set_4.jsonl', [[1] * 4] * 8)
    assert [file.name for file in find_responses(a).values()] == ['responses_10_one_set_1.jsonl'], (
        'one step, the latest'
    )
    none = compare(a, b)['one_set_1']['difference']
    assert none.mean == 0 and none.high == -none.low < 0.4
    rows = compare(a, b, step_a=9)
    assert compare(a, b, step_a=9, sets=['other_2']) == {'other_2': rows['other_2']}
    assert list(rows) == ['one_set_1', 'other_2', 'mean']
    assert (rows['other_2']['a_better'], rows['other_2']['b_better']) == (1, 1)
    assert rows['other_2']['difference'].mean == 0.0
    assert rows['mean']['difference'].mean == pytest.approx((0.25 + 0) / 2)
    with pytest.raises(ValueError, match=r'no responses of step 3 in .*, which has steps \[9, 10\]'):
        compare(a, b, step_a=3)
    with pytest.raises(ValueError, match=r"not all of \['third_1'\] in common: .* has \['one_set_1'"):
        compare(a, b, step_a=9, sets=['third_1'])


@pytest.mark.parametrize('other', ['one_set_4', 'one_set_1_seed_5', 'two_1_temperature_0.5_top_k_7', 'train_1'])
def test_evaluations_that_were_not_made_alike_have_no_mean(tmp_path, other):
    """Guards a mean in which one set counts twice, or greedy responses are mixed with those of some temperature."""
    for folder in (a := tmp_path / 'a', b := tmp_path / 'b'):
        for name in ('one_set_1', other):
            write_responses(folder, f'responses_9_{name}.jsonl', A)
    with pytest.raises(ValueError, match=rf"not made alike .*'{other}'.*Choose with --sets"):
        compare(a, b)
    assert list(compare(a, b, sets=[other])) == [other]


def test_other_problems_are_an_error(tmp_path):
    """Guards pairs of problems that have nothing to do with each other."""
    a = write_responses(tmp_path, 'a.jsonl', A)
    swapped = write_responses(tmp_path, 'b.jsonl', B, answers=['0', '1', '3', '2', '4', '5', '6', '7'])
    with pytest.raises(ValueError, match='the answers of problem 2 differ'):
        compare(a, swapped)
    with pytest.raises(ValueError, match='8 and 7, one has more'):
        compare(a, write_responses(tmp_path, 'c.jsonl', B[:7]))


def test_runs_with_several_seeds_are_one_comparison(tmp_path, monkeypatch, capsys):
    """Guards an interval over problems alone where runs of a method differ by more than methods do."""
    for seed, of_b in enumerate([B, A]):
        write_responses(tmp_path / f'a_{seed}', 'responses_9_one_set_1.jsonl', A)
        write_responses(tmp_path / f'b_{seed}', 'responses_9_one_set_1.jsonl', of_b)
    rows = [compare(tmp_path / f'a_{seed}', tmp_path / f'b_{seed}') for seed in range(2)]
    merged = compare_seeds(rows)['one_set_1']
    assert (merged['problems'], merged['b_better'], merged['difference'].mean) == (8, 2, 0.125)
    of_problems = np.mean([row['one_set_1']['difference'].high - row['one_set_1']['difference'].mean for row in rows])
    seeds = 12.7062 * 0.125  # Student's t with one degree, times half of the difference of the two
    np.testing.assert_allclose(merged['difference'].high, 0.125 + np.hypot(of_problems, seeds), rtol=1e-5)
    assert compare_seeds(rows[:1]) == rows[0]
    sides = [str(tmp_path / f'{side}_{{seed}}') for side in 'ab']
    monkeypatch.setattr('sys.argv', ['compare_evaluations', *sides, '--seeds', '0', '1'])
    experiments.compare_evaluations.main()
    assert '+0.125 [-1.' in capsys.readouterr().out
    monkeypatch.setattr('sys.argv', ['compare_evaluations', 'a', 'b', '--seeds', '0', '1'])
    with pytest.raises(ValueError, match=r'expected \{seed\} in both of them with --seeds'):
        experiments.compare_evaluations.main()
