"""Configurations: nothing mistyped is dropped silently, every file is complete, and the paper's values are there."""

import dataclasses
import functools
import pickle
import re
from pathlib import Path

import numpy as np
import optax
import pytest
from transformers import Qwen3Config

from experiments.evaluate import evaluation
from experiments.plumbing.command import read_command_line
from experiments.plumbing.gin_files import Config
from experiments.plumbing.gin_text import own_code, to_bindings, to_gin
from experiments.plumbing.names import NAMES, SETTINGS
from experiments.warm_start import warm_start
from troll_jax.data.tasks.arithmetic import CHARACTERS, Arithmetic
from troll_jax.data.tasks.math_problems import BENCHMARKS
from troll_jax.data.tokenizer import character_tokenizer
from troll_jax.experiment import Experiment
from troll_jax.ops.advantages import gae, group_normalised
from troll_jax.ops.aggregation import token_mean
from troll_jax.ops.importance import truncated_importance
from troll_jax.ops.losses import LossInputs, LossOutputs, ppo_clip, troll
from troll_jax.ops.regularisers import entropy_bonus, kl_to_reference
from troll_jax.ops.support import bucket_tail, default_tail
from troll_jax.optimizer import adamw
from troll_jax.settings import Compute, Method, Run, Sampling

CONFIGS = Path(__file__).parent.parent / 'configs'
FILES = sorted(CONFIGS.rglob('*.gin'))
COMPLETE = [file for file in FILES if '\nRun.folder = ' in file.read_text()]
PAPER = [CONFIGS / f'qwen3_0_6b_gsm8k_{method}.gin' for method in ('troll', 'clip')]

named = lambda file: file.stem


METHODS = sorted(CONFIGS.glob('objectives/*.gin'))


def build(files, bindings=(), kinds=SETTINGS) -> list:
    config = Config(files, bindings)
    return [config.build(kind) for kind in kinds]


@pytest.mark.parametrize(
    'binding, match',
    [
        ('Rum.steps = 3', r"'Rum'[\s\S]*Did you mean 'Run'\?"),
        ('Run.step = 3', r"'Run' has no parameter 'step'[\s\S]*Did you mean 'steps'\?"),
        ('Experiment.modle = "m"', r"Did you mean 'model'\?"),
        ('adamw.learning_rte = 1e-3', r"Did you mean 'learning_rate'\?"),
        ('Method.objective = @trol', r"'trol'[\s\S]*Did you mean 'troll'\?"),
        ('Method.optimizer = @adam', r"'adam'[\s\S]*Did you mean 'adamw'\?"),
        ("AMC.sorce = 'data'", r"Did you mean 'source'\?"),
        ("AMC.benchmark = 'MATH500'", r"'AMC' has no parameter 'benchmark'[\s\S]*It has: .*data_source, .*source"),
        ("MathEval.data_source = 'amc'", r"'MathEval' has no parameter 'data_source'"),
        ("MathEval.sorce = 'data'", r"Did you mean 'source'\?"),
        ('Run.steps = %steps', 'nothing defines the macro %steps'),
        ('Run.steps = ', 'cannot be read'),
        ('Run.steps =  3 4', 'cannot be read'),
        ('macro.steps = 3', "nothing is called 'macro'"),
        ('adamw.b1 = @adamw', '@adamw is one of its own settings'),
        ('import no_such_module', "cannot import 'no_such_module'"),
        ("include 'configs/no_such.gin'", "no configuration file 'configs/no_such.gin'"),
    ],
)
def test_a_mistyped_binding_is_an_error(binding, match):
    """Guards against knobs that are set and never read; the error names the nearest that there is."""
    with pytest.raises(ValueError, match=match):
        Config([], [binding])


@pytest.mark.parametrize(
    'binding, meant',
    [
        ('alpha = 0.1', "'troll.alpha' or 'Lora.alpha'?"),
        ('checkpoint_evry = 5', "'Run.checkpoint_every'?"),
        ('learning_rate = 1', "'adamw.learning_rate' or 'warm_start.learning_rate'?"),
    ],
)
def test_a_parameter_without_its_owner_is_an_error(binding, meant):
    """Guards against gin taking it for the definition of a macro, which nothing uses and nobody misses."""
    with pytest.raises(ValueError) as error:
        Config(['quickstart', 'troll'], [binding], [warm_start])
    assert str(error.value) == f'nothing uses the macro {binding.split()[0]!r}.\nDid you mean {meant}'


