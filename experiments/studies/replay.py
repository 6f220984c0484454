"""Compares objectives on one saved rollout: gradients, constrained tokens, distances after one step, time."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from experiments.benchmarks.measure import median_seconds
from experiments.plumbing.gin_files import ROOT, Config, find_file
from experiments.plumbing.gin_text import to_bindings
from experiments.plumbing.run import restore_or_init
from experiments.studies.replay_report import draw
from experiments.studies.token_gradients import SILENCED, held, inspected, summarise
from troll_jax.checkpoint import Checkpoints
from troll_jax.experiment import Experiment
from troll_jax.learn import abstract_state, start_state
from troll_jax.models.lora import split
from troll_jax.models.quantization import PRECISIONS, quantise
from troll_jax.ops.losses import importance_weighted
from troll_jax.ops.needs import needs
from troll_jax.ops.regularisers import Regulariser, regularised
from troll_jax.optimizer import apply_gradients
from troll_jax.saved_batches import load_batches
from troll_jax.score import TailRule, make_recompute
from troll_jax.settings import Compute, Method, Objective, Sampling, scoring
from troll_jax.sharding import constrain_like, fetch, place
from troll_jax.types import Batch, TrainState, join
from troll_jax.update import Gradient, make_gradient, make_update

METHODS = ROOT / 'configs/objectives'
BASELINE = 'importance_weighted'  # the plain policy gradient, with which all are compared


@dataclass(frozen=True)
class Compared:
    """The part of a method that is compared; the data are the run's."""

    objective: Objective
    regularisers: Sequence[Regulariser]
    tail_rule: TailRule

    @property
    def needs_reference(self) -> bool:
        return any(needs(function, 'reference') for function in (self.objective, *self.regularisers))

    @property
    def loss(self) -> Objective:
        """The objective with its regularisers."""
        return regularised(self.objective, self.regularisers)


class Candidate(NamedTuple):
    """A method to compare, under a name."""

    name: str
    method: Compared
    same: list[str]  # other names of it: methods that differ in nothing that is compared


