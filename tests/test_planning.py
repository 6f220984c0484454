"""The counts of the planner, against programs whose costs are known; and one real compilation for a TPU topology."""

import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import PartitionSpec
from tiny import CUDNN

from experiments.plan import print_table
from experiments.plumbing.gin_files import Config
from experiments.studies.plan import balance, examine, host_memory, plan
from experiments.studies.program_cost import (
    CHIPS,
    Chip,
    Cost,
    add_iterations,
    bytes_kept,
    count_flops,
    count_rematerialised,
    describe,
    program_cost,
    roofline,
)
from experiments.studies.search import row_of, search, write_row
from troll_jax.experiment import Experiment
from troll_jax.models.attention import cudnn_attention, splash_attention
from troll_jax.settings import Compute, Method, Sampling
from troll_jax.sharding import make_mesh, named_sharding

REPOSITORY = Path(__file__).parent.parent


def flops(function, *shapes, devices=1):
    return count_flops(jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes)).jaxpr, devices)


def test_flops_of_products_in_loops():
    """Guards what XLA's own analysis gets wrong: a scan counts as often as it runs, a while loop per iteration."""
    product = lambda x: x @ x  # 2 · 4³
    assert flops(product, (4, 4)) == (128, 0)
    assert flops(lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, length=7)[0], (4, 4)) == (7 * 128, 0)
    assert flops(lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 1, product, x), (4, 4)) == (0, 128)
    assert flops(jax.checkpoint(jax.jit(product)), (4, 4)) == (128, 0)
    assert flops(lambda x: jnp.einsum('bij,bkj->bik', x, x), (3, 4, 5)) == (2 * 3 * 4 * 4 * 5, 0)
    # With the gradient: forward, and one product for each factor.
    assert flops(jax.grad(lambda x, y: jnp.sum(x @ y), argnums=(0, 1)), (4, 4), (4, 4))[0] in (2 * 128, 3 * 128)


def test_flops_below_shard_map_are_those_of_all_devices():
    """Guards the head, which computes on shards: an eighth of the product on each of eight devices."""
    mesh = make_mesh(1, 8, 1)
    local = jax.shard_map(
        lambda x, y: x @ y,
        mesh=mesh,
        in_specs=(PartitionSpec('fsdp'), PartitionSpec()),
        out_specs=PartitionSpec('fsdp'),
    )
    assert flops(local, (16, 4), (4, 4), devices=8) == flops(lambda x, y: x @ y, (16, 4), (4, 4))


def micro_batches(x, count):
    """A loop of unknown length, with a scan and another such loop inside."""

    def body(_, c):
        c, _ = jax.lax.scan(lambda c, _: (jnp.sin(c @ c), None), c, length=5)
        return jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: jnp.cos(c @ c), c)

    return jax.lax.fori_loop(0, count.astype(int)[0], body, jnp.sin(x @ x))


def test_a_loop_of_unknown_length_counts_as_often_as_it_is_said_to_run():
    """Guards the update's loop over micro-batches, which a plan multiplies itself, and loops of unknown length inside
    of it, which count as one round."""
    product = 2 * 8**3
    assert flops(micro_batches, (8, 8), (1,)) == (product, 6 * product)
    once, looped = program_cost(compiled(micro_batches, (64, 64), (1,)))
    assert once.host_waits == looped.host_waits == 1  # the loop, and in each of its rounds the loop inside
    assert looped.launches >= 5 + 1 > once.launches >= 1
    array = 4 * 64 * 64
    assert 2 * array < once.bytes < 12 * array and 6 * 2 * array < looped.bytes < 6 * 12 * array
    total = add_iterations(Cost(3.0, Counter(a=1), 1, 0), Cost(2.0, Counter(a=5, b=7), 3, 2), 11)
    assert total == (25.0, {'a': 56, 'b': 77}, 34, 22)


def test_flops_of_splash_attention():
    """Guards kernels, which are counted once per block, and not at all above the diagonal."""
    batch, length, heads, head_dim, block = 3, 1100, 4, 16, 512  # 1,100 tokens fill 3 blocks
    shapes = [jnp.zeros((batch, length, n, head_dim)) for n in (heads, 2, 2)]
    attend = lambda q, k, v: jnp.sum(splash_attention(q, k, v, jnp.ones((batch, length), int)))
    product = 2 * batch * heads * (6 * block**2) * head_dim
    assert count_flops(jax.make_jaxpr(attend)(*shapes).jaxpr, 1) == (2 * product, 0)
    # Backward: three for queries, four for keys and values, and outside of the kernels outputs with their gradients.
    gradient = jax.make_jaxpr(jax.grad(attend, argnums=(0, 1, 2)))(*shapes)
    assert count_flops(gradient.jaxpr, 1) == (9 * product + 2 * batch * heads * 3 * block * head_dim, 0)


