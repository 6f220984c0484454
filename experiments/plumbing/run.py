"""The run directory and the loop around training: resuming, signals, checkpoints, metrics, skipped updates."""

import difflib
import hashlib
import importlib.metadata
import json
import logging
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from transformers import GenerationConfig

from experiments.plumbing.gin_files import ROOT, Config
from experiments.plumbing.gin_text import own_code, to_bindings, to_gin
from experiments.plumbing.progress import Progress
from experiments.plumbing.samples import describe_samples, in_markdown, token_flags, token_table
from troll_jax.checkpoint import Checkpoints
from troll_jax.collect import Experience
from troll_jax.data.tokenizer import save_tokenizer
from troll_jax.experiment import Model, StartModel
from troll_jax.hub import version_of
from troll_jax.learn import Updated
from troll_jax.metrics import MetricsWriter
from troll_jax.models.hf_weights import load_config
from troll_jax.saved_batches import save_batches
from troll_jax.settings import Compute, Run
from troll_jax.sharding import gather
from troll_jax.trackers import check_installed
from troll_jax.types import Batch, TrainState

logger = logging.getLogger(__name__)

SETUP = 'setup.json'  # beside the checkpoints
PACKAGES = ['jax', 'flax', 'optax', 'orbax-checkpoint', 'transformers', 'datasets', 'math-verify', 'sympy']


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, in the middle of a step."""


class TrainingRun:
    """A run: its directory and its loop. A context manager; left by `Interrupted` it saves the state before the step.

    Args:
      learnt: settings that decide what is learnt, the one that names the start model first.
      compute, run: the other settings.

    Raises:
      OSError, ValueError: a folder that cannot be written to, or a tracker that is not installed.
    """

    interrupted = False
    """True once Ctrl-C or SIGTERM has ended the loop before `Run.steps`."""

    def __init__(self, learnt: Sequence[Any], compute: Compute, run: Run):
        self.learnt, self.compute, self.run = tuple(learnt), compute, run
        self._start: StartModel = self.learnt[0]
        self._is_first_process = jax.process_index() == 0
        self._skipped, self._is_last = 0, False  # steps in a row; whether a step is the last
        if self._is_first_process:
            check_installed(run.trackers)
            check_writable(run.folder)
            if run.checkpoint_folder is not None and '://' not in run.checkpoint_folder:
                check_writable(run.checkpoint_folder)

    def __enter__(self) -> 'TrainingRun':
        run = self.run
        with ExitStack() as stack:
            stack.enter_context(nothing_left_behind(run.checkpoints_in))
            # Before the checkpoints, which are still written when the loop has ended.
            self._stop = stack.enter_context(stop_on_signal(self.compute.rollout_mesh))
            stack.enter_context(jax.set_mesh(self.compute.mesh))
            stack.enter_context(jax.debug_nans(run.debug_nans or jax.config.jax_debug_nans))
            self._checkpoints = stack.enter_context(
                Checkpoints(
                    run.checkpoints_in,
                    keep=run.keep_checkpoints,
                    keep_every=run.save_rollout_every or None,
                    keep_best=run.keep_best,
                )
            )
            self._trace = stack.enter_context(ExitStack())  # of `Run.profile_step`
            self._contexts = stack.pop_all()
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        with self._contexts:
            if isinstance(error, Interrupted):
                self.interrupted = True
                if self._last_step:
                    self._checkpoints.save(*self._latest)
            elif error is not None:
                raise error
        if self.interrupted:
            logger.warning('stopped after step %d, the last to be saved; start again to resume', self._last_step)
        return self.interrupted

    def start(self, learner: Any, model: Model, data: Sequence[Any], validate: Callable[..., dict]) -> TrainState:
        """Restores the latest checkpoint, or loads the weights and evaluates them; opens the run directory.

        Args:
          learner: learner with the `shapes` of the state, and `init`, which makes it from parameters.
          model: tokenizer and sizes, which are saved with the run.
          data: training data in lists and numbers, which a resumed run must have again.
          validate: metrics of the validation sets, a function of parameters.

        Raises:
          ValueError: another experiment, sampling, method, tokenizer or data than before, and `Run.on_change` is
            'stop'.
        """
        run = self.run
        setup = describe_setup(self.learnt, model.tokenizer, {'train': data})
        check_setup(self._checkpoints, setup, run.on_change)
        load = partial(self._start.load_params, self.compute, model.config.lora)
        state = restore_or_init(self._checkpoints, learner.shapes, learner.init, load)
        self._first = first = int(state.progress.step)
        if self._is_first_process:
            self._save_setup(model, setup)
        if first >= run.steps:
            logger.warning('nothing to do: %s is at step %d of %d', run.folder, first, run.steps)
        self._latest, self._last_step = (state, None), first
        self._learner, self._tokenizer, self._validate = learner, model.tokenizer, validate
        self._metrics = self._contexts.enter_context(
            MetricsWriter(
                run.folder,
                resume_after=first,
                write=self._is_first_process,
                trackers=run.trackers,
                settings=to_bindings(*self.learnt, self.compute, run),
            )
        )
        if first == 0 and run.evaluate_every:
            self._metrics.write(0, validate(state.policy))
        return state

    def steps(self) -> Iterator[int]:
        """The steps to take, from the latest checkpoint to `Run.steps`; ends early after Ctrl-C or SIGTERM."""
        self._progress = Progress(self._first, self.run.steps)
        for step in self._progress:
            if step == self.run.profile_step:
                self._trace.enter_context(jax.profiler.trace(Path(self.run.folder) / 'profile'))
            yield step
            if self._is_last:
                break

    def check_signals(self) -> None:
        """Raises `Interrupted` after Ctrl-C or SIGTERM; for what comes before the first update of a step."""
        if self._stop():
            raise Interrupted

    def save_rollout(self, step: int, batches: Sequence[Batch]) -> None:
        """Saves the minibatches of a step for `experiments.replay`, if it is due or may be the last before an error."""
        every = self.run.save_rollout_every
        if self._is_last_chance() or (every and (step - 1) % every == 0):
            save_batches(self._rollout_file(step), map(self._learner.place, batches), step=step - 1)

    def record(
        self,
        step: int,
        state: TrainState,
        row: dict[str, float],
        updates: Sequence[Updated] = (),
        experience: Experience | None = None,
        *,
        is_last: bool = False,
    ) -> None:
        """Ends a step: metrics, warnings, constrained tokens and samples, evaluation and checkpoints when due.

        Args:
          step: step, from 1.
          state: state after it.
          row: its metrics.
          updates: metrics of its updates.
          experience: the responses that they learnt from.
          is_last: True ends the run, as if it had no more steps.

        Raises:
          FloatingPointError: `Run.max_skipped` steps in a row had an update that was skipped.
        """
        run = self.run
        self._trace.close()
        last_chance = self._is_last_chance()
        self._skipped = self._skipped + 1 if row.get('update/skipped') or row.get('critic/skipped') else 0
        if self._skipped:
            logger.warning('step %d: an update was skipped, its gradient was not finite', step)
        is_last, is_stopped = is_last or step == run.steps, self._stop()
        self._is_last, self._last_step, self._latest = is_last or is_stopped, step, (state, None)
        self.interrupted = is_stopped and not is_last
        if experience is not None:
            self._record_tokens(step, updates, experience)
        if run.evaluate_every and (is_last or step % run.evaluate_every == 0 and not is_stopped):
            row |= self._validate(state.policy)
        self._latest = state, row.get('eval/success')
        self._metrics.write(step, row)
        self._progress.show(step, row)
        if last_chance and self._skipped:
            raise FloatingPointError(not_finite(run.folder, step, self._skipped, self._rollout_file(step)))
        self._checkpoints.check()
        if step % run.checkpoint_every == 0 or self._is_last or self._is_last_chance():
            self._checkpoints.save(*self._latest)

    def _record_tokens(self, step: int, updates: Sequence[Updated], experience: Experience) -> None:
        """Writes the table of constrained tokens and the samples, if they are due."""
        run, rollout = self.run, experience.rollout
        table = run.table_every and step % run.table_every == 0 and updates[0].policy is not None
        every = run.save_samples_every
        samples = every and (step == 1 or step % every == 0 or self._is_last)
        if not table and not samples:
            return
        flags = None if updates[0].policy is None else token_flags(self._learner, rollout, updates)
        if table:
            self._metrics.write_table(step, token_table(flags, rollout, self._tokenizer))
        if samples:
            advantages = self._learner.to_responses(rollout, [update.advantages for update in updates])
            prompts = describe_samples(
                run.save_samples_prompts, experience, flags, advantages, len(updates), self._tokenizer
            )
            self._metrics.write_samples(step, prompts, in_markdown(prompts))

    def _is_last_chance(self) -> bool:
        """True if the run ends with an error should the next update be skipped again."""
        return 0 < self._skipped == self.run.max_skipped - 1

    def _rollout_file(self, step: int) -> Path:
        return Path(self.run.folder) / 'rollouts' / f'{step - 1}.npz'

    def _save_setup(self, model: Model, setup: dict[str, dict]) -> None:
        """Writes all that evaluation, export and resuming need besides the parameters; keeps a changed configuration.

        Raises:
          ValueError: a run that starts from nothing would overwrite one whose checkpoints lie elsewhere.
        """
        run, folder = self.run, Path(self.run.folder)
        folder.mkdir(parents=True, exist_ok=True)
        path, new = folder / 'config.gin', to_gin(*self.learnt, self.compute, run)
        old = path.read_text() if path.exists() else new
        elsewhere = None
        if path.exists() and not self._first:
            with suppress(ValueError):  # it was written by an earlier version, or with code that has changed
                elsewhere = Config([path]).get('Run.checkpoint_folder')
        if elsewhere not in (None, run.checkpoint_folder):
            raise ValueError(
                f'{folder} has its checkpoints in {elsewhere}, and Run.checkpoint_folder is '
                f'{run.checkpoint_folder!r}; bind it to resume, or choose another Run.folder'
            )
        if self._first and old != new:
            (folder / f'config_until_{self._first}.gin').write_text(old)
            changed = [line for line in difflib.ndiff(old.splitlines(), new.splitlines()) if line[0] in '+-']
            logger.warning('resuming from step %d with another configuration:\n%s', self._first, '\n'.join(changed))
        _replace(epath.Path(path), new)
        where = epath.Path(run.checkpoints_in)
        where.mkdir(parents=True, exist_ok=True)
        _replace(where / SETUP, json.dumps(setup, indent=2) + '\n')
        load_config(self._start.model).save_pretrained(folder / 'model')
        start = self._start
        save_tokenizer(folder / 'model', model.tokenizer, None if start.chat_template_from else start.model)
        GenerationConfig(
            eos_token_id=list(model.stop_tokens), pad_token_id=model.tokenizer.pad_token_id
        ).save_pretrained(folder / 'model')


def describe_setup(settings: Sequence[Any], tokenizer, splits: dict[str, Sequence[Any]]) -> dict[str, dict]:
    """The setup of a run, which decides what it learns besides its weights: saved with these, as `setup.json`.

    Args:
      settings: those that decide what is learnt.
      tokenizer: tokenizer of the run.
      splits: data in lists and numbers by the names of its splits.
    """
    special = [tokenizer.special_tokens_map, tokenizer.chat_template]
    packages = PACKAGES + ['reasoning-gym'] * ('reasoning_gym' in sys.modules)  # optional; recorded where it is used
    return {
        'bindings': to_bindings(*settings),
        'tokenizer': {'tokenizer': fingerprint(sorted(tokenizer.get_vocab().items()), special)},
        'data': {f'{name} data': fingerprint(*data) for name, data in splits.items()},
        'versions': {name: importlib.metadata.version(name) for name in packages}
        | {'troll_jax': _commit(), 'start model': version_of(settings[0].model)}
        | {f'code of {name}': fingerprint(source) for name, source in own_code(*settings).items()},
    }


def fingerprint(*values: Any) -> str:
    """A hash of arrays and of values that can be written as JSON: the same on any machine and in any Python."""

    def other(value: Any) -> str:
        if isinstance(value, np.ndarray):
            little_endian = value.astype(value.dtype.newbyteorder('<'), copy=False)
            return hashlib.sha256(np.ascontiguousarray(little_endian)).hexdigest()
        return str(value)

    return hashlib.sha256(json.dumps(values, sort_keys=True, default=other).encode()).hexdigest()[:16]


def _commit() -> str | None:
    """The commit of this repository, `-dirty` if files differ from it; outside of one the version of the package."""
    if not (ROOT / '.git').exists():
        return importlib.metadata.version('troll-jax') if ROOT.name == 'experiments' else None
    command = ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude', '*']
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def check_setup(checkpoints: Checkpoints, new: dict[str, dict], on_change: str) -> None:
    """Compares a setup with the one that the checkpoints were saved with, before anything resumes from them.

    Raises:
      ValueError: another experiment, sampling, method, tokenizer or data, and `on_change` is 'stop'.
    """
    if not checkpoints.steps:
        return
    path = checkpoints.path.parent / SETUP
    if not path.exists():
        logger.warning('%s is missing: configuration and data cannot be compared with those before', path)
        return
    old = json.loads(path.read_text())

    def changes(*parts: str) -> list[str]:
        before, after = ({name: x for part in parts for name, x in of[part].items()} for of in (old, new))
        names = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
        return [f'{name}: {before.get(name, "not set")} → {after.get(name, "not set")}' for name in names]

    if versions := changes('versions'):
        logger.warning('other versions than before, results may differ:\n%s', '\n'.join(versions))
    if not (found := changes('bindings', 'tokenizer', 'data')):
        return
    message = f'{path.parent} was trained to step {checkpoints.steps[-1]} with something else:\n' + '\n'.join(found)
    if on_change == 'stop':
        raise ValueError(
            f'{message}\nUse what it was started with or another Run.folder, or set Run.on_change = "resume" to train '
            'on with the change'
        )
    logger.warning(message)


def restore_or_init(
    checkpoints: Checkpoints, shapes: TrainState, init: Callable, load: Callable[[], Any], step: int | None = None
) -> TrainState:
    """A checkpoint, by default the latest; without one, or for step 0, what `init` makes of the start model.

    `load` gives that model's parameters, which a checkpoint of adapters needs too.
    """
    if step is None:
        step = checkpoints.steps[-1] if checkpoints.steps else 0
    if not step:
        return init(load())
    logger.info('resuming from step %d', step)
    return checkpoints.restore(shapes, step, load)


def check_writable(folder: str | Path) -> None:
    """Tries to write into a folder, or if it does not exist into the nearest above it, and leaves nothing behind.

    Raises:
      ValueError: no name.
      OSError: nothing can be written there.
    """
    if not str(folder):
        raise ValueError("got '' for a folder to write to; expected a name. Bind one, '.' is the working folder")
    folder = Path(folder)
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b'.')
            file.flush()
    except OSError as error:
        raise OSError(
            error.errno,
            f'{error.strerror}: files are to be written there. Make it writable, or bind another folder',
            str(folder),
        ) from error


@contextmanager
def nothing_left_behind(folder: str | Path) -> Iterator[None]:
    """Removes the folders that an error leaves empty: `folder`, its `checkpoints`, and those above that it made."""
    folder = Path(folder)
    made = [path for path in (folder / 'checkpoints', folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):  # what is not empty, was never made, or another process has removed
                path.rmdir()
        raise


def _replace(path: epath.Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    temporary = path.with_name(f'{path.name}.tmp')
    temporary.write_text(text)
    temporary.replace(path)


def warn_of_noise(row: dict[str, float]) -> None:
    """A trust region means little if sampler and trainer, from the same parameters, differ by much of its size."""
    bound = row.get('update/bound_mean', np.inf)
    if row.get('update/kl_noise', 0.0) > bound / 10:
        logger.warning(
            'the KL between sampler and trainer is %.2g nats per token before any update, more than a tenth of the '
            'bound %.2g; set Method.old_policy to "recompute", or Compute.dtype to "float32"',
            row['update/kl_noise'],
            bound,
        )


def not_finite(run_dir: str, step: int, skipped: int, rollout: Path) -> str:
    replay = f'`troll replay {run_dir} --batch {rollout}` shows the first token whose loss is not; '
    return (
        f'step {step}: gradients were not finite in {skipped} steps in a row (Run.max_skipped). The parameters are '
        f'finite and saved as of step {step - 1}. {replay if rollout.exists() else ""}with Run.debug_nans = True the '
        'run ends where the first NaN appears'
    )


@contextmanager
def stop_on_signal(mesh: Mesh):
    """Yields a function that is true once Ctrl-C or SIGTERM has come, to a process with devices of the mesh.

    The loop then leaves its rollout or ends its update, and saves. Twice ends at once.
    """
    received = []

    def handle(number, _):
        if received:
            raise KeyboardInterrupt
        received.append(number)
        logger.warning('%s: saving after this block or update; twice stops at once', signal.Signals(number).name)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: gather(bool(received), mesh).any()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
