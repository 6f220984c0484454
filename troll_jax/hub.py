"""A name may be that of a local folder, a GGUF file or an id on the hub: errors that say what was looked for."""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGE = 'package:'


def is_path(name: str) -> bool:
    """True if a name cannot be an id on the hub."""
    return name.startswith(('.', '/', '~')) or '\\' in name


def what_is_there(name: str | Path) -> str:
    """For an error about a path that does not exist: the last part of it that does, and what is in that."""
    folder = Path(name).absolute()
    while not folder.is_dir():
        folder = folder.parent
    entries = sorted(entry.name for entry in folder.iterdir())
    return f'{str(folder)!r} has {entries[:20]}{" and more" if len(entries) > 20 else ""}'


def gguf_file(model: str | Path) -> Path | None:
    """The GGUF file that a model's name stands for: a path, or `package:` and a Python package that has one.

    Returns None for the name of any other model.

    Raises:
      FileNotFoundError: no such file, no such package, or not one such file in its folder.
    """
    name = str(model)
    if name.startswith(PACKAGE):
        package = name.removeprefix(PACKAGE)
        spec = importlib.util.find_spec(package) if package.isidentifier() else None  # without importing it
        folders = (spec.submodule_search_locations if spec else None) or []
        files = [file for folder in folders for file in Path(folder).glob('*.gguf')]
        if len(files) != 1:
            got = [file.name for file in files] if spec else 'no such package'
            raise FileNotFoundError(f'{name!r}: expected an installed package with one .gguf file; got {got}')
        return files[0]
    if not name.endswith('.gguf') or Path(name).is_dir():
        return None
    if not Path(name).is_file():
        raise FileNotFoundError(f'{name!r} is not a file: {what_is_there(name)}')
    return Path(name)


@contextmanager
def model_of_folder_or_hub(model: str) -> Iterator[None]:
    """Around what loads a model or a part of it.

    Raises:
      FileNotFoundError: the name can only be that of a folder and there is none, before anything is loaded; or it is
        no folder, and the hub does not have it, cannot be reached, or its files cannot be kept.
    """
    from huggingface_hub import errors  # not at the top: grading workers import this module

    if Path(model).is_dir():
        yield
        return
    if is_path(model) or model.count('/') > 1 or Path(model).exists():
        raise FileNotFoundError(
            f'{model!r} is not a folder: {what_is_there(model)}. Expected the folder of a model with config.json, a '
            ".gguf file, or an id on the Hugging Face hub such as 'Qwen/Qwen3-0.6B'. Correct the path; ~ has to be "
            'written out.'
        )
    try:
        yield
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f'{model!r} is not a folder, and cannot be had from the hub: {error} If a folder was meant: '
            f'{what_is_there(model)}.'
        ) from error


def version_of(model: str) -> str | None:
    """The commit of a model of the hub in the copy that is loaded, name and size of a GGUF file; None of a folder."""
    from huggingface_hub import try_to_load_from_cache

    if (file := gguf_file(model)) is not None:
        return f'{file.name} of {file.stat().st_size} bytes'
    if Path(model).is_dir() or is_path(model):
        return None
    found = try_to_load_from_cache(model, 'config.json')
    return Path(found).parent.name if isinstance(found, str) else None


def read_json(file: Path) -> dict[str, Any]:
    """An object in a file of a model. Raises a ValueError, which names the file, if it holds anything else."""
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{file} is damaged: {error}; copy or download it again') from error
    if not isinstance(content, dict):
        raise ValueError(f'{file} is damaged: got {str(content)[:80]!r}, expected an object; copy or download it again')
    return content