def compiled(function, *shapes, axes=(), mesh=None):
    shardings = [named_sharding(mesh, names) for names in axes] if mesh else [None] * len(shapes)
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=x) for s, x in zip(shapes, shardings, strict=True)]
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_bytes_of_loops_are_multiplied():
    """Guards the trip count, which is read off the loop's condition."""

    def repeat(times):
        body = lambda c, _: (jnp.sin(c) @ c, None)
        return program_cost(compiled(lambda x: jax.lax.scan(body, x, length=times)[0], (64, 64)))[0].bytes

    assert repeat(42) - repeat(22) == repeat(22) - repeat(2) > 20 * 2 * 64 * 64 * 4


def test_an_update_in_place_moves_what_it_writes():
    """Guards the cache of a decode step: writing one slot must not count as moving all of them."""
    write = lambda cache, new, at: jax.lax.dynamic_update_slice_in_dim(cache, new, at.astype(int)[0], 0)
    text = jax.jit(write, donate_argnums=0).lower(*(jnp.zeros(s) for s in ((4096, 64), (1, 64), (1,)))).compile()
    assert program_cost(text.as_text())[0].bytes < 4096 * 64


def test_collectives_by_kind_and_size():
    """Guards the network's share: the gathered array, once, and the summed one."""
    mesh = make_mesh(1, 8, 1)
    text = compiled(
        lambda x: jax.lax.with_sharding_constraint(x * 2, named_sharding(mesh, (None, None))),
        (64, 32),
        axes=[('batch', None)],
        mesh=mesh,
    )
    assert program_cost(text)[0].collectives == {'all-gather': 64 * 32 * 4}
    text = compiled(lambda x: jnp.sum(x, axis=0), (64, 32), axes=[('batch', None)], mesh=mesh)
    assert program_cost(text)[0].collectives == {'all-reduce': 32 * 4}


def test_the_slowest_part_is_the_bound():
    """Guards units: rates are per second, and what takes longest is named."""
    chip = Chip(flops=100.0, memory=0.0, bandwidth=10.0, interconnect=1.0)
    assert roofline(chip, 300.0, Cost(20.0, Counter())) == (3.0, 'compute')
    assert roofline(chip, 300.0, Cost(40.0, Counter())) == (4.0, 'memory')
    assert roofline(chip, 300.0, Cost(40.0, Counter({'all-gather': 3, 'all-reduce': 2}))) == (5.0, 'network')


KEYS = 'topology program needed_gb fits tflop moved_gb sent_gb bound_s launches host_waits remat'.split()


def run_plan(tmp_path, *options, method='troll'):
    """What the command prints of a small model."""
    config = json.loads((REPOSITORY / 'configs/models/qwen3-0.6b/config.json').read_text())
    config |= {'num_hidden_layers': 2, 'vocab_size': 512, 'hidden_size': 128, 'intermediate_size': 256}
    config |= {'num_attention_heads': 4, 'num_key_value_heads': 2}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    bindings = [
        f'Experiment.model = "{tmp_path}"',
        'Experiment.max_response_length = 32',
        'Experiment.max_prompt_length = 32',
        'Compute.micro_batch_tokens = 256',
        'Method.minibatch_prompts = 4',
        'Sampling.prompts_per_step = 4',
        'Sampling.support_size = 8',
    ]
    bindings.append('Compute.attention = "xla"')  # cuDNN is large, and its attention needs it to compile
    command = [sys.executable, '-m', 'experiments.plan', *options, f'configs/qwen3_0_6b_gsm8k_{method}.gin', *bindings]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_a_real_plan(tmp_path):
    """Guards the whole way to the compilers, with a small model: memory, a verdict, rates, launches; and topologies
    that stand before the file and its bindings."""
    printed = run_plan(tmp_path, '--json', '--topology', 'v5e:2x2', 'h100:4')
    rows = json.loads(printed.splitlines()[-1])
    assert [row['program'] for row in rows] == 2 * ['update', 'prefill', 'decode']
    for topology, (update, prefill, decode) in {'v5e:2x2': rows[:3], 'h100:4': rows[3:]}.items():
        for row in (update, prefill, decode):
            assert set(KEYS) < set(row) and row['topology'] == topology and row['remat'] == 0
            assert row['processes'] == 1 and 0 < row['rollout_gb'] < row['host_gb'] < 0.01
            assert row['fits'] and 0 < row['argument_gb'] < row['needed_gb'] < 1 and row['tokens_per_second'] > 0
        # At least three products of every weight and token, on four devices.
        weights = 2 * (128 * 128 * (4 + 2 + 2 + 4) + 3 * 128 * 256)
        assert update['tflop'] > 6 * weights * 32 * 64 / 4 / 1e12
        assert f'{topology}: in the memory of its host' in printed
        assert f'| {topology} | update |' in printed and update['sent_gb']
        # One prompt of each device at a time, one token of each of its 8 slots.
        assert prefill['tflop'] > 2 * weights * 32 / 1e12 and decode['tflop'] > 2 * weights * 8 / 1e12
        assert decode['slots'] == 32 and decode['cached_tokens'] >= 32 * 64
        assert f'\n{topology}: a rollout takes at least ' in printed
        # No step waits for the host, and there are more than the products of two layers in kernels.
        assert decode['host_waits'] == 0 and 2 * 9 < decode['launches'] < update['launches']