def test_a_macro_that_is_used_is_not():
    bindings = ['rate = 3', 'Run.steps = %rate', 'learning_rate = 0.5', 'adamw.learning_rate = %learning_rate']
    config = Config([], [*bindings, 'Method.optimizer = @adamw'])
    assert config.get('Run.steps') == 3
    assert config.get('Method.optimizer').keywords == {'learning_rate': 0.5}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no configuration file '.*none.gin'"):
        Config([tmp_path / 'none.gin'])


def test_bindings_win_over_files_and_files_over_what_they_include(tmp_path):
    """Guards the order that lets one experiment change one number of another."""
    (tmp_path / 'mine.gin').write_text("include 'configs/paper.gin'\nRun.steps = 7\ntroll.bound = 0.1\n")
    config = Config([tmp_path / 'mine.gin'], ['troll.bound = 0.25'])
    assert [config.get(name) for name in ('Run.steps', 'troll.bound', 'Sampling.support_size')] == [7, 0.25, 64]


def test_a_file_that_includes_itself_is_an_error(tmp_path):
    """Guards a recursion without end."""
    (tmp_path / 'mine.gin').write_text(f"include '{tmp_path}/mine.gin'\n")
    with pytest.raises(ValueError, match='mine.gin includes itself'):
        Config([tmp_path / 'mine.gin'])


def test_a_scope_is_of_one_use_alone():
    """Guards a critic that learns at the policy's rate, or takes over what is bound of the policy's optimizer; and
    bindings of a scope that nothing refers to."""
    bindings = ['adamw.b2 = 0.99', 'adamw.learning_rate = 1e-3', 'critic/adamw.learning_rate = 1e-4']
    bindings += ['Method.optimizer = @adamw', 'Critic.optimizer = @critic/adamw']
    config = Config([], bindings)
    assert config.get('Method.optimizer').keywords == {'b2': 0.99, 'learning_rate': 1e-3}
    assert config.get('Critic.optimizer').keywords == {'learning_rate': 1e-4}
    config = Config([CONFIGS / 'critic.gin'], ['Critic.optimizer = @adamw', 'critic/adamw.b2 = 0.9'])
    assert config.get('Critic.optimizer') is adamw  # files may bind what is not used, the command line may not
    with pytest.raises(ValueError, match="reads 'critic/adamw.b2'"):
        config.check_used()


@pytest.mark.parametrize('file', FILES, ids=named)
def test_every_file_parses_from_any_folder(file, tmp_path, monkeypatch):
    """Guards against a name that was changed in the code only, and an include that the working folder decides."""
    monkeypatch.chdir(tmp_path)
    Config([file], commands=[warm_start])


def test_there_are_files():
    """Guards the tests below against a list that is empty."""
    assert [named(file) for file in COMPLETE] == [
        'qwen3_0_6b_gsm8k_clip',
        'qwen3_0_6b_gsm8k_troll',
    ]


@pytest.mark.parametrize('file', COMPLETE, ids=named)
def test_every_experiment_is_complete(file):
    """Guards against a run that fails, after minutes of loading, on a parameter that its file forgot."""
    experiment, _, method, compute, run = build([file])
    assert run.folder and compute.mesh.size == 8 and callable(experiment.task.grade)
    assert method.objective.func is (troll if 'troll' in file.stem else ppo_clip)


@pytest.mark.parametrize('file', METHODS, ids=named)
def test_a_task_and_a_method_are_an_experiment(file, monkeypatch):
    """Guards a method that leaves something to whatever came before it, and two methods in one folder."""
    config = Config([file])
    assert all(config.get(f'Method.{name}') for name in ('objective', 'aggregation', 'advantages'))
    monkeypatch.setattr('sys.argv', ['train', str(CONFIGS / 'quickstart.gin'), 'Run.steps = 3', str(file)])
    config = read_command_line('')
    *_, run = (config.build(kind) for kind in SETTINGS)
    assert (run.folder, run.steps) == (f'runs/quickstart_{file.stem}', 3)


def test_files_and_bindings_may_name_the_folder(monkeypatch):
    """Guards against a default that wins over what somebody wrote."""
    for arguments, folder in [
        (['quickstart', 'data/dapo', 'troll'], 'runs/quickstart_dapo_troll'),
        (['qwen3_0_6b_gsm8k_clip'], 'runs/qwen3_0_6b_gsm8k_clip'),
        (["Run.folder = 'mine'", 'qwen3_0_6b_gsm8k_clip'], 'mine'),
    ]:
        monkeypatch.setattr('sys.argv', ['train', *arguments])
        assert read_command_line('').get('Run.folder') == folder


