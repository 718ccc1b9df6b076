"""E5: the engine against the machine's matrix product and against rivals' loops, on the same energy.

    taskset -c 0 python benchmarks/speed.py

All figures of a line are taken in turn within one run, the best of several rounds: ratios carry over to other machines,
seconds do not. ``engine`` is the value and gradient of a ladder of five residual stages, 256 wide, on 8,192 particles
in 64 dimensions (mixture features left out), against the peak of a 2,048-square product. ``steps`` are updates of one
chain: LEBM's published loop and a plain loop by autograd, blackjax's MALA (compiled, all chains in one), and ours.
``draws`` are effective draws a second of a ladder learned on digits: chains by blackjax's own estimate of effective
size, importance resampling by its weights.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import Tensor, nn

import latentprior as lp
from _results import read_results, write_results
from latentprior.bases import GaussianMixtureBase, NormalBase
from latentprior.ladder import Ladder
from latentprior.ratios import build_ratio
from latentprior.sampling import langevin, mala

DIM, WIDTH, DEPTH, STAGES, PARTICLES = 64, 256, 2, 5, 8192
ROUNDS = 5


def seconds(call: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """The fastest of several rounds, the first of which is not counted."""
    call()
    best = float("inf")
    for _ in range(rounds):
        begun = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begun)
    return best


def ladder(stages: int, seed: int = 0) -> Ladder:
    generator = torch.Generator().manual_seed(seed)
    spec = {"kind": "residual", "event_shape": [DIM], "width": WIDTH, "depth": DEPTH, "bound": 5.0, "features": False}
    ratios = [build_ratio(spec, generator).eval().requires_grad_(False) for _ in range(stages)]
    return Ladder(NormalBase(DIM).float(), ratios)


def products(stages: int, rows: int) -> float:
    """Floating point operations of the matrix products in value and gradient."""
    return 2.0 * 2 * rows * stages * (DIM * WIDTH + 2 * DEPTH * WIDTH * WIDTH + WIDTH)


def engine() -> dict[str, Any]:
    """The share of the peak, and how seconds grow with stages and particles."""
    a, b = torch.randn(2, 2048, 2048)
    found: dict[str, Any] = {"rounds": []}
    u = torch.randn(PARTICLES, DIM)
    density = ladder(STAGES).density(STAGES)
    for _ in range(3):
        peak = 2 * 2048**3 / seconds(lambda: a @ b)
        own = products(STAGES, PARTICLES) / seconds(lambda: density(u))
        found["rounds"].append({"peak": peak, "engine": own, "share": own / peak})
    found["share"] = float(np.median([r["share"] for r in found["rounds"]]))
    found["stages"] = {k: seconds(lambda k=k: ladder(k).density(k)(u), 2) for k in (1, 2, 4, 8)}  # type: ignore[misc]
    found["particles"] = {
        n: seconds(lambda n=n: density(torch.randn(n, DIM)), 2)
        for n in (1024, 4096, 16_384, 65_536)  # type: ignore[misc]
    }
    print(found, flush=True)
    return found


def lebm_loop(energy: nn.Module, z: Tensor, steps: int, size: float) -> Tensor:
    """The sampling loop of Pang et al. (2020): f by autograd, the normal base by hand."""
    for _ in range(steps):
        z = z.detach().requires_grad_(True)
        f = energy(z)
        grad = torch.autograd.grad(f.sum(), z)[0]
        z = z.data + 0.5 * size * size * (grad - z.data) + size * torch.randn_like(z)
    return z.detach()


def autograd_loop(log_prob: Callable[[Tensor], Tensor], z: Tensor, steps: int, size: float) -> Tensor:
    """What most people write: the whole log density by autograd."""
    for _ in range(steps):
        z = z.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(log_prob(z).sum(), z)
        z = z.detach() + 0.5 * size * size * grad + size * torch.randn_like(z)
    return z.detach()


class Sum(nn.Module):
    """The ladder's log ratios as one energy."""

    def __init__(self, ratios: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.ratios = nn.ModuleList(ratios)

    def forward(self, u: Tensor) -> Tensor:
        return torch.stack([ratio(u) for ratio in self.ratios]).sum(0)


def jax_log_density(rungs: Ladder) -> Callable[[Any], Any]:
    """The same energy in JAX, one row in."""
    import jax
    import jax.numpy as jnp

    def arrays(module: nn.Module) -> dict[str, Any]:
        return {k: jnp.asarray(v.detach().numpy()) for k, v in module.state_dict().items()}

    weights = [(arrays(r.network), float(r.bound)) for r in rungs.ratios]  # type: ignore[arg-type, union-attr]
    base = rungs.base
    if isinstance(base, GaussianMixtureBase):
        means, log_weights = jnp.asarray(base.means.numpy()), jnp.asarray(base.log_weights.numpy())
        whiteners = jnp.linalg.inv(jnp.asarray(base.cholesky.numpy()))
        log_dets = jnp.log(jnp.abs(jnp.diagonal(whiteners, axis1=1, axis2=2))).sum(1)

    def log_density(u: Any) -> Any:
        if isinstance(base, GaussianMixtureBase):
            e = jnp.einsum("kij,kj->ki", whiteners, u - means)
            total = jax.nn.logsumexp(log_weights + log_dets - 0.5 * (e * e).sum(1))
        else:
            total = -0.5 * jnp.sum(u * u)
        for w, bound in weights:
            h = w["first.weight"] @ u + w["first.bias"]
            for i in range(DEPTH):
                inner = w[f"blocks.{i}.inner.weight"] @ jax.nn.silu(h) + w[f"blocks.{i}.inner.bias"]
                h = h + w[f"blocks.{i}.outer.weight"] @ jax.nn.silu(inner) + w[f"blocks.{i}.outer.bias"]
            f = (w["last.weight"] @ jax.nn.silu(h) + w["last.bias"])[0]
            total = total + bound * jnp.tanh(f / bound)
        return total

    return log_density


def blackjax_chains(rungs: Ladder, start: Tensor, steps: int, size: float) -> Callable[[], np.ndarray]:
    """Compiled MALA of all chains; what is returned runs them and gives every position ``(steps, n, d)``."""
    import blackjax
    import jax

    # blackjax moves by step * gradient + sqrt(2 step) * noise.
    kernel = blackjax.mala(jax_log_density(rungs), 0.5 * size * size)
    states = jax.vmap(kernel.init)(jax.numpy.asarray(start.numpy()))

    @jax.jit
    def run(key: Any, states: Any) -> Any:
        def one(states: Any, key: Any) -> Any:
            keys = jax.random.split(key, len(start))
            states, _ = jax.vmap(kernel.step)(keys, states)
            return states, states.position

        return jax.lax.scan(one, states, jax.random.split(key, steps))[1]

    return lambda: np.asarray(run(jax.random.key(0), states))


def steps(chains: int = 2048, n: int = 10, size: float = 0.1) -> dict[str, float]:
    """Updates of one chain a second."""
    rungs = ladder(STAGES)
    density, energy = rungs.density(STAGES), Sum(rungs.ratios)
    start = torch.randn(chains, DIM)
    compiled = blackjax_chains(rungs, start, n, size)

    def ours() -> None:
        state = mala.init(start, density, size)
        for _ in range(n):
            state, _ = mala.step(state, density)

    loops: dict[str, Callable[[], Any]] = {
        "LEBM's loop (Langevin)": lambda: lebm_loop(energy, start, n, size),
        "plain autograd loop (Langevin)": lambda: autograd_loop(
            lambda z: rungs.base.log_prob(z) + energy(z), start, n, size
        ),
        "blackjax MALA": compiled,
        "latentprior Langevin": lambda: langevin.sample(start, density, steps=n, step_size=size),
        "latentprior MALA": ours,
    }
    found = {name: chains * n / seconds(loop, 3) for name, loop in loops.items()}
    print(found, flush=True)
    return found


def draws(chains: int = 256, n: int = 200, size: float = 0.3) -> dict[str, Any]:
    """Effective draws a second of a ladder learned on 16 principal components of digits, with default settings."""
    import blackjax

    pixels = torch.tensor(PCA(16, random_state=0).fit_transform(load_digits().data), dtype=torch.float32)
    settings = lp.StageSettings(mixture_features=False, steps=600)
    prior = lp.fit(pixels, base="gmm:4", max_stages=1, settings=settings)
    rungs, generator = prior.ladder, torch.Generator().manual_seed(1)
    density, start = rungs.density(rungs.length), prior.base.sample(chains, torch.Generator().manual_seed(2))

    def effective(positions: np.ndarray) -> float:
        # The median over coordinates, of the second half.
        half = positions[len(positions) // 2 :]
        return float(np.median(np.asarray(blackjax.ess(half, chain_axis=1, sample_axis=0))))

    def rate(run: Callable[[], np.ndarray]) -> float:
        run()
        begun = time.perf_counter()
        positions = run()
        return effective(positions) / (time.perf_counter() - begun)

    def plain() -> np.ndarray:
        u, kept = start, []
        for _ in range(n):
            u = autograd_loop(prior.log_prob_whitened, u, 1, size)
            kept.append(u)
        return torch.stack(kept).numpy()

    def ours() -> np.ndarray:
        state, kept = mala.init(start, density, size), []
        for _ in range(n):
            state, _ = mala.step(state, density, generator)
            kept.append(state.position)
        return torch.stack(kept).numpy()

    found: dict[str, Any] = {
        "stages": rungs.length,
        "LEBM's loop (Langevin, biased)": rate(plain),
        "blackjax MALA": rate(blackjax_chains(rungs, start, n, size)),
        "latentprior MALA": rate(ours),
    }
    begun = time.perf_counter()
    rows = rungs.fresh_particles(1 << 15, generator)
    spent = time.perf_counter() - begun
    found |= {"source": rows.source, "ess": rows.ess}
    if rows.source == "importance":
        found["latentprior, importance resampling"] = rows.ess * (1 << 16) / spent
    print(found, flush=True)
    return found


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"engine": engine, "steps": steps, "draws": draws}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    ask.add_argument("--threads", type=int, default=1)
    call = ask.parse_args()
    torch.set_num_threads(call.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    kept = read_results("speed") or {}
    figures = {part: kept[part] for part in PARTS if part in kept}
    for part in call.parts:
        figures[part] = PARTS[part]()
        write_results("speed", figures, threads=call.threads, settings=vars(call))


if __name__ == "__main__":
    main()