@pytest.mark.slow
def test_a_real_search(tmp_path):
    """Guards the way from the compilers to a file that a run reads last."""
    options = ('--search', '--write', str(tmp_path / 'found'), '--topology', 'h100:1')
    printed = run_plan(tmp_path, *options, method='clip')  # whose programs compile faster
    file = tmp_path / 'found' / f'h100_1_{tmp_path.name}.gin'
    compute = Config(['configs/qwen3_0_6b_gsm8k_clip.gin', file]).build(Compute)
    assert (compute.fsdp, compute.tensor, compute.remat, compute.slots) == (1, 1, 'dots', 4 * 8)
    assert f'wrote {file}' in printed and f'| h100:1 | {tmp_path.name} | 1 | dots |' in printed


def test_a_search_ends_at_the_fastest_settings_that_fit(monkeypatch, tmp_path):
    """Guards the list's order, and the end of the search: at a wider `tensor` that is slower or does not divide
    the model, or where nothing fits; and the table, in which a second search replaces the row of the first."""
    asked = []

    def costs(config, topology, programs, *, only_if_it_may_fit):
        compute = config.build(Compute)
        asked.append((compute.tensor, compute.remat, compute.micro_batch_tokens, programs))
        saved = {'dots': 30, 'attention': 7, 'full': 2}[compute.remat] * compute.micro_batch_tokens / 2560
        row = {'needed_gb': saved / compute.tensor, 'memory_gb': memory, 'remat': 0, 'tokens_per_second': 1e9}
        if 'decode' in programs:
            row |= {'needed_gb': 8, 'tokens_per_second': {1: 5e5, 2: 1e6, 4: slowest}[compute.tensor]}
        row |= {'bound_s': {1: 5, 2: 3, 4: 4}[compute.tensor], 'slots': compute.slots // 2, 'cached_tokens': 1e9}
        row['fits'] = row['needed_gb'] <= memory
        return [row | {'program': name} for name in (programs if 'decode' in programs else ['update'])]

    monkeypatch.setattr('experiments.studies.search.plan', costs)
    files, folder = [REPOSITORY / 'configs/qwen3_0_6b_gsm8k_troll.gin'], REPOSITORY / 'configs/models'
    config, of_14_heads = (
        Config(files, [f"Experiment.model = '{folder / name}'"]) for name in ('qwen3-0.6b', 'qwen2.5-0.5b')
    )
    experiment, report = config.build(Experiment), lambda line: None
    memory = 16
    for slowest in (9e5, 1e4):  # with `tensor` = 4 updates are slower, or decoding alone is slower than a step with 2
        asked.clear()
        found = search(config, 'v5e:2x2', report)
        # With `tensor` = 1 two rows take 14 of 16 GB, with 2 four rows; with 4 they take 7. Half of the slots are used.
        chosen = {'tensor': 2, 'remat': 'attention', 'micro_batch_tokens': 4 * 2560, 'slots': 512}
        assert chosen.items() <= found.bindings.items()
        updates = [tensor for tensor, *_, programs in asked if 'decode' not in programs]
        assert set(updates) == ({1, 2, 4} if slowest == 9e5 else {1, 2}) and len(asked) <= 4 + 3 + 3
        write_row(tmp_path, row_of(experiment, 'v5e:2x2', found))
    asked.clear()
    of_14_heads.bindings['Compute']['tensor'] = 8  # more than there are devices
    assert search(of_14_heads, 'v5e:2x2', report) == found
    assert {tensor for tensor, *_ in asked} == {1, 2}
    memory = 1
    assert search(config, 'v5e:2x2', report) is None
    written = (tmp_path / 'README.md').read_text()
    write_row(tmp_path, row_of(experiment, 'h100:1', None))
    first, second = (tmp_path / 'README.md').read_text().splitlines()[2:]
    assert written.splitlines()[2:] == [second] and f'| {found.step_s:,.0f} s |' in second
    assert 'nothing of the list fits' in first and first.count('|') == second.count('|')


def test_the_table_of_hardware_is_that_of_its_files():
    """Guards rows that are typed, and files that are not in the table: each file binds what its row says."""
    folder = REPOSITORY / 'configs/hardware'
    rows = [line for line in (folder / 'README.md').read_text().splitlines()[2:] if re.match(r'\| \w+:', line)]
    cells = [[cell.strip() for cell in row.split('|')[1:-1]] for row in rows if 'nothing of the list' not in row]
    files = {re.sub(r'[^a-z0-9]', '_', f'{devices}_{model}'): rest for devices, model, *rest in cells}
    assert files.keys() == {path.stem for path in folder.glob('*.gin')}
    for name, (tensor, remat, tokens, chunk, moments, slots, *_) in files.items():
        compute = Config([REPOSITORY / 'configs/data/dapo.gin', folder / f'{name}.gin']).build(Compute)
        found = str(compute.tensor), str(compute.remat), f'{compute.micro_batch_tokens:,}', f'{compute.head_chunk:,}'
        assert found == (tensor, remat, tokens, chunk)
        assert ('host' if compute.offload_optimizer else 'device', f'{compute.slots:,}') == (moments, slots)


def test_what_a_scan_keeps():
    """Guards the verdict without a compiler: what the layers keep for their gradients, once for each layer."""
    layer = lambda x, w: (jnp.sin(x @ w), None)
    loss = lambda x, weights: jnp.sum(jax.lax.scan(layer, x, weights)[0])
    gradient = jax.make_jaxpr(jax.jit(jax.grad(loss, argnums=1)))
    kept = bytes_kept(gradient(jnp.zeros((7, 3)), jnp.zeros((5, 3, 3))).jaxpr)
    assert kept in (5 * 4 * 7 * 3 * 2, 5 * 4 * (7 * 3 * 2 + 3 * 3))  # inputs and cosines, and maybe weights


def test_what_is_too_large_for_the_compiler_does_not_fit(capsys):
    """Guards the verdict on a program that cannot even be compiled: a row of the table, and not a traceback."""
    devices = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices
    mesh = make_mesh(1, 4, 1, devices=devices)
    large = jax.ShapeDtypeStruct((60_000, 60_000), jnp.float32, sharding=named_sharding(mesh, (None, None)))
    program = jax.jit(lambda x: jnp.sum((x @ x) @ (x @ x)))
    row = examine('large', program, (large,), chip=CHIPS['v5e'], devices=4, tokens=1)
    assert not row['fits'] and row['needed_gb'] > row['memory_gb'] == 16
    print_table([{'topology': 'v5e:2x2'} | row])
    assert '| v5e:2x2 | large | | | over' in capsys.readouterr().out


def test_memory_of_hosts():
    """Guards rollouts that are whole in every process: 32,768 responses of 1,024 tokens on hosts with four chips each,
    by 16 samples of each prompt. All but the distributions is whole: 16 bytes a token, beside their 8 · 64."""
    bindings = ['Sampling.prompts_per_step = 2048', 'Sampling.samples_per_prompt = 16']
    bindings += ['Experiment.max_prompt_length = 1024', 'Experiment.max_response_length = 1024']
    config = Config([REPOSITORY / 'configs/qwen3_0_6b_gsm8k_troll.gin'], bindings)
    compute, experiment, *others = (config.build(kind) for kind in (Compute, Experiment, Sampling, Method))
    for topology, processes in [('v5e:2x2', 1), ('v5e:4x4', 4), ('v5e:8x8', 16)]:
        on = dataclasses.replace(compute, devices=describe(topology)[1])
        found = host_memory(experiment, *others, on)
        expected = 32768 * 1024 * (512 / processes + 16) / 1e9
        assert found['processes'] == processes and found['rollout_gb'] == pytest.approx(expected, 1e-3)
        assert found['host_gb'] < 60 / processes + 2


def test_a_task_without_a_method_is_an_error():
    """Guards a plan of half an experiment: what is missing is named, before anything is traced."""
    files = [REPOSITORY / file for file in ('configs/data/gsm8k.gin', 'configs/models/qwen3_0_6b.gin')]
    config = Config(files, ["Experiment.model = 'configs/models/qwen3-0.6b'"])
    with pytest.raises(ValueError, match='Method needs Method.objective; bind each'):
        plan(config, 'v5e:2x2')


@pytest.mark.parametrize(
    ('topology', 'message'),
    [
        ('v9:2x2', "'v9:2x2'.*v5e"),
        ('v5e:2x', r"'v5e:2x'.*pip install \"jax\[tpu\]"),
        ('h100', r"'h100'.*such as h100:1.*pip install \"jax\[cuda13-local\]"),
        ('h100:0', '0 is not a number of GPUs'),
        ('h100:12', '12 is not a number of GPUs on one host, 1 to 8'),
        ('h100:2x9', '9 is not a number of GPUs on one host, 1 to 8'),
    ],
)
def test_an_unknown_topology_is_an_error(topology, message):
    """Guards a mistyped slice: the message names what there is, and the compiler that may be missing."""
    with pytest.raises(ValueError, match=message):
        plan(Config([]), topology)


def test_without_the_compiler_the_error_says_how_to_get_it(monkeypatch):
    """Guards the first thing that a user meets who has not installed it."""
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r'the CUDA plugin is not installed.*pip install "jax\[cuda13-local\]=='):
        plan(Config([]), 'h100:1')


