"""Says whether an experiment fits a TPU slice or GPUs, and how fast it could be there, without them.

    troll plan qwen3_0_6b_gsm8k_troll --topology v5e:2x4 h100:1 h100:8 ['binding = value' …]

Compiles the programs that `experiments.train` would run on the devices, ahead of time for each topology, and prints per
device what the compiler says of memory, and what must at least be computed, moved and sent. The bound on time is that
of a perfect overlap: a run takes longer. Three more columns say what a GPU loses between kernels: how many it launches,
how often it makes the host wait (at every loop of unknown length and every branch), both per step for decoding and per
call for all else, and how many instructions are computed again because the program did not fit otherwise. Lines below
the table say what the responses take in the memory of a host, and which share of the devices should sample if others
train (`Compute.rollout_devices`).

With --search it looks for the settings of memory and mesh itself: it tries a short list, prints for each topology the
fastest that fit, and with --write FOLDER writes them as gin files, to be given last, such as
troll train dapo qwen3_8b troll FOLDER/h100_8_qwen3_8b.gin, and into the table of FOLDER/README.md.

Neither weights nor data are read; of `Experiment.model` only config.json, and folders of `configs/models` hold those of
the paper's models. The compilers come with `pip install "jax[tpu,cuda13-local]"`, and neither needs its device;
attention by cuDNN, which a GPU takes for bfloat16, also needs `pip install --no-deps nvidia-cudnn-cu13`.
"""

import json
import os
from pathlib import Path

os.environ['JAX_PLATFORMS'] = 'cpu'  # the topologies are not devices of this machine
os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}

from experiments.plumbing.command import CONFIG_HELP, Parser, files_and_bindings, run_command  # noqa: E402
from experiments.plumbing.gin_files import ROOT, Config  # noqa: E402
from experiments.studies.plan import PROGRAMS, balance, plan  # noqa: E402
from experiments.studies.search import row_of, search, table, write_gin, write_row  # noqa: E402
from troll_jax.experiment import Experiment  # noqa: E402
from troll_jax.settings import Compute, Method, Sampling  # noqa: E402


def print_table(rows: list[dict]) -> None:
    columns = 'topology, program, arguments, temporary, needed of, fits, TFLOP, moved, sent, bound, tokens/s'
    columns = [*columns.split(', '), 'launches', 'host waits', 'remat']
    print('|', ' | '.join(columns), '|')
    print('|', ' | '.join(['---'] * len(columns)), '|')
    for row in rows:
        room = (
            f', {row["slots"]} slots, {row["cached_tokens"]:,} tokens'
            if row['program'] == 'decode' and 'slots' in row
            else ''
        )
        head = f'| {row["topology"]} | {row["program"]}{room} |'
        if row['limit'] is None:
            print(f'{head} | | over {row["needed_gb"]:.1f} of {row["memory_gb"]:.0f} GB | NO |' + ' |' * 8)
            continue
        sent = ', '.join(f'{kind} {size:.2g} GB' for kind, size in row['sent_gb'].items()) or 'nothing'
        print(
            f'{head} {row["argument_gb"]:.2f} GB | {row["temporary_gb"]:.2f} GB | '
            f'{row["needed_gb"]:.1f} of {row["memory_gb"]:.0f} GB | {"yes" if row["fits"] else "NO"} | '
            f'{row["tflop"]:.3g} | {row["moved_gb"]:.3g} GB | {sent} | '
            f'{row["bound_s"]:.3g} s ({row["limit"]}) | {row["tokens_per_second"]:.3g} | '
            f'{row["launches"]:,} | {row["host_waits"]} | {row["remat"]} |'
        )


def print_hosts(rows: list[dict]) -> None:
    for row in {row['topology']: row for row in rows}.values():
        print(
            f'{row["topology"]}: in the memory of its host each of {row["processes"]} processes needs '
            f'{row["rollout_gb"]:.1f} GB for a rollout, and with minibatches {row["host_gb"]:.1f} GB'
        )


def main() -> None:
    parser = Parser(__doc__, (Experiment, Sampling, Method, Compute))
    parser.add_argument('config', help=CONFIG_HELP)
    parser.add_argument('--topology', required=True, help='one or several, such as v5e:4x4 v5p:4x4x4 h100:8')
    parser.add_argument('bindings', nargs='*', help="gin bindings that win over files'")
    parser.add_argument('--programs', default=','.join(PROGRAMS), help='which of them, to save time')
    parser.add_argument('--search', action='store_true', help='looks for the fastest settings that fit, in minutes')
    parser.add_argument('--write', metavar='FOLDER', help='of gin files with what --search finds')
    parser.add_argument('--json', action='store_true', help='prints the rows as one line of JSON, too, last')
    arguments = parser.parse_intermixed_args()
    programs = arguments.programs.split(',')
    if arguments.write and not arguments.search:
        raise ValueError('--write writes what --search finds; give --search too')
    if unknown := set(programs) - set(PROGRAMS):
        raise ValueError(f'no program {unknown}; expected some of {",".join(PROGRAMS)}')
    # To argparse, all topologies but the first are words like files and bindings.
    words = [arguments.config, *arguments.bindings]
    is_topology = lambda word: ':' in word and '=' not in word
    rows, advice, config = [], [], Config(*files_and_bindings([word for word in words if not is_topology(word)]))
    model = config.get('Experiment.model') or ''
    if not Path(model).exists() and (ROOT / model).exists():  # such as configs/models/qwen3-0.6b, from any folder
        config.bindings['Experiment']['model'] = str(ROOT / model)
    topologies = ','.join([arguments.topology, *filter(is_topology, words)]).split(',')
    if arguments.search:
        experiment = config.build(Experiment)
        for topology in topologies:
            found = search(config, topology)
            rows.append(row_of(experiment, topology, found))
            if arguments.write:
                write_row(arguments.write, rows[-1])
                print('wrote', write_gin(arguments.write, experiment, topology, found) or 'that none fit')
        print(table(rows))
        return
    for topology in topologies:
        found = plan(config, topology, programs)
        rows, advice = rows + found, [*advice, balance(found)]
    print_table(rows)
    print_hosts(rows)
    for line in filter(None, advice):
        print(line)
    if arguments.json:
        print(json.dumps(rows))


if __name__ == '__main__':
    run_command(main)
