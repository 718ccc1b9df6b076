"""Draw the pictures of the documentation into docs/images: ``python docs/pictures.py [NAME ...]``."""

import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import PolynomialFeatures

import latentprior as lp

DOCS = Path(__file__).parent
GREY, BLUE, RED = "0.75", "#1f5fa8", "#b5402a"
GRID = np.linspace(-7, 9, 4001)


def log_normal(x, mean, scale):
    return -0.5 * ((x - mean) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)


def integral(values, x=GRID):
    return float(np.trapezoid(values, x))


def ladder() -> plt.Figure:
    """Stages of a real ladder in one dimension, each bounded by 1.5 nats, against the exact target."""

    def target(x):
        return np.logaddexp(np.log(0.7) + log_normal(x, -1.5, 0.35), np.log(0.3) + log_normal(x, 2.0, 0.5))

    draws = np.random.default_rng(0)
    z = np.where(draws.random(8000) < 0.7, draws.normal(-1.5, 0.35, 8000), draws.normal(2.0, 0.5, 8000))
    settings = lp.StageSettings(bound=1.5, width=64, steps=1500, mixture_features=False)
    with warnings.catch_warnings():
        # The ladder is too short on purpose, so its warnings are expected.
        warnings.simplefilter("ignore")
        base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(1), torch.ones(1)), 1)
        prior = lp.fit(z[:, None].astype(np.float32), base=base, max_stages=2, whitening="none", settings=settings)
    x = np.linspace(-4, 4, 801)
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.6), sharey=True, constrained_layout=True)
    for k, axis in enumerate(axes):
        axis.fill_between(x, np.exp(target(x)), color=GREY, lw=0)
        short = prior.with_ladder(prior.ladder.first(k))
        with torch.no_grad():
            density = short.log_prob(torch.as_tensor(x[:, None], dtype=torch.float32)).exp().numpy()
        axis.plot(x, density, color=BLUE)
        axis.set(title="base" if k == 0 else f"{k} stage{'s' * (k > 1)}", yticks=[])
    return figure


def chasm() -> plt.Figure:
    """Exact log ratio of two normals, and the gain of its multiples, by integrals on a grid."""
    x, scale = GRID, 0.3
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    left.fill_between(x, np.exp(log_normal(x, 0, 1)), color=GREY, lw=0, label="$p_0$")
    left.fill_between(x, np.exp(log_normal(x, 4, scale)), color=RED, alpha=0.5, lw=0, label="$q$")
    left.set(xlim=(-4, 6), xlabel="z", ylabel="density")
    left.legend(loc="upper left", frameon=False)
    twin = left.twinx()
    twin.plot(x, log_normal(x, 4, scale) - log_normal(x, 0, 1), color=BLUE)
    twin.set(ylim=(-350, 50), ylabel="log q / p₀, nats")
    multiples = np.linspace(0, 3, 121)
    for mean, shade in ((0.0, 0.45), (1.0, 0.6), (2.0, 0.8), (4.0, 1.0)):
        p, q = np.exp(log_normal(x, 0, 1)), np.exp(log_normal(x, mean, scale))
        f = log_normal(x, mean, scale) - log_normal(x, 0, 1)
        gains = [
            2 * np.log(2) - integral(q * np.logaddexp(0, -a * f)) - integral(p * np.logaddexp(0, a * f))
            for a in multiples
        ]
        right.plot(multiples, gains, color=BLUE, alpha=shade, lw=1 + shade)
        right.text(3.05, gains[-1], f"m = {mean:g}", va="center")
    right.axhline(2 * np.log(2), color="0.5", lw=0.8, ls=":")
    right.axvline(1, color="0.5", lw=0.8, ls=":")
    right.set(xlabel="a", ylabel="gain, nats", xlim=(0, 3.6), ylim=(0, 1.45))
    return figure


