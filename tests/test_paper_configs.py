"""Every experiment of configs/README.md is complete, and what it would run fits together at its real size.

Models are the real ones in shape: `train` is called, and stopped before it would load weights, when it has traced the
sampler and the update. Of what a run needs only the tokenizer and the prompts, which would be downloaded, are made up.
"""

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

import experiments.plumbing.run
import troll_jax.experiment
from experiments.plumbing.gin_files import Config
from experiments.plumbing.names import SETTINGS
from experiments.train import train
from troll_jax.data.prompts import PromptSet
from troll_jax.data.tokenizer import character_tokenizer
from troll_jax.settings import check_together

CONFIGS = Path(__file__).parent.parent / 'configs'
MARK = '<!-- tests/test_paper_configs.py reads this table -->\n\n'
TABLE = (CONFIGS / 'README.md').read_text().split(MARK)[1].split('\n\n')[0]

# Where the config.json of each model is.
FOLDERS = {
    'Qwen/Qwen3-0.6B': 'qwen3-0.6b',
    'Qwen/Qwen3-1.7B': 'qwen3-1.7b',
    'Qwen/Qwen3-4B': 'qwen3-4b',
    'Qwen/Qwen3-8B': 'qwen3-8b',
    'Qwen/Qwen3-14B': 'qwen3-14b',
    'Qwen/Qwen2.5-0.5B-Instruct': 'qwen2.5-0.5b',
    'Qwen/Qwen2.5-1.5B-Instruct': 'qwen2.5-1.5b',
    'Qwen/Qwen2.5-3B-Instruct': 'qwen2.5-3b',
    'Qwen/Qwen2.5-7B-Instruct': 'qwen2.5-7b',
    'meta-llama/Llama-3.2-3B': 'llama-3.2-3b',
    'meta-llama/Llama-3.2-3B-Instruct': 'llama-3.2-3b',
    'HuggingFaceTB/FineMath-Llama-3B': 'llama-3.2-3b',
    'meta-llama/Llama-3.1-8B': 'llama-3.1-8b',
    'meta-llama/Llama-3.1-8B-Instruct': 'llama-3.1-8b',
    'HuggingFaceTB/SmolLM3-3B': 'smollm3-3b',
    'swiss-ai/Apertus-8B-2509': 'apertus-8b',
    'swiss-ai/Apertus-8B-Instruct-2509': 'apertus-8b',
}


PARTS = ('data', 'models', 'objectives')


def experiments_of_the_table() -> list[tuple[str, ...]]:
    """Data, model, method and, if there is one, ablation of every experiment: files below configs/ without suffix."""
    found = []
    for line in TABLE.splitlines():
        cells = [re.findall(r'`([\w/]+)`', cell) for cell in line.split('|')[2:6]]
        if line.startswith('|') and cells[0] != ['data/']:
            folders = [[f'{part}/{name}' for name in names] for part, names in zip(PARTS, cells[:3], strict=True)]
            found += itertools.product(*folders, *filter(None, cells[3:]))
    return list(dict.fromkeys(found))


def shape_of(file: str) -> str:
    """The part of a file that changes the traced programs: models with the same config.json are one."""
    if model := re.search(r"Experiment\.model = '(.*)'", (CONFIGS / f'{file}.gin').read_text()):
        return FOLDERS[model[1]]
    return file


# Their programs are those of other files, or traced with a small model by tests/test_train.py.
NOT_TRACED = {
    'data/eurus_code',
    *(f'objectives/{name}' for name in ('dr_grpo', 'troll_dr_grpo', 'gspo', 'troll_gspo', 'ppo')),
    *(f'ablations/{name}' for name in ('bound_0_01', 'bound_0_25', 'tokens_16', 'prompts_512')),
}

EXPERIMENTS = experiments_of_the_table()
TRACED, _seen = [], set(NOT_TRACED)  # as many as show all models, data, and the other methods and ablations
for _files in EXPERIMENTS:
    _new = set(map(shape_of, _files)) - _seen
    if _new and NOT_TRACED.isdisjoint(_files):
        TRACED.append(_files)
        _seen |= _new

