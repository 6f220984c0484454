"""Draws what objectives do to a token's gradient, over the ratio and over the old probability.

troll trust_regions [--output trust_regions.png]
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.plumbing.command import run_command
from troll_jax.ops.losses import LossInputs, Objective, ppo_clip, troll
from troll_jax.ops.masked_losses import dppo_binary, icepop, kpop, masked
from troll_jax.ops.smooth_losses import drpo, sapo, spo, vespo
from troll_jax.types import SparseLogProbs

OBJECTIVES = {
    'PPO': ppo_clip,
    'DPPO, binary': partial(masked, drop=dppo_binary),
    'IcePop': partial(masked, drop=icepop),
    'KPop': partial(masked, drop=kpop),
    'DRPO, δ = 0.15': drpo,
    'SPO': spo,
    'SAPO': sapo,
    'VESPO': vespo,
    'TROLL': troll,
}
OLD, RATIO = 0.2, {1: 1.5, -1: 0.6}  # what is fixed where the other is varied


def factors(objective: Objective, old: np.ndarray, ratio: np.ndarray, advantage: float) -> jax.Array:
    """What of A ∇ log π̃(o) a step is made of, [N]: of one-token responses and a vocabulary of two, by the logit."""
    both = lambda logit: jax.nn.log_sigmoid(jnp.stack([logit, -logit], axis=1))
    logits = [jnp.log(p) - jnp.log1p(-p) for p in (old * ratio, old)]
    tokens = jnp.tile(jnp.arange(2), (len(old), 1))

    def loss(logit):
        new, listed = both(logit), both(logits[1])
        lists = SparseLogProbs(tokens, new), SparseLogProbs(tokens, listed)
        row = LossInputs(tokens[:, 0], 1 + jnp.arange(len(old)), new[:, 0], listed[:, 0], *lists, None)
        return jnp.sum(objective(row, jnp.full(len(old), float(advantage))).loss)

    return -jax.grad(loss)(logits[0]) / (advantage * (1 - old * ratio))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', default='trust_regions.png')
    arguments = parser.parse_args()
    figure = Figure(figsize=(11, 7.5), layout='constrained')
    ratios, olds = np.linspace(0.05, 4, 500), np.linspace(0.002, 0.64, 500)
    for (over_ratio, over_old), (sign, fixed) in zip(figure.subplots(2, 2), RATIO.items(), strict=True):
        for index, (name, objective) in enumerate(OBJECTIVES.items()):
            style = dict(label=name, color=f'C{index}', linewidth=2.5 if name == 'TROLL' else 1.5)
            over_ratio.plot(ratios, factors(objective, np.full(500, OLD), ratios, sign), **style)
            over_old.plot(olds, factors(objective, olds, np.full(500, fixed), sign), **style)
        over_ratio.set(title=f'A = {sign}, m = {OLD}', xlabel='r = p / m', ylim=(-1.5, 3), ylabel='factor on A ∇ log π')
        over_old.set(title=f'A = {sign}, r = {fixed}', xlabel='m = π_old(o)', ylim=(-1.5, 3))
    over_old.legend(ncols=2, fontsize=8)
    figure.savefig(arguments.output, dpi=90)
    print(f'wrote {arguments.output}')


if __name__ == '__main__':
    run_command(main)
