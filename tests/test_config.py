"""Configurations: nothing mistyped is dropped silently, every file is complete, and the paper's values are there."""

import dataclasses
import inspect
import pickle
from pathlib import Path

import gin
import pytest
from transformers import Qwen3Config

import experiments.train
import experiments.warm_start  # noqa: F401  registers what its configuration binds
from experiments.config import Experiment, parse, parse_command_line
from troll_jax.data.tasks.arithmetic import CHARACTERS, Arithmetic
from troll_jax.data.tasks.math_problems import BENCHMARKS
from troll_jax.data.tokenizer import character_tokenizer

CONFIGS = Path(__file__).parent.parent / 'configs'
FILES = sorted(CONFIGS.rglob('*.gin'))
COMPLETE = [file for file in FILES if '\ntrain.run_dir = ' in file.read_text()]
PAPER = [CONFIGS / f'qwen3_0_6b_gsm8k_{method}.gin' for method in ('troll', 'clip')]

named = lambda file: file.stem


@pytest.fixture(autouse=True)
def no_bindings():
    gin.clear_config()
    yield
    gin.clear_config()


METHODS = sorted(CONFIGS.glob('objectives/*.gin'))


def bound(*names: str) -> list:
    return [gin.query_parameter(name) for name in names]


@pytest.mark.parametrize(
    'binding, match',
    [
        ('trian.steps = 3', r"'trian'[\s\S]*Did you mean 'train'\?"),
        ('train.step = 3', r"'train' doesn't have a parameter named 'step'[\s\S]*Did you mean 'steps'\?"),
        ('Experiment.modle = "m"', r"Did you mean 'model'\?"),
        ('adamw.learning_rte = 1e-3', r"Did you mean 'learning_rate'\?"),
        ('train.objective = @trol', r"'@trol'[\s\S]*Did you mean 'troll'\?"),
        ('train.optimizer = @adam()', r"'@adam\(\)'[\s\S]*Did you mean 'adamw'\?"),
        ("AMC.sorce = 'data'", r"Did you mean 'source'\?"),
        ("AMC.benchmark = 'MATH500'", r"'benchmark' is no setting of 'AMC'[\s\S]*Known: .*data_source, .*source"),
        ("MathEval.data_source = 'amc'", r"'data_source' is no setting of 'MathEval'"),
        ("MathEval.sorce = 'data'", r"Did you mean 'source'\?"),
        ('train.steps = %steps', 'nothing defines the macro %steps'),
        ('train.steps = ', 'Unable to parse'),
        ('macro.steps = 3', "'macro' doesn't have a parameter named 'steps'"),
        ("include 'configs/no_such.gin'", 'Unable to open file: configs/no_such.gin'),
    ],
)
def test_a_mistyped_binding_is_an_error(binding, match):
    """Guards against knobs that are set and never read; the error names the nearest that there is."""
    with pytest.raises(ValueError, match=match):
        parse([], [binding])


@pytest.mark.parametrize(
    'binding, meant',
    [
        ('bound = 0.1', "'troll.bound' or 'dppo.bound'?"),
        ('checkpoint_evry = 5', "'train.checkpoint_every'?"),
        ('learning_rate = 1', "'adamw.learning_rate' or 'critic_adamw.learning_rate' or 'warm_start.learning_rate'?"),
    ],
)
def test_a_parameter_without_its_owner_is_an_error(binding, meant):
    """Guards against gin taking it for the definition of a macro, which nothing uses and nobody misses."""
    with pytest.raises(ValueError) as error:
        parse([CONFIGS / 'quickstart_troll.gin'], [binding])
    assert str(error.value) == f'nothing uses the macro {binding.split()[0]!r}.\nDid you mean {meant}'


def test_a_macro_that_is_used_is_not():
    parse([], ['rate = 3', 'train.steps = %rate', 'learning_rate = 0.5', 'adamw.learning_rate = %learning_rate'])
    assert gin.query_parameter('train.steps').scoped_configurable_fn() == 3


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no configuration file '.*none.gin'"):
        parse([tmp_path / 'none.gin'])


def test_bindings_win_over_files_and_files_over_what_they_include(tmp_path):
    """Guards the order that lets one experiment change one number of another."""
    (tmp_path / 'mine.gin').write_text("include 'configs/paper.gin'\ntrain.steps = 7\ntroll.bound = 0.1\n")
    parse([tmp_path / 'mine.gin'], ['troll.bound = 0.25'])
    assert bound('train.steps', 'troll.bound', 'train.max_tokens') == [7, 0.25, 64]


@pytest.mark.parametrize('file', FILES, ids=named)
def test_every_file_parses_from_any_folder(file, tmp_path, monkeypatch):
    """Guards against a name that was changed in the code only, and an include that the working folder decides."""
    monkeypatch.chdir(tmp_path)
    parse([file])


