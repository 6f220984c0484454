"""Compares objectives on one saved rollout: what each of them makes of the very same data.

    python -m experiments.replay RUN_DIR [--objectives troll clip dppo] [--updates 7] ['troll.bound = 0.1' …]

The run saved the rollout with `train.save_rollout_every`. From the parameters that sampled it, its first minibatches
are learnt from as the run did, so that π̃ is away from π_old. On the next one the gradient of every objective is taken,
and one optimizer step with it, always from the same state. Prints tables, and writes `replay_<rollout>.json` and `.png`
into the run's folder. docs/replay.md says how to read them. Memory is needed for one more copy of the parameters per
objective.
"""

import dataclasses
import difflib
import functools
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.command import run_command
from experiments.config import Experiment, begin, checkpoint_folder, command_line, parse
from experiments.replay_report import plot, report
from experiments.run_folder import restore_or_start
from experiments.train import train
from troll_jax.checkpoint import Checkpoints
from troll_jax.learn import abstract_state, start_state
from troll_jax.ops.losses import TokenLogProbs, TokenLosses, importance_weighted
from troll_jax.ops.regularisers import regularised
from troll_jax.optimizer import apply_gradients
from troll_jax.saved_batches import load_batches
from troll_jax.sharding import constrain_like, fetch, place
from troll_jax.types import START, Batch, Progress, TrainState
from troll_jax.update import Gradient, Objective, TailRule, make_gradient, make_update

METHODS = Path(__file__).parent.parent / 'configs/objectives'
BASELINE = 'importance_weighted'  # the plain policy gradient, with which all are compared
COMPARED = ('train.objective', 'train.regularisers', 'train.tail_rule')  # of a method; its data are the run's


class Method(NamedTuple):
    """An objective with all that it is made of."""

    name: str
    bindings: frozenset[str]  # lines of gin: those of `COMPARED` and of what they name
    same: list[str]  # other names of it: methods that differ in nothing that is compared


def replay(
    run_dir: str | Path,
    *,
    objectives: Sequence[str] = (),
    updates: int | None = None,
    step: int | None = None,
    batch: str | Path | None = None,
    bindings: Sequence[str] = (),
) -> dict:
    """Compares objectives on a minibatch of a saved rollout. Writes and returns what the tables show.

    Args:
      run_dir: folder of the run.
      objectives: names of files of configs/objectives, or paths of others; all of that folder if none. The run's own
        and the plain policy gradient always take part.
      updates: m, minibatches that the run's objective learns from before. The next one is compared on. With 0 the
        policy is the one that sampled. None: all but the last.
      step: of the rollout; None is the latest.
      batch: a file of saved batches, in place of a step.
      bindings: of gin; they win over the run's configuration and the objectives' files.

    Raises:
      ValueError: there is no such rollout, checkpoint, objective or minibatch.
    """
    run_dir = Path(run_dir)
    gin.clear_config()
    parse([run_dir / 'config.gin'], bindings)
    path = rollout_file(run_dir, step) if batch is None else Path(batch)
    saved = load_batches(path)
    updates = len(saved.batches) - 1 if updates is None else updates
    if not 0 <= updates < len(saved.batches):
        raise ValueError(
            f'updates must leave one of the {len(saved.batches)} minibatches of {path} to compare on, 0 to '
            f'{len(saved.batches) - 1}; got {updates}'
        )
    start = Experiment()
    experiment = dataclasses.replace(start, model=str(run_dir / 'model'), chat_template_from=None)
    tokenizer = experiment.load_tokenizer()
    config = experiment.decoder_config(tokenizer)
    settings = {name: p.default for name, p in inspect.signature(train).parameters.items()} | gin.get_bindings('train')
    policy = {name: settings[name] for name in ('temperature', 'max_tokens', 'mass', 'head_chunk')}
    optimizer = settings['optimizer']
    methods = find_methods(objectives, bindings, has_reference=saved.batches[0].reference is not None)
    own = next(method for method in methods if 'run' in [method.name, *method.same])

    def gradient_of(objective: Objective, tail_rule) -> Callable[[dict, Progress, Batch], Gradient]:
        return jax.jit(make_gradient(config, objective=inspected(objective), tail_rule=tail_rule, **policy))

    @jax.jit
    def step_along(gradient: dict, state: TrainState):
        params, _ = apply_gradients(optimizer, gradient, state.opt_state, state.params, jnp.bool(True))
        return constrain_like(params, lambda _: shapes.params)

    with jax.set_mesh(experiment.mesh):
        with Checkpoints(checkpoint_folder(run_dir), read_only=True) as checkpoints:
            checkpoint = max((s for s in checkpoints.steps if s <= saved.step), default=0)
            shapes = abstract_state(config, optimizer, experiment.mesh)
            begin_with = functools.partial(start_state, optimizer=optimizer, shapes=shapes)
            state = restore_or_start(checkpoints, start, shapes, begin_with, checkpoint)
        batches = [place(one, experiment.mesh, (None, 'batch')) for one in saved.batches[: updates + 1]]
        run_objective, tail_rule = functions_of(own)
        plain = gradient_of(importance_weighted, tail_rule)
        noise = distances(plain(state.params, state.progress, batches[0]), batches[0])
        update = make_update(config, optimizer, objective=run_objective, tail_rule=tail_rule, **policy)
        skipped = 0
        for one in batches[:-1]:
            state, log = update(state, one)
            skipped += int(log.metrics['skipped'])
        compared = batches[-1]
        before = plain(state.params, state.progress, compared)

        gradients, rows = {BASELINE: before.params}, {}
        for method in methods:
            gradient = plain if method.name == BASELINE else gradient_of(*functions_of(method))
            got = gradient(state.params, state.progress, compared)
            gradients[method.name] = got.params
            after = None
            if np.isfinite(optax.tree.norm(got.params)):
                after = plain(step_along(got.params, state), state.progress, compared)
            rows[method.name] = {'same': method.same} | describe(got, before, after, compared, tokenizer)
        cosines = cosines_between(gradients)

    result = {
        'rollout': path.stem,
        'step': saved.step,
        'checkpoint': checkpoint,
        'minibatches': len(saved.batches),
        'updates': updates,
        'skipped_updates': skipped,
        'run_objective': own.name,
        'tokens': int(np.sum(fetch(compared.weights) > 0)),
        'kl_of_sampler': noise['kl_mean'],
        'before': distances(before, compared),
        'objectives': rows,
        'cosines': cosines,
    }
    if jax.process_index() == 0:
        name = f'replay_{path.stem}' + ('' if updates == len(saved.batches) - 1 else f'_after_{updates}')
        (run_dir / f'{name}.json').write_text(json.dumps(result, indent=2) + '\n')
        plot(result, run_dir / f'{name}.png')
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
            'with train.save_rollout_every'
        )
    return run_dir / 'rollouts' / f'{steps[-1] if step is None else step}.npz'


