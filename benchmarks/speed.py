"""E5: the engine against the machine's matrix product and against rivals' loops, on the same energy.

    taskset -c 0 python benchmarks/speed.py

Seconds are those of the process on its one core (``time.process_time``), so that other work on the machine counts as
little as it can; all figures of a line are taken in turn within one run. Ratios carry over to other machines, seconds
do not. ``engine`` is the value and gradient of a ladder of five residual stages, 256 wide, on 8,192 particles in 64
dimensions (mixture features left out), beside MALA and the same sum by automatic differentiation, against the peak of a
2,048-square product. ``profile`` is the share of time by kind of operation, by autograd and by the engine. ``steps``
are updates of one chain. ``draws`` are draws a second of a ladder learned on digits, beside how far they are from it:
the error of the mean log density in nats, and the AUC of boosted trees against exact draws.
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
from latentprior.density.bases import GaussianMixtureBase, NormalBase
from latentprior.density.ladder import Ladder, Stage
from latentprior.density.ratios import build_ratio
from latentprior.density.sampling import LogDensity, hmc, langevin, mala
from latentprior.evaluation.metrics import two_sample_auc

DIM, WIDTH, DEPTH, STAGES, PARTICLES = 64, 256, 2, 5, 8192

SETTINGS = {"dim": DIM, "width": WIDTH, "depth": DEPTH, "stages": STAGES, "particles": PARTICLES}


def seconds(*calls: Callable[[], Any], rounds: int = 5) -> list[list[float]]:
    """Seconds of each call, in turn, ``(rounds, calls)``; a first round is not counted."""
    durations = []
    for _ in range(rounds + 1):
        durations.append([])
        for call in calls:
            start_time = time.process_time()
            call()
            durations[-1].append(time.process_time() - start_time)
    return durations[1:]


def median_seconds(*calls: Callable[[], Any], rounds: int = 5) -> list[float]:
    return [float(m) for m in np.median(seconds(*calls, rounds=rounds), axis=0)]


def ladder(stages: int, seed: int = 0) -> Ladder:
    generator = torch.Generator().manual_seed(seed)
    spec = {"kind": "residual", "event_shape": [DIM], "width": WIDTH, "depth": DEPTH, "bound": 5.0, "features": False}
    ratios = [build_ratio(spec, generator).eval().requires_grad_(False) for _ in range(stages)]
    for ratio in ratios:
        for block in ratio.network.blocks:  # type: ignore[union-attr]
            nn.init.normal_(block.outer.weight, std=WIDTH**-0.5, generator=generator)  # type: ignore[union-attr]
    return Ladder(NormalBase(DIM).float(), [Stage(ratio) for ratio in ratios])


def products(stages: int, rows: int) -> float:
    """Floating point operations of the matrix products in value and gradient."""
    return 2.0 * 2 * rows * stages * (DIM * WIDTH + 2 * DEPTH * WIDTH * WIDTH + WIDTH)


def by_autograd(rungs: Ladder) -> LogDensity:
    """The same value and gradient by automatic differentiation, in blocks of 2,048 rows."""

    def evaluate(u: Tensor) -> tuple[Tensor, Tensor]:
        values, grads = [], []
        for block in u.split(2048):
            value, grad = rungs.base.log_prob_and_grad(block)
            x = block.detach().requires_grad_(True)
            potential = torch.stack([ratio(x) for ratio in rungs.ratios]).sum(0)
            (slope,) = torch.autograd.grad(potential.sum(), x)
            values.append(value + potential.detach())
            grads.append(grad + slope)
        return torch.cat(values), torch.cat(grads)

    return evaluate


def engine() -> dict[str, Any]:
    """The share of the peak, and how seconds grow with stages and particles."""
    a, b = torch.randn(2, 2048, 2048)
    u, rungs = torch.randn(PARTICLES, DIM), ladder(STAGES)
    density = rungs.density(STAGES)
    state = mala.init(u, density, 0.1)
    calls = {
        "peak": lambda: a @ b,
        "autograd": lambda: by_autograd(rungs)(u),
        "value and gradient": lambda: density(u),
        "MALA": lambda: mala.step(state, density),
    }
    work = [2.0 * 2048**3, *3 * [products(STAGES, PARTICLES)]]
    rates = np.asarray(work) / np.asarray(seconds(*calls.values()))
    figures: dict[str, Any] = {"peak_gflops": float(np.median(rates[:, 0])) / 1e9}
    figures["share"] = {
        name: [float(q) for q in np.quantile(rates[:, i] / rates[:, 0], (0.5, 0, 1))]
        for i, name in enumerate(calls)
        if i
    }
    counts = (1, 2, 4, 8)
    densities = [ladder(k).density(k) for k in counts]
    some = u[:2048]
    stages = median_seconds(*(lambda f=f: f(some) for f in densities), rounds=5)  # type: ignore[misc]
    figures["stages"] = dict(zip(counts, stages, strict=True))
    sizes = (1024, 4096, 16_384, 32_768)
    rows = [torch.randn(n, DIM) for n in sizes]
    two = ladder(2).density(2)
    particles = median_seconds(*(lambda x=x: two(x) for x in rows), rounds=3)  # type: ignore[misc]
    figures["particles"] = dict(zip(sizes, particles, strict=True))
    return figures


KINDS = {
    "matrix products": ("mm", "addmm", "addmm_", "addmv_", "mv", "linear"),
    "SiLU and its derivative": ("sigmoid", "silu", "silu_backward", "lerp", "mul", "mul_", "addcmul_"),
    "sums and copies": ("add", "add_", "copy_", "cat", "fill_", "zero_", "sum"),
}


def profile() -> dict[str, dict[str, float]]:
    """Seconds and shares of time by kind of operation, before (autograd) and after."""
    u, rungs = torch.randn(PARTICLES, DIM), ladder(STAGES)
    figures = {}
    for name, density in (("autograd", by_autograd(rungs)), ("engine", rungs.density(STAGES))):
        density(u)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            density(u)
        spent = {event.key: float(event.self_cpu_time_total) for event in seen.key_averages()}
        total = sum(spent.values())
        shares = {kind: sum(spent.get(f"aten::{op}", 0.0) for op in ops) / total for kind, ops in KINDS.items()}
        figures[name] = {**shares, "the rest": 1 - sum(shares.values())}
    return figures


def products_tried() -> dict[str, float]:
    """Rates of other forms of the same matrix products, to the peak's."""
    n, k = 1024, STAGES
    a, b = torch.randn(2, 2048, 2048)
    x, narrow, weight = torch.randn(n, WIDTH), torch.randn(n, DIM), torch.randn(WIDTH, WIDTH)
    batch, weights = torch.randn(k, n, WIDTH), torch.randn(k, WIDTH, WIDTH)
    first, wide = torch.randn(WIDTH, DIM), torch.randn(k * WIDTH, DIM)
    half, half_weight = x.bfloat16(), weight.bfloat16()
    out, out_wide, out_batch = torch.empty(n, WIDTH), torch.empty(n, k * WIDTH), torch.empty(k, n, WIDTH)
    hidden, entry = 2.0 * n * WIDTH * WIDTH, 2.0 * n * DIM * WIDTH
    forms: dict[str, tuple[float, Callable[[], Any]]] = {
        "peak": (2.0 * 2048**3, lambda: a @ b),
        "hidden layer, one stage": (hidden, lambda: torch.mm(x, weight.t(), out=out)),
        "hidden layer, all stages in a batch": (k * hidden, lambda: torch.bmm(batch, weights, out=out_batch)),
        "first layer, one stage": (entry, lambda: torch.mm(narrow, first.t(), out=out)),
        "first layer, all stages in one": (k * entry, lambda: torch.mm(narrow, wide.t(), out=out_wide)),
        "hidden layer in bfloat16, conversions included": (hidden, lambda: out.copy_(half.copy_(x) @ half_weight)),
    }
    repeats = [max(1, round(2e9 / work)) for work, _ in forms.values()]

    def repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(times):
                call()

        return run

    calls = [repeated(call, times) for (_, call), times in zip(forms.values(), repeats, strict=True)]
    spent = np.asarray(seconds(*calls, rounds=9))
    rates = np.asarray([work for work, _ in forms.values()]) * repeats / spent
    shares = np.median(rates / rates[:, :1], axis=0)
    return {name: float(share) for name, share in zip(forms, shares, strict=True) if name != "peak"}