def test_there_are_files():
    """Guards the tests below against a list that is empty."""
    assert [named(file) for file in COMPLETE] == [
        'quickstart_clip',
        'quickstart_troll',
        'qwen3_0_6b_gsm8k_clip',
        'qwen3_0_6b_gsm8k_troll',
    ]


@pytest.mark.parametrize('file', COMPLETE, ids=named)
def test_every_experiment_is_complete(file):
    """Guards against a run that fails, after minutes of loading, on a parameter that its file forgot."""
    parse([file])
    required = [
        p.name for p in inspect.signature(experiments.train.train).parameters.values() if p.default is gin.REQUIRED
    ]
    assert {'run_dir', 'objective', 'optimizer', 'steps'} <= set(required)
    for name in required:
        gin.query_parameter(f'train.{name}')  # raises if it is not bound
    experiment = Experiment()
    assert experiment.mesh.size == 8 and callable(experiment.task.grade)
    objective = gin.query_parameter('train.objective').scoped_configurable_fn
    assert objective.__name__ == ('troll' if 'troll' in file.stem else 'ppo_clip')


@pytest.mark.parametrize('file', METHODS, ids=named)
def test_a_task_and_a_method_are_an_experiment(file, monkeypatch):
    """Guards a method that leaves something to whatever came before it, and two methods in one folder."""
    parse([file])
    for name in ('train.objective', 'train.aggregation', 'train.estimator'):
        gin.query_parameter(name)
    gin.clear_config()
    monkeypatch.setattr('sys.argv', ['train', str(CONFIGS / 'quickstart.gin'), 'train.steps = 3', str(file)])
    parse_command_line('', named_after_files='train.run_dir')
    assert bound('train.run_dir', 'train.steps') == [f'runs/quickstart_{file.stem}', 3]
    for parameter in inspect.signature(experiments.train.train).parameters.values():
        if parameter.default is gin.REQUIRED:
            gin.query_parameter(f'train.{parameter.name}')  # raises if it is not bound


def test_files_and_bindings_may_name_the_folder(monkeypatch):
    """Guards against a default that wins over what somebody wrote."""
    for arguments, folder in [
        (['quickstart_troll.gin'], 'runs/quickstart/troll'),
        (['quickstart_troll.gin', "train.run_dir = 'mine'"], 'mine'),
    ]:
        gin.clear_config()
        monkeypatch.setattr('sys.argv', ['train', str(CONFIGS / arguments[0]), *arguments[1:]])
        parse_command_line('', named_after_files='train.run_dir')
        assert bound('train.run_dir') == [folder]


@pytest.mark.parametrize('file', COMPLETE, ids=named)
def test_two_experiments_of_a_comparison_differ_in_the_objective_alone(file):
    """Guards against a comparison in which one side has the better learning rate."""

    def settings(file):
        gin.clear_config()
        parse([file])
        return [
            line for line in gin.config_str().splitlines() if not line.startswith(('train.objective', 'train.run_'))
        ]

    other = file.stem.replace('troll', 'clip') if 'troll' in file.stem else file.stem.replace('clip', 'troll')
    assert settings(file) == settings(file.with_stem(other))


@pytest.mark.parametrize('file', COMPLETE, ids=named)
def test_what_a_run_saves_can_be_read_back(file, tmp_path):
    """Guards the evaluation of a run, which has nothing but the config.gin in its folder."""
    parse([file], ['train.seed = 3', 'warm_start.task = @Arithmetic()'])
    text = gin.config_str()
    (tmp_path / 'config.gin').write_text(text)
    gin.clear_config()
    parse([tmp_path / 'config.gin'])
    assert gin.config_str() == text and 'train.seed = 3' in text


@pytest.mark.parametrize('file', PAPER, ids=named)
def test_the_hyperparameters_are_those_of_the_paper(file):
    """Guards the table of the paper's appendix (arXiv 2510.03817) against edits that mean to fit some machine."""
    parse([file])
    assert bound('troll.bound', 'troll.alpha', 'train.max_tokens') == [0.05, 1.0, 64]
    assert gin.query_parameter('train.mass') == pytest.approx(1 - 1e-5, abs=1e-12)
    assert bound('ppo_clip.lower', 'ppo_clip.upper', 'ppo_clip.dual') == [0.2, 0.2, 10.0]
    assert bound('adamw.learning_rate', 'adamw.weight_decay', 'adamw.clip_norm') == [1e-6, 0.0, 1.0]
    assert bound('train.prompts_per_step', 'train.samples_per_prompt', 'train.minibatch_prompts') == [256, 8, 32]
    assert bound('train.temperature', 'train.evaluate_every', 'train.steps') == [1.0, 10, 1001]
    assert bound('Experiment.max_prompt_length', 'Experiment.max_response_length') == [512, 2048]
    assert bound('Experiment.model', 'Experiment.compute_dtype') == ['Qwen/Qwen3-0.6B', 'bfloat16']
    references = bound('train.aggregation', 'train.estimator', 'train.optimizer', 'Experiment.task')
    assert [str(reference) for reference in references] == ['@token_mean', '@group_normalised', '@adamw()', '@GSM8K()']
    with pytest.raises(ValueError):
        gin.query_parameter('adamw.warmup_updates')  # the learning rate is constant


