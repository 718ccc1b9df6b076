"""E2: held-out log density, sample quality and time on latents of real generators, all methods in one run.

    python benchmarks/latents.py --sets mnist16 cifar64 --seeds 3

Every method sees the same rows, threads and machine in turn. Log densities are in the coordinates that
the ladder's whitening standardises (the same for all), test rows, nats. The flow is zuko's neural spline flow,
trained for ``--flow-seconds`` under a cosine schedule with early stopping on validation rows; the ladder has half
of that as its budget. The ladder's density is integrated by importance sampling from two other densities.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import torch
import zuko
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal
from tqdm import tqdm

import latentprior as lp
from _data import LatentSet, load_set
from _features import decode_mnist16, lenet_features, mnist_images
from _results import write_results
from latentprior.metrics import frechet_distance, two_sample_auc
from latentprior.normalizers import check
from latentprior.progress import FitProgress

SAMPLES = 10_000


class FlowRival:
    """zuko NSF by maximum likelihood: AdamW 2e-3, cosine over the time it is given, best validation kept.

    Three transforms, 256 x 2, batches of 1,024: the best on validation rows of three settings tried on mnist16.
    """

    def __init__(self, dim: int) -> None:
        self.flow = zuko.flows.NSF(dim, transforms=3, hidden_features=(256, 256), bins=8)

    def fit(self, data: Any, validation: Tensor, seconds: float) -> float:
        optimizer = torch.optim.AdamW(self.flow.parameters(), lr=2e-3, weight_decay=1e-4)
        begun, best, best_at, best_state = time.monotonic(), -float("inf"), 0.0, self.flow.state_dict()
        step = 0
        with tqdm(total=round(seconds), desc="flow", unit="s") as bar:
            while (spent := time.monotonic() - begun) < seconds:
                for group in optimizer.param_groups:
                    group["lr"] = 1e-3 * (1 + torch.cos(torch.tensor(torch.pi * spent / seconds)).item())
                loss = -self.flow().log_prob(data(1024)).mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.flow.parameters(), 5.0)
                optimizer.step()
                step += 1
                if step % 100 == 0:
                    score = self.log_prob(validation).mean().item()
                    if score > best:
                        best, best_at = score, time.monotonic() - begun
                        best_state = {k: v.clone() for k, v in self.flow.state_dict().items()}
                    bar.n = round(spent)
                    bar.set_postfix(validation=f"{score:.3f}", best=f"{best:.3f}")
        self.flow.load_state_dict(best_state)
        return best_at

    @torch.no_grad()
    def log_prob(self, u: Tensor) -> Tensor:
        return torch.cat([self.flow().log_prob(block) for block in u.split(4096)])

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        return torch.cat([self.flow().sample((min(4096, n - i),)) for i in range(0, n, 4096)])


def measure(latents: LatentSet, seed: int, flow_seconds: float) -> dict[str, dict[str, Any]]:
    """Fit and score every method once; returns figures by method."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    train = lp.Latents(latents.train, latents.train_scale)
    validation = lp.Latents(latents.validation, latents.validation_scale)
    rows: dict[str, dict[str, Any]] = {}

    begun = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ladder = lp.fit(
            train,
            validation=validation,
            seed=seed,
            time_budget=flow_seconds / 2,
            callbacks=[FitProgress()],
        )
    ladder_seconds = time.monotonic() - begun
    whiten, unwhiten = ladder.whitening.whiten, ladder.whitening.unwhiten
    test = whiten(torch.as_tensor(latents.test, dtype=torch.float32))
    held_out = whiten(validation.draw(torch.arange(len(validation)), generator))

    def draw(n: int) -> Tensor:
        index = torch.randint(len(train), (n,), generator=generator)
        return whiten(train.draw(index, generator))

    everything = whiten(train.draw(torch.arange(len(train)), generator))

    def report(name: str, log_prob: Any, samples: Tensor, seconds: float, sampling: float, **more: Any) -> None:
        values = log_prob(test).double()
        figures = {
            "log_prob": values.mean().item(),
            "log_prob_stderr": (values.std() / len(values) ** 0.5).item(),
            "auc": two_sample_auc(samples[: len(test)], test, seed=seed).auc,
            "seconds": seconds,
            "seconds_per_10k_samples": sampling * 10_000 / len(samples),
            **more,
        }
        if latents.name == "mnist16":
            figures["frechet"] = frechet_distance(REAL, lenet_features(decode_mnist16(unwhiten(samples))))
        rows[name] = figures
        print(
            f"{latents.name} seed {seed} {name}: " + ", ".join(f"{k} {v}" for k, v in figures.items()),
            flush=True,
        )

    if latents.name == "mnist16":
        real = mnist_images("test")
        global REAL
        REAL = lenet_features(real)
        floors = {
            "reconstructions": lenet_features(decode_mnist16(torch.as_tensor(latents.test))),
            "real": lenet_features(mnist_images("train")[:SAMPLES]),
        }
        rows["floors"] = {k: frechet_distance(REAL, v) for k, v in floors.items()}

    d = test.shape[1]
    shift = -ladder.whitening.log_abs_det
    standard = Normal(torch.zeros(d), torch.ones(d))
    noise = torch.randn(SAMPLES, d, generator=generator)
    report("N(0,I)", lambda u: standard.log_prob(unwhiten(u)).sum(1) + shift, whiten(noise), 0.0, 0.0)
    mean, cov = everything.mean(0), torch.cov(everything.T)
    gaussian = MultivariateNormal(mean, cov)
    report("Gaussian", gaussian.log_prob, gaussian.sample((SAMPLES,)), 0.0, 0.0)

    # The number of components is searched once a set, by validation, and kept for further seeds.
    begun = time.monotonic()
    mixture = best = None
    for k in [COMPONENTS[latents.name]] if latents.name in COMPONENTS else SEARCH[latents.name]:
        mixture = GaussianMixture(k, random_state=seed, reg_covar=1e-4, max_iter=100).fit(everything.numpy())
        score = mixture.score(held_out.numpy())
        if best is not None and score < best[0]:
            break
        best = score, mixture
    mixture = best[1]
    COMPONENTS[latents.name] = mixture.n_components
    mixture_seconds = time.monotonic() - begun
    drawn = torch.from_numpy(mixture.sample(SAMPLES)[0]).float()

    def mixture_log_prob(u: Tensor) -> Tensor:
        return torch.from_numpy(mixture.score_samples(u.numpy()))

    report(
        "GMM", mixture_log_prob, drawn[torch.randperm(SAMPLES)], mixture_seconds, 0.0, components=mixture.n_components
    )

    flow = FlowRival(d)
    best_at = flow.fit(draw, held_out, flow_seconds)
    begun = time.monotonic()
    drawn = flow.sample(SAMPLES)
    report("flow (NSF)", flow.log_prob, drawn, flow_seconds, time.monotonic() - begun, best_at=best_at)

    begun = time.monotonic()
    drawn = whiten(ladder.sample((SAMPLES,), generator=generator))
    sampling = time.monotonic() - begun
    integral = ladder.check_normalizer(generator=generator)
    base_draws = ladder.base.sample(200_000, generator)
    from_base = check(ladder.log_prob_whitened, ladder.base.log_prob, base_draws, "base")
    report(
        "ladder",
        ladder.log_prob_whitened,
        drawn,
        ladder_seconds,
        sampling,
        log_prob_base=ladder.base.log_prob(test).mean().item(),
        log_prob_stderr_normalizer=ladder.log_prob_stderr,
        integral=list(integral),
        integral_from_base=list(from_base),
        bracket=ladder.bracket and [list(ladder.bracket.forward), list(ladder.bracket.reverse)],
        warnings=[str(w.message) for w in caught],
        stopped=ladder.info["stopped"],
        stages=[
            {"gain": s.gain, "gain_stderr": s.gain_stderr, "log_normalizer": s.log_normalizer,
             "log_normalizer_stderr": s.log_normalizer_stderr, "seconds": s.diagnostics["seconds"],
             "ess": s.diagnostics["ess"], "saturated": s.diagnostics["saturated"],
             "particles": s.diagnostics["particles"]}
            for s in ladder.stages
        ],
    )  # fmt: skip
    return rows


REAL = torch.empty(0)
COMPONENTS: dict[str, int] = {}
SEARCH = {"mnist16": [80, 160], "vae20": [40, 80, 160], "cifar64": [16, 32, 64]}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--sets", nargs="+", default=["mnist16", "cifar64"])
    ask.add_argument("--seeds", type=int, default=3)
    ask.add_argument("--flow-seconds", type=float, default=180)
    ask.add_argument("--threads", type=int, default=2)
    call = ask.parse_args()
    torch.set_num_threads(call.threads)
    for name in call.sets:
        results: dict[str, Any] = {}
        latents = load_set(name)
        for seed in range(call.seeds):
            warnings.simplefilter("ignore")  # scikit-learn's, of EM stopped early
            results.setdefault(name, []).append(measure(latents, seed, call.flow_seconds))
            write_results(f"latents_{name}", {"sets": results}, threads=call.threads, settings=vars(call))


if __name__ == "__main__":
    main()
