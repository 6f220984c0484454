"""Commands: their arguments, several processes, and how they end on an error."""

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

import troll_jax
from experiments.plumbing.gin_files import Config
from troll_jax.rewards.worker import CannotGrade

CONFIG_HELP = 'a gin file; more of them may follow, such as those of configs/objectives after a task'

_OURS = (Path(__file__).parents[1], Path(troll_jax.__file__).parent)
_PEER_TIMEOUT = 30  # seconds without a sign of life after which another process counts as dead


def run_command(main: Callable[[], None]) -> None:
    """Runs a command. A user error prints one line, with exit status 2; a bug keeps its traceback.

    User errors are an OSError that says more than its number does, CannotGrade, and a ValueError that this code raises
    itself. With TROLL_TRACEBACK=1 in the environment they have a traceback too.
    """
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get('TROLL_TRACEBACK') == '1' or not _is_of_the_user(error):
            raise
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        sys.exit(2)


def _is_of_the_user(error: Exception) -> bool:
    if isinstance(error, CannotGrade):
        return True
    if isinstance(error, OSError):  # of 'Broken pipe' without a file only a traceback says what it was about
        return error.filename is not None or error.errno is None and bool(str(error))
    raised = traceback.extract_tb(error.__traceback__)[-1]
    # On purpose, by a statement `raise`: not what int() or an unpacking raised in the middle of a line.
    on_purpose = raised.line is not None and raised.line.startswith('raise')
    return isinstance(error, ValueError) and on_purpose and not set(_OURS).isdisjoint(Path(raised.filename).parents)


def command_line(description: str, name: str, help: str) -> argparse.ArgumentParser:
    """The arguments of all commands, `name` first. Options may stand anywhere: use `parse_intermixed_args`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(name, help=help)
    parser.add_argument('bindings', nargs='*', help="gin bindings that win over files', such as 'Run.steps = 20'")
    several = parser.add_argument_group('several processes', 'the same command on every host, see docs/multi_host.md')
    several.add_argument(
        '--distributed', action='store_true', help='join the other processes, as TPU pods, SLURM, Kubernetes or MPI say'
    )
    several.add_argument('--coordinator', help='host:port of the first process, where nothing says it')
    several.add_argument('--num-processes', type=int)
    several.add_argument('--process-id', type=int, help='from 0')
    return parser


def start_log(level: int = logging.INFO) -> None:
    """Turns on the log."""
    # Force: libraries have set up logging of their own when they were imported, and nothing of ours would be seen.
    logging.basicConfig(level=level, format='%(levelname)s %(name)s: %(message)s', force=True)
    logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax warns that checkpoints that are only read are only read


def begin(arguments: argparse.Namespace, level: int = logging.INFO) -> None:
    """Turns on the log and joins the other processes. Comes before anything that asks JAX for its devices.

    Raises:
      ValueError: where the other processes are is not known.
    """
    start_log(level)
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


def read_command_line(description: str, commands: Sequence[Callable] = ()) -> Config:
    """Starts a command that takes gin files and bindings, and reads these. `Run.folder` is named after the files."""
    arguments = command_line(description, 'config', help=CONFIG_HELP).parse_intermixed_args()
    begin(arguments)
    files, bindings = files_and_bindings(arguments)
    config = Config(files, bindings, commands)
    config.setdefault('Run.folder', f'runs/{"_".join(Path(file).stem for file in files)}')
    return config


def files_and_bindings(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Tells files and bindings apart: arguments that end in '.gin' are files."""
    is_file = lambda argument: argument.endswith('.gin')
    files = [arguments.config, *filter(is_file, arguments.bindings)]
    return files, [argument for argument in arguments.bindings if not is_file(argument)]
