"""The comparisons of `troll compare`, as data: methods, the values that are tried of their bounds, and suites."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from experiments.plumbing.gin_files import Config

# What an estimator brings with it besides the advantages: ratio and mean over tokens, as its paper has them.
ESTIMATORS = {
    'GRPO': ['Method.advantages = @group_normalised', 'Method.aggregation = @token_mean'],
    'Dr.GRPO': ['Method.advantages = @mean_centred', 'Method.aggregation = @constant_length'],
    'GSPO': [
        'Method.advantages = @group_normalised',
        'Method.aggregation = @sequence_mean',
        'troll.ratio = @sequence_ratio',
        'ppo_clip.ratio = @sequence_ratio',
        'ppo_clip.lower = 3e-4',
        'ppo_clip.upper = 4e-4',
        'ppo_clip.dual = None',
    ],
    'PPO': [
        'Method.aggregation = @token_mean',
        'critic/adamw.learning_rate = 1e-3',  # of a small model, as all learning rates here
        'critic/adamw.b2 = 0.99',
    ],
}
FILES = {'PPO': ('configs/critic.gin',)}
OBJECTIVES = {  # what goes with every estimator, as estimator/objective
    'Clip': ('clip', []),
    'TROLL': ('troll', []),
    'Clip + KL': ('clip_kl', []),
    'TROLL, α = 0': ('troll', ['troll.alpha = 0.0']),
    'unbounded': ('importance_weighted', []),
    'DPPO': ('dppo', []),
}
PAIRED = [f'GRPO/{objective}' for objective in OBJECTIVES]

_CLIP = {'ppo_clip.lower': (0.05, 0.1, 0.4), 'ppo_clip.upper': (0.05, 0.1, 0.4)}
_KL = (0.02, 0.1, 0.2)
# Files of configs/objectives that differ in their trust region, with three values of its bound besides the file's own:
# as many for every method. Several parameters of one method go together. What has no bound has nothing to choose.
BOUNDS = {
    'troll': {'troll.bound': _KL},
    'troll_detached': {'troll.bound': _KL},
    'troll_sequence': {'troll.bound': _KL},
    'troll_entropy': {'troll.bound': _KL},
    'troll_chi_squared': {'troll.bound': (0.04, 0.2, 0.4)},
    'troll_total_variation': {'troll.bound': (0.05, 0.1, 0.3)},
    'clip': _CLIP,
    'clip_kl': {'kl_to_old.coefficient': (0.1, 0.3, 3.0)},
    'gspo': {'ppo_clip.lower': (3e-3, 3e-2, 0.2), 'ppo_clip.upper': (4e-3, 4e-2, 0.2)},
    'gmpo': {'gmpo.lower': (0.1, 0.2, 0.8), 'gmpo.upper': (0.1, 0.2, 0.8)},
    'cispo': {'cispo.upper': (0.2, 1.0, 2.0)},
    'icepop': {'icepop.lower': (0.9, 0.8, 0.7), 'icepop.upper': (1.1, 1.25, 2.0)},
    'sapo': {'sapo.positive': (0.5, 2.0, 4.0), 'sapo.negative': (0.525, 2.1, 4.2)},
    'spo': {'spo.bound': (0.05, 0.1, 0.4)},
    'drpo': {'drpo.bound': (0.05, 0.15, 0.5)},
    'dppo': {'dppo.bound': (0.05, 0.1, 0.3)},
    'dppo_binary': {'dppo_binary.bound': (0.05, 0.1, 0.3)},
    'dppo_binary_kl': {'dppo_binary.bound': _KL},
    'ipo': {'ipo.bound': (0.03, 0.05, 0.2)},
    'kpop': {'kpop.bound': (0.02, 0.05, 0.2)},
    'erc': {'erc.lower': (0.8, 0.9, 0.98), 'erc.upper': (1.2, 1.1, 1.02)},
    'trm': {'trm.bound': _KL},
    'opsm': {'opsm.bound': (0.05, 0.1, 0.2)},
    'vaco': {'vaco.bound': (0.05, 0.1, 0.4)},
    'vespo': {
        'vespo.positive': ((1.0, 1.5), (2.0, 6.0), (4.0, 6.0)),
        'vespo.negative': ((1.5, 1.0), (3.0, 4.0), (6.0, 4.0)),
    },
    'm2po': {'m2po.budget': (0.01, 0.1, 0.2)},
    'kl_cov': {'kl_cov.share': (2e-2, 0.1, 0.3)},
    'random_clip': _CLIP,
    'random_troll': {'troll.bound': _KL},
    'importance_weighted': {},
}


class Setting(NamedTuple):
    """One run."""

    method: str  # of a suite
    bound: str  # bindings in place of those of the method's file, joined by '; '; '': none
    learning_rate: float
    staleness: int
    lag: int
    precision: str | None
    seed: int


AXES = {  # of a suite; every combination is a cell
    'staleness': 'updates per rollout batch',
    'lag': 'steps of lag',
    'precision': 'precision of the sampler',
    'learning_rate': 'learning rate',
}
MISSING = {'bound': '', 'lag': 0, 'precision': None}  # in results of suites that do not vary them


class Suite(NamedTuple):
    """Runs that are compared: methods × bounds × cells × seeds."""

    task: str  # a gin file
    methods: Sequence[str]  # estimator/objective, or a file of configs/objectives; the first one is the reference
    updates: int  # of every run, each of minibatch_prompts × samples_per_prompt responses
    learning_rates: Sequence[float]
    staleness: Sequence[int]  # updates per rollout batch
    samples: int = 4  # per held-out problem, at temperature 1
    lags: Sequence[int] = (0,)  # steps between the policy that samples and the one that learns
    precisions: Sequence[str | None] = (None,)  # of the sampler
    choosing: int = 0  # so many seeds, the first, choose a bound for each method; all others are reported. 0: no choice
    model: str | None = 'configs/arithmetic_model.gin'  # makes the start model if it is not there

    def cells(self) -> list[dict]:
        """The values of all axes of every cell."""
        values = product(self.staleness, self.lags, self.precisions, self.learning_rates)
        return [dict(zip(AXES, cell, strict=True)) for cell in values]

    def runs(self, bounds: dict[str, Sequence[str]], seeds: range) -> Iterator[Setting]:
        """The runs of methods with some of their bounds, seed by seed: balanced whenever the command is stopped."""
        for seed in seeds:
            for method, found in bounds.items():
                for bound, cell in product(found, self.cells()):
                    yield Setting(method, bound, **cell, seed=seed)

    def choosing_seeds(self) -> range:
        return range(self.choosing)

    def reported_seeds(self, count: int) -> range:
        """Seeds that have chosen nothing."""
        return range(self.choosing, self.choosing + count)


def bounds_of(method: str) -> list[str]:
    """The bounds that are tried of a method: '' for that of its file, and others as bindings joined by '; '."""
    parameters = BOUNDS.get(method, {})
    tried = zip(*parameters.values(), strict=True)
    return ['', *('; '.join(f'{name} = {x}' for name, x in zip(parameters, values, strict=True)) for values in tried)]


def read(task: str, method: str, bound: str = '') -> Config:
    """The configuration of a method on a task."""
    estimator, _, objective = method.rpartition('/')
    file, bindings = OBJECTIVES[objective] if estimator else (objective, [])
    files = [task, f'configs/objectives/{file}.gin', *FILES.get(estimator, ())]
    return Config(files, [*ESTIMATORS.get(estimator, ()), *bindings, *filter(None, bound.split('; '))])


_REGIONS = Suite(
    'configs/quickstart.gin', ['clip', *(x for x in BOUNDS if x != 'clip')], 64, (1e-3,), (16,), choosing=2
)
SUITES = {
    'quickstart': Suite(
        'configs/quickstart.gin',
        [f'{estimator}/{objective}' for estimator, objective in product(ESTIMATORS, list(OBJECTIVES)[:4])],
        updates=192,
        learning_rates=(2e-4, 5e-4, 1e-3),
        staleness=(2, 8, 32),
    ),
    'smollm2': Suite('configs/smollm2.gin', PAIRED, 48, (1e-5,), (4, 16), samples=8, model=None),
    'lag': Suite('configs/quickstart.gin', PAIRED, 192, (5e-4,), (8,), lags=(0, 1, 4, 16)),
    'long': Suite('configs/quickstart.gin', PAIRED, 4000, (5e-4,), (4,), lags=(4,)),
    'regions': _REGIONS,
    'rates': _REGIONS._replace(learning_rates=(5e-4, 1e-3), staleness=(4, 16)),
    'precision': _REGIONS._replace(precisions=(None, 'int8', 'fp8'), choosing=0),
    'long_problems': _REGIONS._replace(
        task='configs/arithmetic_long.gin', model='configs/arithmetic_long_model.gin', updates=96
    ),
}
