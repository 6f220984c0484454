"""How a command ends that meets an error: one line for what its user can mend, a traceback for a bug."""

import dis
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import gin

import troll_jax
from troll_jax.rewards.worker import CannotGrade

_OURS = (Path(__file__).parent, Path(troll_jax.__file__).parent)
_GIN = Path(gin.__file__).parent


def run_command(main: Callable[[], None]) -> None:
    """Runs a command. An error that its user can mend is one line, with exit status 2; a bug keeps its traceback.

    The user's are an OSError that says more than its number does, CannotGrade, a ValueError that this code raises
    itself, and calls that gin finds incomplete. With TROLL_TRACEBACK=1 in the environment they have a traceback too.
    """
    try:
        main()
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if os.environ.get('TROLL_TRACEBACK') == '1' or not _is_of_the_user(error):
            raise
        print(f'error: {_one_line(error)}', file=sys.stderr)
        sys.exit(2)


def _is_of_the_user(error: Exception) -> bool:
    if isinstance(error, CannotGrade):
        return True
    if isinstance(error, OSError):  # of 'Broken pipe' without a file only a traceback says what it was about
        return error.filename is not None or error.errno is None and bool(str(error))
    raised = error.__traceback__
    while raised.tb_next is not None:
        raised = raised.tb_next
    code = raised.tb_frame.f_code
    if _GIN in Path(code.co_filename).parents:
        return True
    # On purpose, by a statement `raise`: not what int() or an unpacking raised in the middle of a line.
    on_purpose = code.co_code[raised.tb_lasti] == dis.opmap['RAISE_VARARGS']
    return isinstance(error, ValueError) and on_purpose and not set(_OURS).isdisjoint(Path(code.co_filename).parents)


def _one_line(error: Exception) -> str:
    """The message, behind the name of what was called, in place of gin's own account of that."""
    message, *calls = re.split(r"\s*In call to configurable '([\w.]+)'[^\n]*", str(error))
    if calls and isinstance(error, TypeError):
        message = _of_call(calls[0], message)
    elif calls:
        message = f'{calls[0]}: {message}'
    return ' '.join(message.split())


def _of_call(name: str, message: str) -> str:
    """What to do about a call without what it needs, or with more than it takes."""
    bound = re.findall(rf'^(\S+) = .*@{name}\b(?!\()', gin.config_str(), re.MULTILINE)
    if bound:
        why = message.strip().splitlines()[0]
        where = ' or '.join(bound)
        return (
            f'{where} is @{name}, which is not called as it is there ({why}); expected a function that is. Change it.'
        )
    if unbound := re.search(r'for arguments: \[(.+?)\]', message):  # in gin's account
        lines = ', '.join(f'{name}.{parameter}' for parameter in re.findall(r"'(\w+)'", unbound[1]))
        return f'{name} needs {lines}, and nothing binds them; bind each, or add a gin file that does'
    return f'{name}: {message}'
