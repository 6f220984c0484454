"""Pairs of distributions that are hard for a projection, and what the projection of a pair is, in float64 numpy."""

import functools

import jax
import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp

from troll_jax.ops.projection import project

INF = np.inf
BOUNDS = (1e-4, 1e-3, 1e-2, 0.05, 0.25, 1.0, 2.0)
DTYPES = ('float32', 'float64')


def normalise(scores) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    return scores - logsumexp(scores)


def kl(log_p, log_q) -> float:
    """KL(p ‖ q) in nats, of the distributions that two lists of log-probabilities stand for."""
    p, q = normalise(log_p), normalise(log_q)
    on = p > -INF
    return np.sum(np.exp(p[on]) * (p[on] - q[on]))


def peak(size: int, at: int, height: float) -> np.ndarray:
    scores = np.zeros(size)
    scores[at] = height
    return normalise(scores)


def zeroed(log_probs, where) -> np.ndarray:
    scores = np.array(log_probs)
    scores[where] = -INF
    return normalise(scores)


def pairs(size: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pairs (log π̃, log π_old) [V], each hard for its own reason."""
    rng = np.random.default_rng(size)
    normal = lambda scale=1.0: normalise(scale * rng.normal(size=size))
    base, uniform = normal(2), np.full(size, -np.log(size))
    families = {
        'equal': (base, base),
        'nearly equal': (normalise(base + 1e-3 * rng.normal(size=size)), base),
        'close': (normalise(base + 3e-2 * rng.normal(size=size)), base),
        'unrelated': (normal(2), base),
        'ties': (uniform, normalise(np.arange(size) < size / 2)),
        'masses of 1e-12': (peak(size, 0, np.log(1e12)), peak(size, size - 1, np.log(1e12))),
    }
    for height in (10, 40, 80):
        families[f'opposite peaks {height}'] = peak(size, 0, height), peak(size, size - 1, height)
        families[f'peak {height} from uniform'] = peak(size, 0, height), uniform
        families[f'uniform from peak {height}'] = uniform, peak(size, 0, height)
    zipf = -3 * np.log(np.arange(1, size + 1))
    families['like a language model'] = normalise(zipf + normal()), normalise(zipf + normal())
    families['like a language model, close'] = normalise(zipf + 0.1 * normal()), normalise(zipf)
    far = np.full(size, -30.0)
    far[0] = 0
    families['far modes'] = normalise(far), normalise(far[::-1])
    one_hot = np.where(np.arange(size) == 1, 0.0, -INF)
    even, odd = np.arange(size) % 2 == 0, np.arange(size) % 2 == 1
    families['new has zeros'] = zeroed(normal(), even), normal()
    families['old has zeros'] = normal(), zeroed(normal(), even)
    families['disjoint'] = zeroed(normal(), even), zeroed(normal(), odd)
    # KL(π ‖ π_old) = −log π_old(support of π̃) ≈ 12 at least for any π on the support of π̃.
    families['one-hot where old has little'] = one_hot, peak(size, 0, 12)
    families['old is one-hot'] = peak(size, 0, 12), one_hot
    families['one-hot from uniform'] = one_hot, uniform
    families['uniform from one-hot'] = uniform, one_hot
    if size > 2:
        both = zeroed(normal(), [0])
        families['zeros in common'] = zeroed(normal(), [0]), both
        families['zeros on either side'] = zeroed(both, [1]), zeroed(both, [size - 1])
    return families


def restricted(log_probs, old_log_probs) -> np.ndarray:
    """π̃ on the support of π_old."""
    return zeroed(log_probs, old_log_probs == -INF)


@functools.partial(jax.jit, static_argnames='max_evaluations')
def project_all(log_probs, old_log_probs, bounds, max_evaluations=32):
    """Pairs [M, V] by bounds [E]."""
    one = functools.partial(project, max_evaluations=max_evaluations)
    by_bound = jax.vmap(lambda new, old, bound: one(new, old, bound=bound), (None, None, 0))
    return jax.vmap(by_bound, (0, 0, None))(log_probs, old_log_probs, bounds)


@functools.cache
def projected_pairs(size: int, dtype: str, bounds=BOUNDS):
    """All families × bounds: (name, bound, new, old, Projection), the inputs in the dtype they were projected in."""
    families = pairs(size)
    with jax.enable_x64(dtype == 'float64'):
        new, old = (np.stack([pair[i] for pair in families.values()]).astype(dtype) for i in (0, 1))
        results = jax.tree.map(np.asarray, project_all(new, old, np.asarray(bounds, dtype)))
    return [
        (name, bound, new[i], old[i], jax.tree.map(lambda x, i=i, j=j: x[i, j], results))
        for i, name in enumerate(families)
        for j, bound in enumerate(bounds)
    ]


def exact_weight(new, old, bound) -> float:
    """w by bracketing, in float64: the definition of κ and nothing else."""
    on = old > -INF

    def excess(log_w):
        return kl(old[on] + np.exp(log_w) * (new[on] - old[on]), old[on]) - bound

    return 1.0 if excess(0.0) <= 0 else np.exp(brentq(excess, -40.0, 0.0, xtol=1e-15, rtol=1e-15, maxiter=300))


def exact(new, old, bound, weight=None) -> np.ndarray:
    """log π by bracketing, for π̃ without zeros inside the support of π_old."""
    weight = exact_weight(new, old, bound) if weight is None else weight
    on = old > -INF
    return normalise(np.where(on, old + weight * (np.where(on, new, 0.0) - np.where(on, old, 0.0)), -INF))


def central(function, x, step):
    """Jacobian of a numpy function by central differences, output first."""
    x = np.atleast_1d(np.asarray(x, np.float64))
    columns = []
    for i in range(x.size):
        change = np.zeros_like(x)
        change[i] = step
        columns.append((function(x + change) - function(x - change)) / (2 * step))
    return np.stack(columns, axis=-1)