def find_methods(objectives: Sequence[str], bindings: Sequence[str], *, has_reference: bool = False) -> list[Method]:
    """The methods to compare, each once, the plain policy gradient first and the run's own among them.

    A method is its file alone: nothing that the run's configuration sets for its own objective is left in it but the
    rule for tails, if the file has none. The run's configuration must have been read. Methods that compare with a
    reference model are left out where the rollout has none.

    Raises:
      ValueError: such a method was asked for.
    """
    files = [method_file(name) for name in objectives] or sorted(METHODS.glob('*.gin'))
    tail = bindings_of(['train.tail_rule'])
    found = {'run': bindings_of(COMPARED)}
    for file in [METHODS / f'{BASELINE}.gin', *files]:
        read(tail)
        parse([file], bindings)
        method = bindings_of(COMPARED)
        if has_reference or not any('@kl_to_reference' in line for line in method):
            found[file.stem] = method
        elif objectives:
            raise ValueError(
                f'{file.stem} compares with a reference model, and the run that saved this rollout had none; leave it '
                'out, or train with @kl_to_reference'
            )
    found['run'] = found.pop('run')  # last: it takes the name of a file that says the same
    names = {}
    for name, lines in found.items():
        names.setdefault(lines, []).append(name)
    return [Method(name, lines, others) for lines, (name, *others) in names.items()]


def method_file(name: str) -> Path:
    """The gin file that is meant by its path, or by its name in configs/objectives."""
    file = Path(name) if name.endswith('.gin') else METHODS / f'{name}.gin'
    if not file.is_file():
        known = sorted(file.stem for file in METHODS.glob('*.gin'))
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(f'no objective {name!r}. Did you mean {near!r}? Known: {", ".join(known)}, or a gin file')
    return file


def bindings_of(parameters: Sequence[str]) -> frozenset[str]:
    """Of what gin has read, the lines that bind these parameters, and those of all that they name."""
    lines = gin.config_str(max_line_length=10**6).splitlines()
    found = {line for line in lines if line.startswith(tuple(f'{name} =' for name in parameters))}
    size = 0
    while size < len(found):
        size = len(found)
        names = {name for line in found for name in re.findall(r'[@%]([\w.]+)', line)}
        found |= {line for line in lines for name in names if re.match(rf'{re.escape(name)}(\.\w+)? =', line)}
    return frozenset(found)