def replay(
    run_dir: str | Path,
    *,
    objectives: Sequence[str] = (),
    updates: int | None = None,
    step: int | None = None,
    batch: str | Path | None = None,
    lag: int = 0,
    precision: str | None = None,
    bindings: Sequence[str] = (),
) -> dict:
    """Compares objectives on a minibatch of a saved rollout. Writes and returns what the tables show.

    Args:
      run_dir: folder of the run.
      objectives: names of files of configs/objectives, or paths of others; all of that folder if none. The run's own
        and the plain policy gradient always take part.
      updates: m, minibatches that the run's objective learns from before. The next one is compared on. None: all but
        the last.
      step: step of the rollout; None is the latest.
      batch: a file of saved batches, in place of a step.
      lag: starts from the checkpoint of so many steps after the rollout's; π_old stays that of the rollout.
      precision: one of `PRECISIONS`, in which the rollout's checkpoint recomputes π_old; None: π_old as it was saved.
      bindings: gin bindings; they win over the run's configuration and the objectives' files.

    Raises:
      ValueError: there is no such rollout, checkpoint, objective or minibatch; or a precision, and another policy than
        the rollout's checkpoint has sampled it.
    """
    run_dir = Path(run_dir)
    config = Config([run_dir / 'config.gin'], bindings)
    path = rollout_file(run_dir, step) if batch is None else Path(batch)
    saved = load_batches(path)
    updates = len(saved.batches) - 1 if updates is None else updates
    if not 0 <= updates < len(saved.batches):
        raise ValueError(
            f'updates must leave one of the {len(saved.batches)} minibatches of {path} to compare on, 0 to '
            f'{len(saved.batches) - 1}; got {updates}'
        )
    if not np.any(saved.batches[updates].loss_weights > 0):
        raise ValueError(
            f'minibatch {updates + 1} of {path} has no token with a loss weight, so there is nothing to '
            'compare; choose another with --updates'
        )
    if lag < 0 or precision not in (None, *PRECISIONS):
        raise ValueError(
            f'lag must be at least 0 and precision one of {", ".join(PRECISIONS)}, or none; got {lag} and {precision!r}'
        )
    start, sampling, method, compute = (config.build(kind) for kind in (Experiment, Sampling, Method, Compute))
    run_lag = sampling.lag if method.old_policy == 'rollout' else 0  # recomputed, π_old is the checkpoint's
    if precision and run_lag:
        raise ValueError(
            f'the policy that sampled {path} was not saved, since the run has Sampling.lag = {run_lag}; leave out '
            '--precision, or train without a lag and replay with --lag'
        )
    compute = dataclasses.replace(compute, rollout_devices=None)  # nothing is sampled
    model, mesh = start.of_run(run_dir / 'model').load_model(compute, method.lora), compute.mesh
    policy, optimizer = scoring(sampling, method, compute), compute.place_optimizer(method.optimizer())
    candidates = find_methods(method, objectives, bindings, has_reference=saved.batches[0].reference is not None)
    own = next(candidate for candidate in candidates if 'run' in [candidate.name, *candidate.same])

    def programs(compared: Compared) -> tuple[Callable[..., Gradient], Callable[..., dict]]:
        """The gradient, and the logs of the tokens: of these the compiler leaves out the network's derivative."""
        scored = policy._replace(tail_rule=compared.tail_rule)
        inspect = make_gradient(model.config, inspected(compared.loss), scored)
        return jax.jit(make_gradient(model.config, compared.loss, scored)), jax.jit(lambda *args: inspect(*args).logs)

    @jax.jit
    def optimizer_step(gradient: dict, state: TrainState):
        return apply_gradients(optimizer, gradient, state, lambda _: (shapes.params, shapes.opt_state))[0].params

    @jax.jit
    def equal_step(gradient: dict, state: TrainState, length: jax.Array):
        params = optax.tree.add_scale(state.params, -length / optax.tree.norm(gradient), gradient)
        return constrain_like(params, lambda _: shapes.params)

    with jax.set_mesh(mesh):
        with Checkpoints(config.get('Run.checkpoint_folder') or run_dir, read_only=True) as checkpoints:
            checkpoint = max((s for s in checkpoints.steps if s <= saved.step), default=0)
            if lag and saved.step + lag not in checkpoints.steps:
                raise ValueError(
                    f'no checkpoint {saved.step + lag}, which is {lag} steps after the rollout of {path}; there are '
                    f'{checkpoints.steps}. Choose another --lag, or train with a smaller Run.checkpoint_every'
                )
            if precision and checkpoint != saved.step:
                raise ValueError(f'no checkpoint {saved.step} to recompute π_old with; there are {checkpoints.steps}')
            shapes = abstract_state(model.config, optimizer, mesh)
            init = lambda params: start_state(params, optimizer, shapes)
            load = partial(start.load_params, compute, method.lora)
            batches = [place(one, mesh) for one in saved.batches[: updates + 1]]
            state = restore_or_init(checkpoints, shapes, init, load, checkpoint)
            if precision:
                dtype = precision if precision == 'bfloat16' else model.config.compute_dtype
                recompute = make_recompute(dataclasses.replace(model.config, compute_dtype=dtype), policy)
                batches = [recompute(rounded(state.policy, precision), one)[0] for one in batches]
            if lag:
                checkpoint = saved.step + lag
                state = restore_or_init(checkpoints, shapes, init, load, checkpoint)
        plain, look = programs(Compared(importance_weighted, (), own.method.tail_rule))
        at_start = distances(look(state.params, state.progress, batches[0], state.base), batches[0])
        update = make_update(model.config, optimizer, own.method.loss, policy._replace(tail_rule=own.method.tail_rule))
        skipped = 0
        for one in batches[:-1]:
            state, log = update(state, one)
            skipped += int(log.metrics['skipped'])
        compared = batches[-1]
        inputs = state.params, state.progress, compared, state.base
        distances_at = lambda params: distances(look(params, *inputs[1:]), compared)
        before = distances_at(state.params)

        gradients, rows, outside, length = {}, {}, None, None
        for candidate in sorted(candidates, key=lambda candidate: candidate is not own):  # its tokens and its step
            gradient, inspect = (plain, look) if candidate.name == BASELINE else programs(candidate.method)
            got, logs = gradient(*inputs), inspect(*inputs)
            norm = optax.tree.norm(got.params)
            steps = {'after': optimizer_step(got.params, state)} if np.isfinite(norm) else {}
            if candidate is own:
                outside = fetch(logs['constrained'])
                length = optax.tree.norm(optax.tree.sub(steps['after'], state.params)) if steps else np.nan
            if steps and norm > 0 and np.isfinite(length):
                steps['after_equal_step'] = equal_step(got.params, state, length)
            moved = {step: distances_at(params) for step, params in steps.items()}
            gradients[candidate.name] = got.params
            rows[candidate.name] = (
                {'same': candidate.same, 'milliseconds': 1e3 * median_seconds(gradient, *inputs, repeats=5)}
                | describe(got, logs, compared, outside, model.tokenizer)
                | {
                    f'{name}_{step}': moved[step][name] if step in moved else None  # no step: not finite, or zero
                    for step in ('after', 'after_equal_step')
                    for name in before
                }
            )
        rows = {candidate.name: rows[candidate.name] for candidate in candidates}
        cosines = cosines_between(gradients)

    result = {
        'rollout': path.stem,
        'step': saved.step,
        'checkpoint': checkpoint,
        'minibatches': len(saved.batches),
        'updates': updates,
        'skipped_updates': skipped,
        'run_objective': own.name,
        'tokens': int(np.sum(fetch(compared.loss_weights) > 0)),
        'lag': lag,
        'precision': precision,
        'run_lag': run_lag,
        'kl_at_start': at_start['kl_mean'],
        'length_of_equal_step': _number(length),
        'before': before,
        'objectives': rows,
        'cosines': cosines,
    }
    if jax.process_index() == 0:
        name = f'replay_{path.stem}' + ('' if updates == len(saved.batches) - 1 else f'_after_{updates}')
        name += (f'_lag_{lag}' if lag else '') + (f'_{precision}' if precision else '')
        (run_dir / f'{name}.json').write_text(json.dumps(result, indent=2) + '\n')
        draw(result).savefig(run_dir / f'{name}.png', dpi=110)
    return result


