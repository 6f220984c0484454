"""What a gin file can name, and how the files of an experiment are read.

The library does not know gin. Every function and class that a configuration may use or bind is registered here.
"""

import argparse
import dataclasses
import difflib
import inspect
import logging
import re
import signal
import tokenize
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gin
import jax
from transformers import PreTrainedTokenizerBase

from experiments.bindings import check_types
from troll_jax.critic import Critic
from troll_jax.data.prompts import PromptSet, encode_prompts
from troll_jax.data.tasks import Task
from troll_jax.data.tasks.arithmetic import Arithmetic
from troll_jax.data.tasks.eurus_code import EurusCode
from troll_jax.data.tasks.gsm8k import GSM8K
from troll_jax.data.tasks.math_problems import BENCHMARKS, DAPOMath, EurusMath, MathEval, MathProblems
from troll_jax.data.tokenizer import load_tokenizer, stop_token_ids
from troll_jax.models.attention import best_implementation
from troll_jax.models.decoder import DecoderConfig
from troll_jax.models.families import decoder_config
from troll_jax.models.hf_weights import load_config
from troll_jax.ops import advantages, aggregation, categorical, losses, projection, regularisers, schedules, support
from troll_jax.optimizer import adamw
from troll_jax.rewards import sandbox, terms
from troll_jax.sharding import make_mesh

CONFIG_HELP = 'a gin file; more of them may follow, such as those of configs/objectives after a task'

_PEER_TIMEOUT = 30  # seconds without a sign of life after which another process counts as dead

_registered: dict[str, list[str]] = {}  # names of what gin files can name, with those of their parameters
_targets: dict[str, Callable] = {}  # what these names stand for
_command_line: list[str] = []  # the bindings that `parse` was given last


def register(target, fixed: Sequence[str] = (), name: str | None = None):
    """Makes a function or class known to gin under its own or another name. `fixed` parameters cannot be bound."""
    name = name or target.__name__
    _targets[name] = target
    _registered[name] = [parameter for parameter in inspect.signature(target).parameters if parameter not in fixed]
    configurable = gin.external_configurable(target, name=name, module='troll_jax', denylist=list(fixed) or None)
    if inspect.isclass(target):  # whose parameters would be *args, **kwargs: gin would take any binding of what uses it
        configurable.__signature__ = inspect.signature(target)
    return configurable


for _target in (
    losses.troll,
    losses.ppo_clip,
    losses.cispo,
    losses.dppo,
    losses.importance_weighted,
    support.default_tail,
    support.bucket_tail,
    schedules.linear_bound,
    schedules.adaptive_bound,
    advantages.group_normalised,
    advantages.mean_centred,
    advantages.leave_one_out,
    advantages.no_baseline,
    adamw,
    Critic,
    make_mesh,
    Arithmetic,
    EurusCode,
    GSM8K,
    MathProblems,
    DAPOMath,
    EurusMath,
    sandbox.Bubblewrap,
    sandbox.SandboxFusion,
    sandbox.Unisolated,
):
    register(_target)
# @AMC() is MathEval with this benchmark and all that is bound of MathEval; what is bound of AMC wins. What makes it
# what it is cannot be bound: its name, nor for all benchmarks at once how their rows are recognised.
MathEval = register(MathEval, fixed=('data_source',))
for _benchmark in BENCHMARKS:
    register(partial(MathEval, benchmark=_benchmark), fixed=('benchmark',), name=_benchmark.replace('-', '_'))
for _target in (
    aggregation.token_mean,
    aggregation.sequence_mean,
    aggregation.sequence_sum,
    aggregation.constant_length,
):
    register(_target, fixed=('lengths', 'max_length'))  # which `train` passes
register(advantages.greedy_baseline, fixed=('rewards', 'greedy_reward'))
register(advantages.gae, fixed=('rewards', 'values'))
register(adamw, name='critic_adamw')  # of a critic, so that it has bindings of its own
for _target in (terms.task_reward, terms.soft_overlong, terms.answer_format):
    register(_target, fixed=('responses',))
for _target in (regularisers.entropy_bonus, regularisers.kl_to_old, regularisers.kl_to_reference):
    register(_target, fixed=('row',))