named = lambda files: '-'.join(file.split('/')[1] for file in files)


def read(files: tuple[str, ...], folder: str) -> tuple[Config, list]:
    """The configuration of these files, and the five settings, with the config.json of their model that is here."""
    config = Config([CONFIGS / f'{file}.gin' for file in files], [f"Run.folder = '{folder}'"])
    experiment, *others = [config.build(kind) for kind in SETTINGS]
    return config, [dataclasses.replace(experiment, model=str(CONFIGS / 'models' / FOLDERS[experiment.model])), *others]


def test_the_table_has_every_file():
    """Guards the tests below against an empty list, and files that no experiment uses and nobody is told of."""
    used = {file for files in EXPERIMENTS for file in files}
    for part in ('data', 'models', 'ablations'):
        here = {f'{part}/{file.stem}' for file in (CONFIGS / part).glob('*.gin')}
        assert here - used <= {'data/math_eval', 'data/reasoning_gym', 'models/memory'}
    assert len(EXPERIMENTS) > 50


@pytest.mark.parametrize('file', sorted((CONFIGS / 'models').glob('*.gin')), ids=lambda file: file.stem)
def test_a_models_file_says_nothing_of_the_task(file):
    """Guards against a comparison of models in which one has other hyperparameters."""
    names = [f'{key}.{name}' for key, values in Config([file]).bindings.items() for name in values]
    allowed = {'Experiment.model', 'Experiment.template_arguments', 'Experiment.chat_template_from'}
    assert set(names) <= allowed | {'Compute.remat', 'Compute.head_chunk'}


def test_every_experiment_is_complete():
    """Guards against a run that fails, after minutes of loading, on a parameter that its files forgot, and lengths that
    its model has no positions for."""
    for files in EXPERIMENTS:
        config, (experiment, sampling, method, compute, _) = read(files, 'unused')
        check_together(sampling, method, compute, experiment.max_length)
        assert experiment.decoder_config(compute).remat == 'full'
        lengths = experiment.max_prompt_length, experiment.max_response_length
        assert lengths == ((512, 2048) if files[0] == 'data/gsm8k' else (2048, 4096))
        changed = {'ablations/bound_0_01': [0.01, 64], 'ablations/bound_0_25': [0.25, 64]}
        changed |= {'ablations/tokens_256': [0.05, 256], 'ablations/tokens_16': [0.05, 16]}
        assert [config.get('troll.bound'), sampling.support_size] == changed.get(files[-1], [0.05, 64])


class ReachedWeights(Exception):
    """All that comes before weights are loaded has gone well."""


def stop(*_, **__):
    raise ReachedWeights


@pytest.mark.parametrize('files', TRACED, ids=named)
def test_it_trains_up_to_the_weights(files, tmp_path, monkeypatch):
    """Guards files that rot: sizes that do not go together, and programs that cannot be built for the real model."""
    _, (experiment, *others) = read(files, tmp_path)
    task = dataclasses.replace(experiment.task, deadline=None)  # no grading workers
    n = 2048
    prompts = PromptSet(np.zeros(n, np.int32), np.ones(n, np.int32), [''] * n, experiment.max_prompt_length)
    encode = lambda split, *_, **__: dataclasses.replace(prompts, tokens=prompts.tokens + (split == 'test'))
    monkeypatch.setattr(type(task), 'load', lambda self, split: split)
    monkeypatch.setattr(troll_jax.experiment, 'distinct_rows', lambda rows, **_: rows)
    monkeypatch.setattr(troll_jax.experiment, 'encode_prompts', encode)
    monkeypatch.setattr(
        troll_jax.experiment, 'load_tokenizer', lambda *_, **__: character_tokenizer(''.join(map(chr, range(300))))
    )
    monkeypatch.setattr(troll_jax.experiment, 'stop_token_ids', lambda *_: (0,))
    monkeypatch.setattr(experiments.plumbing.run, 'restore_or_init', stop)
    with pytest.raises(ReachedWeights):
        train(dataclasses.replace(experiment, task=task), *others)