def rollout_file(run_dir: Path, step: int | None) -> Path:
    """The rollout of a step, or the latest.

    Raises:
      ValueError: there is none, with those that there are.
    """
    steps = sorted(int(file.stem) for file in (run_dir / 'rollouts').glob('*.npz') if file.stem.isdecimal())
    if not steps or (step is not None and step not in steps):
        raise ValueError(
            f'{run_dir} has no saved rollout{"" if step is None else f" of step {step}"}; there are {steps}. Train '
            'with Run.save_rollout_every'
        )
    return run_dir / 'rollouts' / f'{steps[-1] if step is None else step}.npz'


def find_methods(
    run: Method, objectives: Sequence[str], bindings: Sequence[str], *, has_reference: bool = False
) -> list[Candidate]:
    """The methods to compare, each once, the plain policy gradient first and the run's own among them.

    A method is its file alone: of what the run's configuration sets for its own objective it has nothing but the
    tail rule, if the file has none. Methods that compare with a reference model are left out if the rollout has none.

    Raises:
      ValueError: such a method was asked for.
    """
    files = [find_file(name if name.endswith('.gin') else f'objectives/{name}') for name in objectives]
    files = files or sorted(METHODS.glob('*.gin'))
    found = {}
    for file in [METHODS / f'{BASELINE}.gin', *files]:
        config = Config([file], bindings)
        objective, regularisers, tail_rule = map(
            config.get, ('Method.objective', 'Method.regularisers', 'Method.tail_rule')
        )
        compared = Compared(objective, regularisers or (), tail_rule or run.tail_rule)
        if has_reference or not compared.needs_reference:
            found[file.stem] = compared
        elif objectives:
            raise ValueError(
                f'{file.stem} compares with a reference model, and the run that saved this rollout had none; leave it '
                'out, or train with kl_to_reference'
            )
    found['run'] = Compared(run.objective, run.regularisers, run.tail_rule)  # last: it takes the name of an equal file
    names = {}
    for name, compared in found.items():
        names.setdefault(str(to_bindings(compared)), []).append(name)
    return [Candidate(name, found[name], others) for name, *others in names.values()]