@pytest.mark.skipif(bool(CUDNN), reason='cuDNN is installed')
def test_without_cudnn_the_error_says_how_to_get_it():
    """Guards the second thing that such a user meets."""
    file = REPOSITORY / 'configs/qwen3_0_6b_gsm8k_troll.gin'
    config = Config([file], ["Experiment.model = 'configs/models/qwen3-0.6b'"])
    with pytest.raises(ValueError, match=r"pip install --no-deps nvidia-cudnn-cu13, or bind Compute.attention = 'xla'"):
        plan(config, 'h100:1')


def test_gpus_and_what_is_computed_twice():
    """Guards the description of a GPU, and the text that says that XLA computes again."""
    chip, devices = describe('h200:4')
    assert len(devices) == 4 and devices[0].device_kind == 'NVIDIA H200' and chip.memory > 1.7 * CHIPS['h100'].memory
    two_hosts, devices = describe('h100:2x8')
    assert len(devices) == 16 and devices[-1].process_index == 1 and two_hosts.interconnect < CHIPS['h100'].interconnect
    text = '  %dot.1.remat = f32[2]{0} dot(%a)\n  ROOT %fusion.remat2.1 = f32[2]{0} fusion(%dot.1.remat)\n'
    text += '  %p.remat = f32[2]{0} parameter(0)\n  %add = f32[2]{0} add(%dot.1.remat)\n'
    assert count_rematerialised(text) == 2