@pytest.mark.parametrize('file', COMPLETE, ids=named)
def test_two_experiments_of_a_comparison_differ_in_the_objective_alone(file):
    """Guards against a comparison in which one side has the better learning rate."""

    def settings(file):
        experiment, sampling, method, compute, run = build([file])
        same = dataclasses.replace(method, objective=ppo_clip), dataclasses.replace(run, folder='')
        return to_gin(experiment, sampling, compute, *same)

    other = file.stem.replace('troll', 'clip') if 'troll' in file.stem else file.stem.replace('clip', 'troll')
    assert settings(file) == settings(file.with_stem(other))


@pytest.mark.parametrize('files', [[file] for file in COMPLETE] + [[CONFIGS / 'quickstart.gin', x] for x in METHODS])
def test_what_a_run_saves_can_be_read_back(files, tmp_path):
    """Guards the evaluation of a run, which has nothing but the config.gin in its folder."""
    text = to_gin(*build(files, ['Sampling.seed = 3', "Run.folder = 'mine'"]))
    (tmp_path / 'config.gin').write_text(text)
    assert to_gin(*build([tmp_path / 'config.gin'])) == text and 'Sampling.seed = 3' in text


def own_loss(row: LossInputs, advantages, progress, *, strength: float = 1.0) -> LossOutputs: ...


def method(**changes) -> Method:
    settings = {'objective': troll, 'advantages': group_normalised, 'aggregation': token_mean, 'optimizer': adamw}
    return Method(**settings | {'tail_rule': default_tail, 'minibatch_prompts': 4} | changes)


def test_values_that_were_built_in_python_are_saved(tmp_path):
    """Guards runs of a notebook: one name that is used twice, values of modules of one's own, and positional arguments
    of a partial; and a value without a name, which must not look as if it had its default."""
    pulls = functools.partial(entropy_bonus, coefficient=0.1), functools.partial(kl_to_reference, coefficient=1)
    loss, optimizer = functools.partial(own_loss, strength=0.5), functools.partial(adamw, 1e-3)
    own = method(objective=loss, optimizer=optimizer, regularisers=pulls)
    tasks = Arithmetic(operands=7), Arithmetic(operands=8, train_size=5)
    experiment = Experiment(
        model='m',
        task=tasks[0],
        max_prompt_length=5,
        max_response_length=6,
        validation=[('a', tasks[0], 1), ('b', tasks[1], 2)],
        template_arguments={'a': 1},
    )
    text = to_gin(experiment, own)
    (tmp_path / 'config.gin').write_text(text)
    again, same = build([tmp_path / 'config.gin'], kinds=(Experiment, Method))
    assert again == dataclasses.replace(experiment, validation=tuple(experiment.validation))
    assert same.objective.func is own_loss and same.objective.keywords == {'strength': 0.5}
    assert same.optimizer.keywords == {'learning_rate': 1e-3}
    assert [function.keywords for function in same.regularisers] == [{'coefficient': 0.1}, {'coefficient': 1}]
    assert to_gin(again, same) == text

    def cell(row: LossInputs, advantages, progress, *, width: float) -> LossOutputs: ...

    unnamed = method(optimizer=lambda: optax.sgd(0.1), objective=functools.partial(cell, width=0.25))
    text = to_gin(unnamed, Experiment(model='<m>', task=tasks[0], max_prompt_length=5, max_response_length=6))
    assert re.search(r'^# not in a gin file: Method.optimizer = <.*lambda>>$', text, re.MULTILINE)
    assert re.search(r'^# not in a gin file: Method.objective = <.*cell\(width=0.25\)>$', text, re.MULTILINE)
    (tmp_path / 'config.gin').write_text(text)
    assert Config([tmp_path / 'config.gin']).get('Experiment.model') == '<m>'
    assert any('optax.sgd(0.1)' in source for source in own_code(unnamed).values())
    assert 'test_config' in own_code(own) and not own_code(method())

    class Table:
        def __init__(self, last: float):
            self.table, self.same = np.array([1.0, last]), self

        def __call__(self, responses): ...

    texts = {to_gin(method(rewards=[('table', 1.0, Table(last))])) for last in (2.0, 2.0, 3.0)}
    assert len(texts) == 2 and all('not in a gin file: Method.rewards' in text for text in texts)
    assert to_bindings(method())['Method.optimizer'] == '@adamw'