def rounded(params: dict, precision: str) -> dict:
    """The parameters that a sampler of this precision computes with; adapters stay as they are."""

    def round_layers(path: tuple, x: jax.Array) -> jax.Array:  # weights [layers, I, O], and vectors
        return quantise(x, precision, axis=-2) if path[0].key == 'layers' and x.ndim == 3 else x

    base, trained = split(params)
    weights = jax.jit(partial(jax.tree.map_with_path, round_layers))(trained if base is None else base)
    return weights if base is None else join(weights, trained)


def distances(logs: dict[str, jax.Array], batch: Batch) -> dict[str, float | None]:
    """KL(π̃ ‖ π_old) in nats and total variation over the tokens of a batch, and the entropy of π̃; None: not finite."""
    mask = fetch(batch.loss_weights) > 0
    kl, tv, entropy = (fetch(logs[name])[mask] for name in ('kl', 'total_variation', 'entropy'))
    p99 = np.quantile(kl, 0.99, method='nearest')
    values = {'kl_mean': kl.mean(), 'kl_p99': p99, 'kl_max': kl.max(), 'tv_mean': tv.mean(), 'entropy': entropy.mean()}
    return {name: _number(value) for name, value in values.items()}


def describe(got: Gradient, logs: dict, batch: Batch, outside: np.ndarray, tokenizer) -> dict:
    """The figures of one objective on a batch.

    Args:
      got: gradient of the objective.
      logs: those of `inspected`.
      batch: batch of both.
      outside: [M, Z, S] bool, the tokens that the run's objective constrains.
      tokenizer: gives the text of a token whose loss or gradient is not finite.
    """
    batch, logs = fetch(batch), fetch(logs)
    mask = batch.loss_weights > 0
    affected = logs['constrained']
    silenced = (logs['kept'] < SILENCED) & (batch.advantages != 0)
    finite = np.logical_and.reduce([np.isfinite(logs[x]) for x in ('token_loss', 'token_gradient', 'log_prob')])
    broken = np.argwhere(mask & ~finite)
    norm, loss = (float(fetch(x)) for x in (optax.tree.norm(got.params), got.loss))
    return {
        'loss': _number(loss),
        'finite': bool(np.isfinite(norm) and np.isfinite(loss)),
        'gradient_norm': _number(norm),
        'affected_share': float(affected[mask].mean()),
        'silenced_share': float(silenced[mask].mean()),
        'held': held(affected, mask, batch.advantages, batch.old_log_probs),
        'outside': summarise(logs, mask & outside & (batch.advantages != 0)),
        'broken_tokens': len(broken),
        'first_broken': _token(tuple(broken[0]), batch, logs, tokenizer) if len(broken) else None,
    }


def _token(where: tuple[int, int, int], batch: Batch, logs: dict[str, np.ndarray], tokenizer) -> dict:
    """A token at [M, Z, S], what stands before it, and its numbers, as text where they are not finite."""
    *row, s = where
    own = (batch.segment_ids[*row] == batch.segment_ids[where]) & (np.arange(batch.tokens.shape[-1]) < s)
    numbers = {
        'log_prob': logs['log_prob'],
        'old_log_prob': batch.old_log_probs,
        'advantage': batch.advantages,
        'loss': logs['token_loss'],
        'gradient': logs['token_gradient'],
    }
    values = {name: float(array[where]) for name, array in numbers.items()}
    return {
        'micro_batch_row_position': [int(i) for i in where],
        'token': int(batch.tokens[where]),
        'text': tokenizer.decode([int(batch.tokens[where])]),
        'after': tokenizer.decode(batch.tokens[*row][own].tolist()),
    } | {name: value if np.isfinite(value) else str(value) for name, value in values.items()}


def cosines_between(gradients: dict[str, dict]) -> dict[str, dict[str, float | None]]:
    """The cosines of all pairs of gradients; None where one of them is zero or not finite."""
    unit = lambda x: optax.tree.scale(1 / optax.tree.norm(x), x)
    product = jax.jit(lambda one, other: optax.tree.vdot(unit(one), unit(other)))
    names = list(gradients)
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1)]
    upper = {(i, j): _number(fetch(product(gradients[names[i]], gradients[names[j]]))) for i, j in pairs}
    return {one: {other: upper[max(i, j), min(i, j)] for j, other in enumerate(names)} for i, one in enumerate(names)}


def _number(value) -> float | None:
    """For JSON, which has no NaN."""
    return float(value) if np.isfinite(value) else None