for _target in (regularisers.k1, regularisers.k2, regularisers.k3):
    register(_target, fixed=('log_probs', 'other_log_probs'))  # which `kl_to_reference` passes
for _target in (losses.token_region, losses.sequence_region):
    register(_target, fixed=('new', 'old', 'segments', 'bound'))  # which `troll` passes
for _target in (losses.token_ratio, losses.sequence_ratio):
    register(_target, fixed=('log_ratio', 'segments'))  # which the objectives pass
for _target in (categorical.total_variation, projection.kl_divergence):
    register(_target, fixed=('log_p', 'log_q'))  # which `dppo` passes


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is to be learnt, and by which model: all that training and evaluation share.

    Args:
      model: a folder in Hugging Face format or an id on the hub, which the run starts from.
      task: data, prompts and reward.
      max_prompt_length: tokens.
      max_response_length: tokens; longer responses are cut.
      compute_dtype: of activations and matrix products, 'bfloat16' or 'float32'. Parameters and probabilities are
        float32.
      remat: what the backward pass computes again to save memory: None, 'dots' or 'full'.
      attention: of whole sequences: 'xla', 'cudnn' or 'splash'; the best on the mesh's devices if None.
      chat_template_from: a model whose chat template to borrow.
      template_arguments: for the chat template.
      long_prompts: what becomes of prompts that are longer: 'drop', or 'cut', at the beginning of the user's words.
      mesh: of devices, by `make_mesh`; all of them in `fsdp` if None.
      validation: what is evaluated, in training and by `experiments.evaluate`: for each set a name, a task whose test
        split it is, and samples per prompt, such as `('AMC', @AMC(), 32)`. One sample is greedy, several are drawn at
        temperature 1. None: the test split of `task`, greedy.

    Raises:
      ValueError: two sets of a name, a name that is no part of a file's name, or less than one sample.
    """

    model: str
    task: Task
    max_prompt_length: int
    max_response_length: int
    compute_dtype: str = 'bfloat16'
    remat: str | None = None
    attention: str | None = None
    chat_template_from: str | None = None
    template_arguments: dict[str, Any] | None = None
    long_prompts: str = 'drop'
    mesh: jax.sharding.Mesh | None = None
    validation: Sequence[tuple[str, Task, int]] | None = None

    def __post_init__(self):
        for name in ('max_prompt_length', 'max_response_length'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}; expected at least 1 token')
        if self.mesh is None:
            object.__setattr__(self, 'mesh', make_mesh())
        if self.validation is None:
            object.__setattr__(self, 'validation', (('test', self.task, 1),))
        names = [name for name, _, _ in self.validation]
        fits = lambda name: re.fullmatch(r'[\w-]+', name) and name != 'mean'
        if not names or len(set(names)) < len(names) or not all(map(fits, names)):
            raise ValueError(
                f'Experiment.validation names the sets {names}; expected at least one, and names that differ, of '
                "letters, digits, _ and -, and not 'mean'"
            )
        for name, _, samples in self.validation:
            if samples < 1:
                raise ValueError(f'Experiment.validation asks for {samples} samples of {name!r}; expected at least 1')

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.model, chat_template_from=self.chat_template_from)

    def stop_tokens(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        return stop_token_ids(tokenizer, self.model)

    def load_prompts(self, split: str, tokenizer: PreTrainedTokenizerBase, task: Task | None = None) -> PromptSet:
        """The prompts of a split of a task, which is the experiment's own by default."""
        return encode_prompts(
            (task or self.task).load(split),
            tokenizer,
            max_length=self.max_prompt_length,
            template_arguments=self.template_arguments,
            long_prompts=self.long_prompts,
        )

    def decoder_config(self, tokenizer: PreTrainedTokenizerBase | None = None) -> DecoderConfig:
        """The sizes of the model, and how it computes.

        Raises:
          ValueError: it has fewer tokens than the tokenizer, or a shorter context than the lengths ask for.
        """
        hf_config = load_config(self.model)
        config = decoder_config(hf_config, compute_dtype=self.compute_dtype, remat=self.remat)
        device = self.mesh.devices.flat[0]
        attention = self.attention or best_implementation(device, config.compute_dtype, config.head_dim)
        config = dataclasses.replace(config, attention=attention)
        if tokenizer is not None and config.vocab_size < len(tokenizer):
            raise ValueError(
                f'the tokenizer of {self.model!r} has {len(tokenizer)} tokens, its model {config.vocab_size}; expected '
                'at least as many in the model. Use the tokenizer that belongs to it, or resize the embeddings.'
            )
        length = self.max_prompt_length + self.max_response_length
        if length > hf_config.max_position_embeddings:
            raise ValueError(
                f'max_prompt_length + max_response_length = {self.max_prompt_length} + {self.max_response_length} = '
                f'{length} tokens, but {self.model!r} has positions for {hf_config.max_position_embeddings}'
            )
        return config