def test_what_an_experiment_needs_is_named():
    parse([], ["Experiment.model = 'm'"])
    with pytest.raises(TypeError, match='task.*max_prompt_length.*max_response_length'):
        Experiment()


def test_a_mesh_larger_than_the_machine_is_an_error():
    """Guards against a pod's configuration on one host that starts and then hangs or idles."""
    parse([CONFIGS / 'quickstart_troll.gin'], ['make_mesh.data = 16', 'make_mesh.fsdp = 1'])
    with pytest.raises(ValueError, match="'data': 16.* needs 16 devices, but 8"):
        Experiment()


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
    assert exact.decoder_config(exact.load_tokenizer()).vocab_size == 17
    padded = experiment(vocab_size=32, positions=64, prompt=12, response=8)
    assert padded.decoder_config(padded.load_tokenizer()).vocab_size == 32
    small = experiment(vocab_size=16, positions=64, prompt=12, response=8)
    with pytest.raises(ValueError, match='has 17 tokens, its model 16; expected at least as many'):
        small.decoder_config(small.load_tokenizer())


def test_a_context_must_hold_prompt_and_response(experiment):
    """Guards against positions that the model never saw in its training."""
    exact = experiment(vocab_size=17, positions=20, prompt=12, response=8)
    assert exact.decoder_config(exact.load_tokenizer()).compute_dtype == 'bfloat16'
    long = experiment(vocab_size=17, positions=20, prompt=12, response=9)
    with pytest.raises(ValueError, match=r'12 \+ 9 = 21 tokens, but .* has positions for 20'):
        long.decoder_config(long.load_tokenizer())


def test_the_kernel_of_attention_is_that_of_the_devices_or_what_was_asked_for(experiment):
    """Guards a binding that nothing reads, and a misspelt kernel that only shows when a TPU is there."""
    build = experiment(vocab_size=17, positions=20, prompt=12, response=8)
    assert build.decoder_config().attention == 'xla'
    assert dataclasses.replace(build, attention='splash').decoder_config().attention == 'splash'
    with pytest.raises(ValueError, match="attention must be one of .*'splash'.*; got 'flash'"):
        dataclasses.replace(build, attention='flash').decoder_config()


@pytest.mark.parametrize('task', ['DAPOMath', 'EurusMath', 'MathEval', 'MathProblems', 'GSM8K', 'Arithmetic'])
def test_every_task_can_be_named_and_sent_to_a_grading_worker(task):
    """Guards a task that gin does not know, and a grading function that cannot be pickled once gin has wrapped it."""
    bindings = ["MathProblems.source = 'data'", "MathEval.benchmark = 'AMC'", "DAPOMath.system_prompt = 'Be brief.'"]
    parse([CONFIGS / 'quickstart.gin'], [f'Experiment.task = @{task}()', "Experiment.model = 'm'", *bindings])
    experiment = Experiment()
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
    parse(
        [CONFIGS / 'quickstart.gin'], [*bindings, f'Experiment.validation = {sets}', "MathEval.benchmark = 'Minerva'"]
    )
    assert [(task.benchmark, task.source, task.data_source) for _, task, _ in Experiment().validation] == [
        ('AMC', 'here', 'amc23'),
        ('AIME24', 'there', BENCHMARKS['AIME24']),
        ('Minerva', 'there', BENCHMARKS['Minerva']),
    ]
    for name in (*BENCHMARKS, 'MathEval'):  # gin takes any binding of what has **kwargs
        target = gin.get_configurable(name.replace('-', '_'))
        assert {'source', 'deadline'} <= set(inspect.signature(target).parameters), name


def test_long_prompts_are_cut_if_asked(experiment):
    """Guards a binding that nothing reads."""
    build = dataclasses.replace(
        experiment(vocab_size=17, positions=20, prompt=5, response=8), task=Arithmetic(train_size=3)
    )
    tokenizer = build.load_tokenizer()
    prompts = dataclasses.replace(build, long_prompts='cut').load_prompts('train', tokenizer)
    assert (prompts.cut, prompts.dropped, prompts.tokens.shape) == (3, 0, (3, 5))
    with pytest.raises(ValueError, match='No prompt is left'):
        build.load_prompts('train', tokenizer)
    with pytest.raises(ValueError, match="long_prompts is 'shorten'; expected 'drop' or 'cut'"):
        dataclasses.replace(build, long_prompts='shorten').load_prompts('train', tokenizer)
