"""The commands of this folder: `troll train …`, from any folder, is `python -m experiments.train …`."""

import ast
import difflib
import importlib
import os
import sys
from pathlib import Path

FILES = {file.stem: file for file in sorted(Path(__file__).parent.glob('*.py')) if not file.stem.startswith('_')}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else '--help'
    if name in ('-h', '--help'):
        print('usage: troll COMMAND …, with --help for what a command takes\n')
        for command, file in FILES.items():
            print(
                f'  {command:{max(map(len, FILES))}}  {ast.get_docstring(ast.parse(file.read_text())).splitlines()[0]}'
            )
        return
    if name not in FILES:
        near = difflib.get_close_matches(name, FILES, n=1, cutoff=0.0)[0]
        sys.exit(f'error: no command {name!r}. Did you mean {near!r}? Expected one of {", ".join(FILES)}')
    sys.argv[:2] = [f'troll {name}']
    sys.path.append(os.getcwd())  # gin files import modules from there, as with `python -m`
    command = importlib.import_module(f'experiments.{name}')
    # After the command, which may choose JAX's platform when it is imported.
    importlib.import_module('experiments.plumbing.command').run_command(command.main)


if __name__ == '__main__':
    main()