Experiment = register(Experiment)


def command_line(description: str, name: str, help: str) -> argparse.ArgumentParser:
    """What all commands take, the argument `name` first. Options may stand anywhere: use `parse_intermixed_args`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(name, help=help)
    parser.add_argument('bindings', nargs='*', help="gin bindings that win over files', such as 'train.steps = 20'")
    several = parser.add_argument_group('several processes', 'the same command on every host, see docs/pods.md')
    several.add_argument(
        '--distributed', action='store_true', help='join the other processes, as TPU pods, SLURM, Kubernetes or MPI say'
    )
    several.add_argument('--coordinator', help='host:port of the first process, where nothing says it')
    several.add_argument('--num-processes', type=int)
    several.add_argument('--process-id', type=int, help='from 0')
    return parser


def begin(arguments: argparse.Namespace, level: int = logging.INFO) -> None:
    """Turns on the log and joins the other processes. Comes before anything that asks JAX for its devices.

    Raises:
      ValueError: where the other processes are is not known.
    """
    # Force: libraries have set up logging of their own when they were imported, and nothing of ours would be seen.
    logging.basicConfig(level=level, format='%(levelname)s %(name)s: %(message)s', force=True)
    logging.getLogger('absl').setLevel(logging.WARNING)  # in which Orbax tells of every array
    where = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    if not arguments.distributed and where == (None, None, None):
        return
    try:
        # Without these limits a run hangs for minutes when one of its processes has died.
        jax.distributed.initialize(
            *where, heartbeat_timeout_seconds=_PEER_TIMEOUT, shutdown_timeout_seconds=_PEER_TIMEOUT
        )
    except ValueError as error:
        raise ValueError(
            f'cannot join the other processes: {error} Give --coordinator, --num-processes and --process-id.'
        ) from error
    # JAX has put a handler of its own there that would let nothing but Orbax know of a SIGTERM.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if jax.process_index() > 0:
        logging.getLogger().setLevel(logging.WARNING)


def parse_command_line(description: str, named_after_files: str | None = None) -> None:
    """Starts a command that takes gin files and bindings, and reads these.

    Args:
      description: of the command.
      named_after_files: a parameter that is the folder 'runs/<file>_<file>' if neither files nor bindings set it.
    """
    arguments = command_line(description, 'config', help=CONFIG_HELP).parse_intermixed_args()
    begin(arguments)
    files, bindings = files_and_bindings(arguments)
    if named_after_files is not None:
        name = '_'.join(Path(file).stem for file in files)
        gin.parse_config(f'{named_after_files} = {f"runs/{name}"!r}')
    parse(files, bindings)


def files_and_bindings(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Of the arguments after the first configuration, those that end in '.gin' are files too."""
    is_file = lambda argument: argument.endswith('.gin')
    files = [arguments.config, *filter(is_file, arguments.bindings)]
    return files, [argument for argument in arguments.bindings if not is_file(argument)]