def lebm_loop(energy: nn.Module, z: Tensor, steps: int, size: float) -> Tensor:
    """The sampling loop of Pang et al. (2020): f by autograd, the normal base by hand."""
    for _ in range(steps):
        z = z.detach().requires_grad_(True)
        f = energy(z)
        grad = torch.autograd.grad(f.sum(), z)[0]
        z = z.data + 0.5 * size * size * (grad - z.data) + size * torch.randn_like(z)
    return z.detach()


def autograd_loop(log_prob: Callable[[Tensor], Tensor], z: Tensor, steps: int, size: float) -> Tensor:
    """The loop that most people write: the whole log density by autograd."""
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
    """Return compiled MALA of all chains: a function that gives every position ``(steps, n, d)``."""
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


def steps(chains: int = 2048, n: int = 3, size: float = 0.1) -> dict[str, dict[str, float]]:
    """Updates of one chain a second: median and best of the rounds; chains are start_time outside the clock."""
    rungs = ladder(STAGES)
    density, energy = rungs.density(STAGES), Sum(rungs.ratios)
    start = torch.randn(chains, DIM)
    compiled = blackjax_chains(rungs, start, n, size)

    start_time, moving = mala.init(start, density, size), hmc.init(start, density, size)

    def ours() -> None:
        state = start_time
        for _ in range(n):
            state, _ = mala.step(state, density)

    def hamiltonian() -> None:
        hmc.step(moving, density, n)

    loops: dict[str, Callable[[], Any]] = {
        "LEBM's loop (Langevin)": lambda: lebm_loop(energy, start, n, size),
        "plain autograd loop (Langevin)": lambda: autograd_loop(
            lambda z: rungs.base.log_prob(z) + energy(z), start, n, size
        ),
        "blackjax MALA": compiled,
        "latentprior Langevin": lambda: langevin.sample(start, density, steps=n, step_size=size),
        "latentprior MALA": ours,
        "latentprior HMC (leapfrog steps)": hamiltonian,
    }
    rates = chains * n / np.asarray(seconds(*loops.values(), rounds=7))
    return {
        name: {"median": float(np.median(rates[:, i])), "best": float(rates[:, i].max())}
        for i, name in enumerate(loops)
    }


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

    # There are many more base draws than rows, because a row that is resampled twice would give the samples away.
    pool = 1 << 18
    exact = rungs.fresh_particles(2048, torch.Generator().manual_seed(3), draws=pool).position
    level = prior.log_prob_whitened(exact)

    def quality(rows: Tensor) -> dict[str, float]:
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(4))[:2048]]
        there = prior.log_prob_whitened(rows)
        gap = float(there.mean() - level.mean())
        stderr = float((there.var() / len(rows) + level.var() / len(exact)).sqrt())
        return {"log_prob_error": gap, "stderr": stderr, "auc": two_sample_auc(rows[:1024], exact[:1024]).auc}

    def chain(run: Callable[[], np.ndarray]) -> dict[str, float]:
        run()
        start_time = time.process_time()
        positions = run()
        spent = time.process_time() - start_time
        thinned = torch.from_numpy(positions[len(positions) // 2 :: n // 16].copy()).flatten(0, 1)
        return {"rate": effective(positions) / spent, **quality(thinned)}

    def ours() -> np.ndarray:
        state, kept = mala.init(start, density, size), []
        for _ in range(n):
            state, _ = mala.step(state, density, generator)
            kept.append(state.position)
        return torch.stack(kept).numpy()

    figures: dict[str, Any] = {"stages": rungs.length, "dim": 16}
    start_time = time.process_time()
    rows = autograd_loop(prior.log_prob_whitened, prior.base.sample(2048, generator), 60, 0.4)
    rate = len(rows) / (time.process_time() - start_time)
    figures["LEBM's loop, 60 steps of 0.4"] = {"rate": rate, **quality(rows)}
    figures["blackjax MALA"] = chain(blackjax_chains(rungs, start, n, size))
    figures["latentprior MALA"] = chain(ours)
    start_time = time.process_time()
    fresh = rungs.fresh_particles(2048, generator, draws=pool)
    spent = time.process_time() - start_time
    figures["source"], figures["ess"] = fresh.source, fresh.ess
    if fresh.source == "importance":
        # A draw counts in proportion to its weight.
        rate = fresh.ess * pool / spent
        figures["latentprior, importance resampling"] = {"rate": rate, **quality(fresh.position)}
    return figures


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "engine": engine,
    "profile": profile,
    "products": products_tried,
    "steps": steps,
    "draws": draws,
}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    call = ask.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    figures: dict[str, Any] = {}
    for part in call.parts:
        figures[part] = PARTS[part]()
        print(part, figures[part], flush=True)
        kept = {**(read_results("speed") or {}), **figures}
        write_results("speed", {part: kept[part] for part in PARTS if part in kept}, threads=1, settings=SETTINGS)


if __name__ == "__main__":
    main()
