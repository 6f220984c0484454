"""Compares objectives on one saved rollout: what each of them makes of the very same data.

    troll replay RUN_DIR [--objectives troll clip dppo] [--updates 7] ['troll.bound = 0.1' …]

The run saved the rollout with `Run.save_rollout_every`. From the checkpoint of its step, its first minibatches are
learnt from as the run did, so that π̃ is away from π_old. On the next one the gradient of every objective is taken, and
steps along it, always from the same state. Prints tables, and writes `replay_<rollout>.json` and `.png`
into the run's folder. docs/replay.md says how to read them. Memory is needed for one more copy of the parameters per
objective.
"""

import logging

import jax

from experiments.plumbing.command import begin, command_line, run_command
from experiments.studies.replay import replay
from experiments.studies.replay_report import report
from troll_jax.models.quantization import PRECISIONS


def main() -> None:
    parser = command_line(__doc__, 'run_dir', help='folder of a run')
    parser.add_argument(
        '--objectives', nargs='+', default=[], help='names of configs/objectives, or gin files; all by default'
    )
    parser.add_argument('--updates', type=int, help='minibatches to learn from before; all but one by default')
    which = parser.add_mutually_exclusive_group()
    which.add_argument('--step', type=int, help='of the rollout; the latest by default')
    which.add_argument('--batch', help='a file of saved batches')
    parser.add_argument('--lag', type=int, default=0, help='steps that the rollout is older than the parameters')
    parser.add_argument('--precision', choices=PRECISIONS, help='recomputes π_old with weights of this precision')
    arguments = parser.parse_intermixed_args()
    begin(arguments, level=logging.WARNING)
    is_binding = lambda argument: '=' in argument  # one that follows --objectives
    result = replay(
        arguments.run_dir,
        objectives=[name for name in arguments.objectives if not is_binding(name)],
        updates=arguments.updates,
        step=arguments.step,
        batch=arguments.batch,
        lag=arguments.lag,
        precision=arguments.precision,
        bindings=[*arguments.bindings, *filter(is_binding, arguments.objectives)],
    )
    if jax.process_index() == 0:
        print(report(result))


if __name__ == '__main__':
    run_command(main)