def functions_of(method: Method) -> tuple[Objective, TailRule]:
    """The objective of a method with its regularisers, and its rule for tails.

    What gin makes reads its settings when it is called, so these carry them: each can be traced at any time.
    """

    def with_settings(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            read(method.bindings)
            return function(*args, **kwargs)

        return call

    read(method.bindings)
    bound = {'regularisers': ()} | gin.get_bindings('train')
    return with_settings(regularised(bound['objective'], bound['regularisers'])), with_settings(bound['tail_rule'])


def read(bindings: Iterable[str]) -> None:
    """Makes these lines all that gin knows."""
    gin.clear_config()
    gin.parse_config(sorted(bindings))


def inspected(objective: Objective) -> Objective:
    """An objective whose logs also say of each token what its loss is and what gradient it sends into the policy.

    `token_gradient` [T] is the largest derivative of the row's losses by any log-probability of that token's
    distribution, or by its entropy.
    """

    def with_logs(row: TokenLogProbs, advantages: jax.Array, progress: Progress = START) -> TokenLosses:
        fixed = jax.lax.stop_gradient(row)

        def total(log_probs, listed, entropy):
            new = fixed.new._replace(log_probs=listed)
            changed = fixed._replace(new_log_probs=log_probs, new=new, entropy=entropy)
            return jnp.sum(jnp.where(fixed.segments > 0, objective(changed, advantages, progress).loss, 0.0))

        sampled, listed, entropy = jax.grad(total, argnums=(0, 1, 2))(
            fixed.new_log_probs, fixed.new.log_probs, fixed.entropy
        )
        losses = objective(row, advantages, progress)
        size = jnp.maximum(jnp.maximum(jnp.abs(sampled), jnp.abs(entropy)), jnp.max(jnp.abs(listed), axis=-1))
        logs = {'token_loss': losses.loss, 'token_gradient': size, 'log_prob': row.new_log_probs}
        return losses._replace(logs=losses.logs | jax.lax.stop_gradient(logs))

    return with_logs


def distances(gradient: Gradient, batch: Batch) -> dict[str, float | None]:
    """How far the policy is from π_old over the tokens of a batch, KL(π̃ ‖ π_old) in nats, and its entropy."""
    mask = fetch(batch.weights) > 0
    kl, entropy = (fetch(gradient.logs[name])[mask] for name in ('kl', 'entropy'))
    p99 = np.quantile(kl, 0.99, method='nearest')
    values = {'kl_mean': kl.mean(), 'kl_p99': p99, 'kl_max': kl.max(), 'entropy': entropy.mean()}
    return {name: _number(value) for name, value in values.items()}


def describe(got: Gradient, before: Gradient, after: Gradient | None, batch: Batch, tokenizer) -> dict:
    """What one objective makes of a batch.

    Args:
      got: its gradient.
      before: that of the plain policy gradient, from the same state.
      after: the same after one step along `got`; None if that is not finite.
      batch: of both.
      tokenizer: for the text of a token whose loss or gradient is not finite.
    """
    batch, logs = fetch(batch), fetch(got.logs)
    mask = batch.weights > 0
    affected = logs.get('projected', logs.get('clipped', np.zeros_like(mask)))
    silenced = (logs['token_gradient'] == 0) & (batch.advantages != 0)
    finite = np.logical_and.reduce([np.isfinite(logs[x]) for x in ('token_loss', 'token_gradient', 'log_prob')])
    broken = np.argwhere(mask & ~finite)
    norm, loss = (float(fetch(x)) for x in (optax.tree.norm(got.params), got.loss))
    result = {
        'loss': _number(loss),
        'finite': bool(np.isfinite(norm) and np.isfinite(loss)),
        'gradient_norm': _number(norm),
        'affected_share': float(affected[mask].mean()),
        'silenced_share': float(silenced[mask].mean()),
        'broken_tokens': len(broken),
        'first_broken': _token(tuple(broken[0]), batch, logs, tokenizer) if len(broken) else None,
    }
    new = dict.fromkeys(('kl_mean', 'kl_p99', 'kl_max', 'entropy')) if after is None else distances(after, batch)
    old = distances(before, batch)['entropy']
    result['entropy_change'] = None if None in (new['entropy'], old) else new['entropy'] - old
    return result | {f'{name}_after': new[name] for name in ('kl_mean', 'kl_p99', 'kl_max')}


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
    product = jax.jit(optax.tree.vdot)
    unit = jax.jit(lambda x: optax.tree.scale(1 / optax.tree.norm(x), x))
    names, units = list(gradients), [unit(gradient) for gradient in gradients.values()]
    upper = {(i, j): _number(fetch(product(units[i], units[j]))) for i in range(len(names)) for j in range(i + 1)}
    return {one: {other: upper[max(i, j), min(i, j)] for j, other in enumerate(names)} for i, one in enumerate(names)}


def _number(value) -> float | None:
    """For JSON, which has no NaN."""
    return float(value) if np.isfinite(value) else None


def main() -> None:
    parser = command_line(__doc__, 'run_dir', help='folder of a run')
    parser.add_argument(
        '--objectives', nargs='+', default=[], help='names of configs/objectives, or gin files; all by default'
    )
    parser.add_argument('--updates', type=int, help='minibatches to learn from before; all but one by default')
    which = parser.add_mutually_exclusive_group()
    which.add_argument('--step', type=int, help='of the rollout; the latest by default')
    which.add_argument('--batch', help='a file of saved batches')
    arguments = parser.parse_intermixed_args()
    begin(arguments, level=logging.WARNING)
    is_binding = lambda argument: '=' in argument  # one that follows --objectives
    result = replay(
        arguments.run_dir,
        objectives=[name for name in arguments.objectives if not is_binding(name)],
        updates=arguments.updates,
        step=arguments.step,
        batch=arguments.batch,
        bindings=[*arguments.bindings, *filter(is_binding, arguments.objectives)],
    )
    if jax.process_index() == 0:
        print(report(result))


if __name__ == '__main__':
    run_command(main)