def parse(files: Sequence[str | Path], bindings: Sequence[str] = ()) -> None:
    """Reads gin files, of which later ones win, then bindings, which win over all.

    Files that are included are looked for in the working folder and next to this package.

    Raises:
      ValueError: a file, name or parameter that does not exist, with the nearest that does; a macro that nothing uses;
        a value that is not of its parameter's type.
    """
    _command_line[:] = bindings
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f'no configuration file {str(file)!r}')
    reads = [(str(file), partial(gin.parse_config_file, str(file))) for file in files]
    reads += [(repr(binding), partial(gin.parse_config, binding)) for binding in bindings]
    for where, read in [*reads, ('the configuration', gin.finalize)]:
        try:
            read()
        except Exception as error:  # of many kinds: Python's own tokenizer and parser read these files
            raise ValueError(f'{where}: {_explain(error)}') from error
    _check_macros(gin.config_str())
    if scoped := re.search(r'^\s*([\w./]+/[\w.]+) =', gin.config_str(), re.MULTILINE):
        raise ValueError(
            f'{scoped[1]!r} binds within a scope, and nothing here uses scopes; leave out what is before the /'
        )
    check_types(_targets)


def checkpoint_folder(run_dir: str | Path) -> str:
    """Where a run whose configuration has been read keeps its checkpoints."""
    return gin.get_bindings('train').get('checkpoint_dir') or str(run_dir)


def check_bindings_used(also: Sequence[str] = ()) -> None:
    """Raises a ValueError if a binding of the command line has changed nothing, once all that it could change is built.

    Files may bind what an experiment does not use, such as the parameters of another objective.

    Args:
      also: names that are used without gin seeing it.
    """
    used = gin.operative_config_str()
    names = [name for binding in _command_line for name in re.findall(r'^\s*([\w./]+)\s*=', binding, re.MULTILINE)]
    for name in names:
        name = name.removeprefix('troll_jax.')
        if '.' in name and name not in also and not re.search(rf'^(# )?{re.escape(name)} =', used, re.MULTILINE):
            raise ValueError(
                f'nothing that this experiment uses reads {name!r}: it would change nothing. Leave it out, or bind '
                f'what uses {name.split(".")[0]!r}.'
            )


def _check_macros(config: str) -> None:
    """Raises a ValueError for `steps = 3`, which gin takes for the definition of a macro and not for `train.steps`."""
    for macro in re.findall(r'^(\w+) = ', config, re.MULTILINE):
        if not re.search(rf'%{macro}\b', config):
            known = [(name, f'{owner}.{name}') for owner, names in _registered.items() for name in names]
            near = difflib.get_close_matches(macro, [name for name, _ in known], n=1, cutoff=0.0)[0]
            meant = ' or '.join(repr(full) for name, full in known if name == near)
            raise ValueError(f'nothing uses the macro {macro!r}.\nDid you mean {meant}?')


def _explain(error: Exception) -> str:
    """What is wrong with a configuration that gin refuses, and what to do."""
    message = str(error).strip()
    if macro := re.search(r"No bindings specified for '([^']+)/gin.macro'", message):
        return f'nothing defines the macro %{macro[1]}; expected a line {macro[1]} = value'
    if isinstance(error, (SyntaxError, tokenize.TokenError, UnicodeError)) or 'Failed to parse token' in message:
        return f'cannot be read ({message}); expected name.parameter = value, and text in quotes'
    return f'{message}{_nearest(message)}'


def _nearest(message: str) -> str:
    """What the writer of a mistyped name may have meant."""
    parameter = re.search(r"Configurable '([^']+)' doesn't have a parameter named '([^']+)'", message)
    fixed = re.search(r"Configurable '([^']+)' has denylisted kwarg '([^']+)'", message)
    unknown = re.search(r"No configurable matching (?:reference )?'@?([^']+)'", message)
    if parameter and parameter[1].split('.')[-1] in _registered:
        name, known = parameter[2], _registered[parameter[1].split('.')[-1]]
    elif unknown:
        name, known = unknown[1].split('/')[-1].split('.')[-1].removesuffix('()'), list(_registered)
    elif fixed:
        known = sorted(_registered[fixed[1].split('.')[-1]])
        return (
            f'\n{fixed[2]!r} is no setting of {fixed[1]!r}: the code that uses it gives it. Known: {", ".join(known)}.'
        )
    else:
        return ''
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f'\nDid you mean {near!r}? Known: {", ".join(sorted(known))}.'