@pytest.mark.parametrize('file', PAPER, ids=named)
def test_the_hyperparameters_are_those_of_the_paper(file):
    """Guards the table of the paper's appendix (arXiv 2510.03817) against edits that mean to fit some machine."""
    config = Config([file])
    bound = lambda *names: [config.get(name) for name in names]
    assert bound('troll.bound', 'troll.alpha', 'ppo_clip.lower', 'ppo_clip.upper') == [0.05, 1.0, 0.2, 0.2]
    assert bound('ppo_clip.dual') == [10.0]
    experiment, sampling, method, compute, run = (config.build(kind) for kind in SETTINGS)
    assert (sampling.prompts_per_step, sampling.samples_per_prompt, method.minibatch_prompts) == (256, 8, 32)
    assert (sampling.temperature, sampling.support_size, run.evaluate_every, run.steps) == (1.0, 64, 10, 1001)
    assert sampling.support_mass == pytest.approx(1 - 1e-5, abs=1e-12)
    assert method.optimizer.keywords == {'learning_rate': 1e-6, 'weight_decay': 0.0, 'clip_norm': 1.0}  # no warm-up
    assert (method.aggregation, method.advantages) == (token_mean, group_normalised)
    assert (experiment.max_prompt_length, experiment.max_response_length) == (512, 2048)
    assert (experiment.model, compute.dtype) == ('Qwen/Qwen3-0.6B', 'bfloat16')
    assert type(experiment.task).__name__ == 'GSM8K'


def test_what_an_experiment_needs_is_named():
    names = 'Experiment.task, Experiment.max_prompt_length, Experiment.max_response_length'
    with pytest.raises(ValueError, match=names):
        Config([], ["Experiment.model = 'm'"]).build(Experiment)


def test_a_mesh_larger_than_the_machine_is_an_error():
    """Guards against a pod's configuration on one host that starts and then hangs or idles."""
    (compute,) = build(['quickstart', 'troll'], ['Compute.data = 16', 'Compute.fsdp = 1'], [Compute])
    with pytest.raises(ValueError, match="'data': 16.* needs 16 devices, but 8"):
        compute.mesh  # noqa: B018


@pytest.fixture
def experiment(tmp_path):
    """Builds an experiment on the tokenizer of the arithmetic task (17 tokens) and a model of some sizes."""

    def build(*, vocab_size: int, positions: int, prompt: int, response: int) -> Experiment:
        hf_config = Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            intermediate_size=8,
            max_position_embeddings=positions,
            architectures=['Qwen3ForCausalLM'],
        )
        hf_config.save_pretrained(tmp_path)
        character_tokenizer(CHARACTERS).save_pretrained(tmp_path)
        return Experiment(
            model=str(tmp_path), task=Arithmetic(), max_prompt_length=prompt, max_response_length=response
        )

    return build


def test_a_model_must_know_every_token(experiment):
    """Guards against token ids past the embedding, which JAX clamps to its last row without a word."""
    exact = experiment(vocab_size=17, positions=64, prompt=12, response=8)
    assert exact.load_model(Compute()).config.vocab_size == 17
    padded = experiment(vocab_size=32, positions=64, prompt=12, response=8)
    assert padded.load_model(Compute()).config.vocab_size == 32
    small = experiment(vocab_size=16, positions=64, prompt=12, response=8)
    with pytest.raises(ValueError, match='has 17 tokens, its model 16; expected at least as many'):
        small.load_model(Compute())


def test_a_context_must_hold_prompt_and_response(experiment):
    """Guards against positions that the model never saw in its training."""
    exact = experiment(vocab_size=17, positions=20, prompt=12, response=8)
    assert exact.load_model(Compute()).config.compute_dtype == 'bfloat16'
    long = experiment(vocab_size=17, positions=20, prompt=12, response=9)
    with pytest.raises(ValueError, match=r'texts of 21 tokens, but .* has positions for 20'):
        long.load_model(Compute())


def test_the_kernel_of_attention_is_that_of_the_devices_or_what_was_asked_for(experiment):
    """Guards a binding that nothing reads, and a misspelt kernel that only shows when a TPU is there."""
    build = experiment(vocab_size=17, positions=20, prompt=12, response=8)
    assert build.decoder_config(Compute()).attention == 'xla'
    assert build.decoder_config(Compute(attention='splash')).attention == 'splash'
    with pytest.raises(ValueError, match="attention is 'flash'; expected one of .*'splash'"):
        Compute(attention='flash')


@pytest.mark.parametrize('task', ['DAPOMath', 'EurusMath', 'MathEval', 'MathProblems', 'GSM8K', 'Arithmetic'])
def test_every_task_can_be_named_and_sent_to_a_grading_worker(task):
    """Guards a task that gin does not know, and a grading function that cannot be pickled once gin has wrapped it."""
    bindings = ["MathProblems.source = 'data'", "MathEval.benchmark = 'AMC'", "DAPOMath.system_prompt = 'Be brief.'"]
    bindings = [f'Experiment.task = @{task}()', "Experiment.model = 'm'", *bindings]
    (experiment,) = build([CONFIGS / 'quickstart.gin'], bindings, [Experiment])
    assert type(experiment.task).__name__ == task
    assert type(pickle.loads(pickle.dumps(experiment.task.grade)).__self__).__name__ == task


