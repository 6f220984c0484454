"""Writes a checkpoint of a run in Hugging Face format, for transformers, vLLM or another run to start from.

    troll export RUN_DIR FOLDER [--step N] [--adapters]

Of a run with LoRA the weights with its adapters merged into them, or with --adapters these alone, in PEFT's format.
"""

import argparse
import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import jax

from experiments.plumbing.command import run_command, start_log
from experiments.plumbing.gin_files import Config
from troll_jax.checkpoint import Checkpoints
from troll_jax.models import decoder as decoders
from troll_jax.models.families import decoder_config
from troll_jax.models.hf_weights import load_config, load_pretrained, save_adapters, save_pretrained
from troll_jax.models.lora import merge
from troll_jax.sharding import make_mesh


def export(run_dir: str, folder: str, step: int | None = None, *, adapters: bool = False) -> int:
    """Exports a checkpoint of a run, the latest by default, or its adapters alone; returns its step.

    Raises:
      ValueError: no such checkpoint; adapters of a run without.
      FileNotFoundError: not a run's folder.
    """
    if not (Path(run_dir) / 'model').is_dir():
        raise FileNotFoundError(f'{run_dir!r} is not the folder of a run: there is no {run_dir}/model')
    hf_config, mesh, file = load_config(Path(run_dir) / 'model'), make_mesh(), Path(run_dir) / 'config.gin'
    config = Config([file] if file.is_file() else [])
    where = config.get('Run.checkpoint_folder') or run_dir
    start = config.get('Experiment.model') or config.get('Finetuning.model')
    lora = config.get('Method.lora') or config.get('Finetuning.lora')
    if adapters and lora is None:
        raise ValueError(f'{run_dir} has no adapters: it was trained without Method.lora; leave --adapters out')
    shapes = decoders.abstract(dataclasses.replace(decoder_config(hf_config), lora=lora), mesh)[1]
    with Checkpoints(where, read_only=True) as checkpoints:
        if not checkpoints.steps:
            raise ValueError(f'no whole checkpoint in {checkpoints.path}')
        step = checkpoints.steps[-1] if step is None else step
        params = checkpoints.restore_params(shapes, step, lambda: load_pretrained(start, mesh=mesh)[1])
    if adapters:
        save_adapters(folder, params, hf_config, lora, start)
    else:
        write_model(run_dir, folder, merge(params, lora))
    return step


def write_model(run_dir: str | Path, folder: str | Path, params: Any) -> None:
    """Writes parameters of a run in Hugging Face format. With several processes each must call this."""
    hf_config = load_config(Path(run_dir) / 'model')
    if jax.process_index() == 0:
        shutil.copytree(Path(run_dir) / 'model', folder, dirs_exist_ok=True)  # tokenizer and generation config
    save_pretrained(folder, params, hf_config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run_dir', help='folder of a run')
    parser.add_argument('folder', help='to write to')
    parser.add_argument('--step', type=int, help='of the checkpoint; the latest by default')
    parser.add_argument('--adapters', action='store_true', help='of LoRA alone, as PEFT has them')
    arguments = parser.parse_args()
    start_log(logging.WARNING)
    step = export(arguments.run_dir, arguments.folder, arguments.step, adapters=arguments.adapters)
    print(f'wrote step {step} of {arguments.run_dir} to {arguments.folder}')


if __name__ == '__main__':
    run_command(main)
