"""Commands: their arguments, several processes, and how they end on an error."""

import argparse
import difflib
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import jax

import troll_jax
from experiments.plumbing.gin_files import Config, find_file, nearest_bindings
from experiments.plumbing.names import NAMES, SETTINGS
from experiments.plumbing.settings_help import describe
from troll_jax.rewards.worker import CannotGrade

CONFIG_HELP = (
    'a configuration, and more after it: shipped ones by their names (gsm8k qwen3_0_6b troll), others as x.gin'
)

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


class Parser(argparse.ArgumentParser):
    """Arguments of a command with settings: `--help` lists them too, and `--help NAME` what may be bound of a name."""

    def __init__(self, description: str, settings: Sequence[Callable] = SETTINGS):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, add_help=False)
        names = {target.__name__: target for target in settings}

        class Help(argparse.Action):
            def __call__(self, parser, namespace, name, option_string=None):
                if name is None:
                    parser.epilog = '\n\n'.join(map(describe, names, settings))
                    parser.print_help()
                elif name in NAMES | names:
                    print(describe(name, (NAMES | names)[name]))
                else:
                    near = difflib.get_close_matches(name, NAMES | names, n=1, cutoff=0.0)[0]
                    parser.error(f'nothing is called {name!r}. Did you mean {near!r}?')
                parser.exit()

        text = 'this, and all settings; with a name, such as adamw, the settings of that'
        self.add_argument('-h', '--help', nargs='?', action=Help, metavar='NAME', help=text)

    def error(self, message: str) -> NoReturn:
        if found := re.match(r'unrecognized arguments: --?([\w./-]+)=?(\S*)', message):
            name, value = found[1].replace('-', '_'), found[2] or '…'
            names = [name] if '.' in name else nearest_bindings(name)
            message += f'. Settings have no dashes: write {" or ".join(f"{name}={value}" for name in names)}'
        super().error(message)


def command_line(
    description: str, name: str, help: str, settings: Sequence[Callable] = SETTINGS
) -> argparse.ArgumentParser:
    """The arguments of all commands, `name` first. Options may stand anywhere: use `parse_intermixed_args`."""
    parser = Parser(description, settings)
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


def read_command_line(
    description: str, settings: Sequence[Callable] = SETTINGS, commands: Sequence[Callable] = ()
) -> Config:
    """Starts a command that takes gin files and bindings, and reads these. `Run.folder` is named after the files."""
    arguments = command_line(description, 'config', CONFIG_HELP, [*settings, *commands]).parse_intermixed_args()
    begin(arguments)
    files, bindings = files_and_bindings([arguments.config, *arguments.bindings])
    config = Config(files, bindings, commands)
    config.setdefault('Run.folder', f'runs/{"_".join(find_file(file).stem for file in files)}')
    return config


def files_and_bindings(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tells files and bindings apart: those have '=' or a space, as in 'import my_module', and do not end in '.gin'."""
    is_binding = lambda word: not word.endswith('.gin') and ('=' in word or ' ' in word)
    return [word for word in words if not is_binding(word)], [word for word in words if is_binding(word)]