def test_benchmarks_share_a_source_and_keep_what_they_are():
    """Guards a binding that would make seven sets one, and one of a single set that the others read too."""
    bindings = [
        "MathEval.source = 'there'",
        "AMC.data_source = 'amc23'",
        "AMC.source = 'here'",
        "Experiment.model = 'm'",
    ]
    sets = "[('A', @AMC(), 1), ('B', @AIME24(), 1), ('C', @MathEval(), 1)]"
    bindings += [f'Experiment.validation = {sets}', "MathEval.benchmark = 'Minerva'"]
    (experiment,) = build([CONFIGS / 'quickstart.gin'], bindings, [Experiment])
    assert [(task.benchmark, task.source, task.data_source) for _, task, _ in experiment.validation] == [
        ('AMC', 'here', 'amc23'),
        ('AIME24', 'there', BENCHMARKS['AIME24']),
        ('Minerva', 'there', BENCHMARKS['Minerva']),
    ]
    assert {name.replace('-', '_') for name in BENCHMARKS} <= NAMES.keys()


def test_long_prompts_are_cut_if_asked(experiment):
    """Guards a binding that nothing reads."""
    build = dataclasses.replace(
        experiment(vocab_size=17, positions=20, prompt=5, response=8), task=Arithmetic(train_size=3)
    )
    tokenizer = build.load_model(Compute()).tokenizer
    prompts = dataclasses.replace(build, long_prompts='cut').load_prompts('train', tokenizer)
    assert (prompts.cut, prompts.dropped, prompts[:].tokens.shape) == (3, 0, (3, 5))
    with pytest.raises(ValueError, match='No prompt is left'):
        build.load_prompts('train', tokenizer)
    with pytest.raises(ValueError, match="long_prompts is 'shorten'; expected one of"):
        dataclasses.replace(build, long_prompts='shorten')


@pytest.mark.parametrize(
    ('build', 'said'),
    [
        (lambda: method(advantages=gae), 'set Method.critic'),
        (lambda: method(importance=truncated_importance), 'set old_policy to'),
        (lambda: method(objective=token_mean), 'Method.objective is token_mean; expected a function of LossInputs'),
        (lambda: method(optimizer=optax.sgd(0.1)), 'Method.optimizer is .*expected a function of nothing'),
        (lambda: method(advantages=token_mean), 'which needs token_mean.max_length'),
        (lambda: method(regularisers=[kl_to_reference]), 'which needs kl_to_reference.coefficient'),
        (lambda: method(objective=functools.partial(troll, alpha='1')), "troll.alpha is '1'; expected a finite number"),
        (lambda: method(objective=functools.partial(troll, region=default_tail)), 'troll.region is default_tail'),
        (lambda: method(minibatch_prompts=True), 'Method.minibatch_prompts is True'),
        (lambda: method(tail_rule=bucket_tail, rewards=[]), 'at least one'),
        (lambda: Sampling(prompts_per_step=0, samples_per_prompt=2), 'prompts_per_step must be above 0; got 0'),
        (lambda: Sampling(prompts_per_step=2, samples_per_prompt=1, max_draws=2), 'raise samples_per_prompt'),
        (lambda: Compute(dtype='float16'), "Compute.dtype is 'float16'; expected one of .*'bfloat16'"),
        (lambda: Compute(data=-1).mesh, 'at most one of them -1'),
        (lambda: Run(folder='gs://a', steps=1), 'set Run.checkpoint_folder to a bucket'),
        (lambda: Run(folder='a', steps=float('nan')), 'Run.steps is nan'),
        (lambda: Experiment(model='m', task=3, max_prompt_length=1, max_response_length=1), 'expected a Task'),
    ],
)
def test_settings_check_themselves(build, said):
    """Guards values of a notebook, which no gin file has been checked for."""
    with pytest.raises(ValueError, match=said):
        build()


def test_arguments_of_a_command_are_bound():
    """Guards a command that fails on an argument only once it runs."""
    assert Config([], ['evaluation.seed = 3'], [evaluation]).function(evaluation, '', None).keywords == {'seed': 3}
    with pytest.raises(ValueError, match='warm_start needs warm_start.folder, warm_start.task'):
        Config([], ['warm_start.seed = 3'], [warm_start]).function(warm_start)