@pytest.mark.skipif(not CUDNN, reason='cuDNN is not installed')
def test_flops_of_cudnn():
    """Guards products that are no product of a jaxpr."""
    batch, length, heads, head_dim = 2, 64, 4, 64
    x = jnp.zeros((batch, length, heads, head_dim), jnp.bfloat16)
    attend = lambda q: jnp.sum(cudnn_attention(q, x, x, jnp.ones((batch, length), int)).astype(jnp.float32))
    found, _ = count_flops(jax.make_jaxpr(jax.grad(attend))(x).jaxpr, 1)
    assert found == (2 + 5) * batch * heads * length * (length + 1) * head_dim


def test_the_balance_of_two_meshes():
    """Guards a share of devices that is the wrong way round, or takes one of two numbers of devices for the other."""
    rows = [
        {'topology': 'x', 'program': name, 'devices': devices, 'step_s': seconds, 'limit': 'compute'}
        for name, devices, seconds in [('update', 6, 1.0), ('prefill', 2, 1.0), ('decode', 2, 8.0)]
    ]
    assert '9 s on 2 devices' in balance(rows) and '75% of the devices sample' in balance(rows)  # 18 to 6
    assert balance(rows[:2]) is None and balance([*rows[:2], rows[2] | {'limit': None}]) is None