def normaliser() -> plt.Figure:
    """Error of log E exp f over the rows that a classifier learned from, and over fresh ones."""
    features = PolynomialFeatures(9, include_bias=False)
    scale = np.abs(features.fit_transform(np.array([[2.5]])))
    grid = features.transform(GRID[(abs(GRID) < 6), None]) / scale
    inside = GRID[abs(GRID) < 6]
    sizes, results = (30, 100, 300, 1000), []
    for n in sizes:
        errors = []
        for repetition in range(200):
            draws = np.random.default_rng([n, repetition])
            p, q, fresh = draws.normal(0, 1, n), draws.normal(0.5, 1, n), draws.normal(0, 1, n)
            rows = features.transform(np.concatenate([p, q])[:, None]) / scale
            model = LogisticRegression(C=3.0, max_iter=300).fit(rows, np.repeat([0, 1], n))
            bounded = lambda f: 5 * np.tanh(f / 5)  # noqa: E731

            def log_ratio(x, model=model, bounded=bounded):
                return bounded(model.decision_function(features.transform(x[:, None]) / scale))

            f = bounded(model.decision_function(grid))
            exact = np.log(integral(np.exp(log_normal(inside, 0, 1) + f), inside))
            errors.append([logsumexp(log_ratio(rows)) - np.log(n) - exact for rows in (p, fresh)])
        results.append((np.mean(errors, 0), np.std(errors, 0)))
    means, spreads = (np.array(part) for part in zip(*results, strict=True))
    figure, axis = plt.subplots(figsize=(6, 3.2), constrained_layout=True)
    axis.axhline(0, color="0.5", lw=0.8)
    for column, (label, colour) in enumerate((("rows it learned from", RED), ("fresh rows", BLUE))):
        at = np.array(sizes) * (0.96 + 0.08 * column)
        axis.errorbar(at, means[:, column], spreads[:, column], color=colour, marker="o", capsize=3, label=label)
    axis.set(xscale="log", xlabel="n", ylabel="error of log Z, nats", xticks=sizes, xticklabels=sizes)
    axis.minorticks_off()
    axis.legend(frameon=False)
    for n, mean, spread in zip(sizes, means, spreads, strict=True):
        print(f"n {n}: learned {mean[0]:+.3f} ± {spread[0]:.3f}, fresh {mean[1]:+.3f} ± {spread[1]:.3f}")
    return figure


def tutorial() -> None:
    """Run the tutorial and keep its picture."""
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", code], cwd=folder, env={**os.environ, "MPLBACKEND": "agg"}, check=True)
        (DOCS / "images" / "tutorial.png").write_bytes((Path(folder) / "tutorial.png").read_bytes())


def rooms() -> plt.Figure:
    """The rooms of the package, as the contract in pyproject.toml orders them."""
    contract = (DOCS.parent / "pyproject.toml").read_text(encoding="utf-8").partition('name = "Rooms"')[2]
    layers = re.findall(r'"([^"]+)"', re.search(r"^layers = \[(.*?)\]", contract, re.MULTILINE | re.DOTALL)[1])
    verbs = {
        "cli": "latentprior ...", "explorer": "latentprior explore", "report": "write_report",
        "recipes": "what train reads", "baselines": "the rivals", "training": "train, train_two_phase",
        "integrations": "LatentDensity, export_onnx", "models": "LatentVariableModel, from_any",
        "fitting": "fit, refine", "density": "LatentPrior", "data": "Latents, read_images",
        "storage": "save_pretrained", "runtime": "Progress, Event", "evaluation": "metrics",
        "errors": "errors and warnings",
    }  # fmt: skip
    figure, axis = plt.subplots(figsize=(8, 6.6), constrained_layout=True)
    for level, layer in enumerate(layers):
        names = layer.split(" | ")
        width = 10 / len(names)
        for column, name in enumerate(names):
            corner = (column * width + 0.06, -level + 0.12)
            axis.add_patch(plt.Rectangle(corner, width - 0.12, 0.76, facecolor="#eaf1f9", edgecolor=BLUE))
            middle = (column + 0.5) * width
            axis.text(middle, -level + 0.62, name, ha="center", va="center", weight="bold")
            axis.text(middle, -level + 0.31, verbs.get(name, ""), ha="center", va="center", color="0.35", size=8)
    arrow = {"arrowstyle": "-|>", "color": RED, "lw": 1.5}
    axis.annotate("", (10.3, 1 - len(layers) + 0.1), (10.3, 0.9), arrowprops=arrow)
    axis.text(10.5, (1 - len(layers)) / 2 + 0.5, "imports go downwards", rotation=270, va="center", color=RED)
    axis.set(xlim=(0, 10.9), ylim=(1 - len(layers), 1))
    axis.axis("off")
    return figure


PICTURES = {"ladder": ladder, "chasm": chasm, "normaliser": normaliser, "rooms": rooms, "tutorial": tutorial}

if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        figure = PICTURES[name]()
        if figure is not None:
            figure.savefig(DOCS / "images" / f"{name}.png", dpi=110)
            plt.close(figure)
