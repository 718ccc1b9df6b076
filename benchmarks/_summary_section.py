"""The head of RESULTS.md: what was shown, which test rows were seen while choosing what, which tables are older."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from _latent_sections import latents_in_short

__all__ = ["choices", "shown"]


def shown(figures: Mapping[str, str]) -> list[str]:
    """Return what the sections below show, each claim beside what speaks against it."""
    f = figures
    return [
        "## What was shown",
        "",
        latents_in_short(),
        "",
        f"- **Density.** On {f['ladders.ahead']} of {f['ladders.sets']} sets the ladder has a higher held-out log "
        "density than every rival, at every seed, in half of the flows' time. On pca50 it is behind a masked "
        f"autoregressive flow at two seeds of three, log Z is known to {f['pca50.log_z_error']} nats only, and trees "
        f"tell its samples from data (AUC {f['pca50.auc']}). On taef512 no stage was kept, so the figure there is that "
        "of the base.",
        f"- **Stages.** Of the {f['ladders']} ladders of this table {f['ladders.one_stage']} have one ratio and "
        f"{f['ladders.no_stage']} have none. Ladders from N(0, I) have two to four in the tables below, and those of "
        "CIFAR-10's images, by an older learner, have up to two.",
        f"- **Samples.** On {f['frechet.behind']} of the {f['frechet.sets']} sets that decode to images another "
        "method's samples come nearer to test images in Fréchet distance. The nearest of all are draws around "
        f"training rows (VampPrior, kernels), whose log density is {f['cifar128.copies.lag']} nats and more below the "
        "ladder's on cifar128.",
        f"- **Stages that see pictures.** `refine` raises the ladder by {f['cifar128.refined.rise']} nats on cifar128 "
        f"and by {f['taef512.refined.rise']} on taef512. Against it: log Z is known to "
        f"{f['cifar128.refined.log_z_error']} nats at worst, trees tell its samples from data better than before (AUC "
        f"{f['cifar128.refined.auc']}), and 10,000 samples take {f['taef512.refined.sampling_minutes']} to "
        f"{f['cifar128.refined.sampling_minutes'].split()[-1]} minutes.",
        f"- **Normalisers.** Of {f['coverage.fits']} stated intervals a share of {f['coverage']} holds the truth "
        f"(nominal: 0.954), at no target less than {f['coverage.least']}. On known densities log Z is within three "
        f"standard errors at {f['known_truth.within']} targets. At 512 coordinates the independent check says little: "
        f"{f['taef512.integral']} of a density whose integral is 1.",
        "- **Images.** Joint learning has the least Fréchet distance of all methods on the same autoencoder. A "
        "ladder on an autoencoder of three times the steps has less still, and on CIFAR-10 a mixture does as well "
        "there. These tables are older than the present learner.",
        f"- **Cost.** To LEBM's final distance two-phase learning takes {f['cost.two_phase']} s where LEBM takes "
        f"{f['cost.lebm']} s, on MNIST. This table is older too.",
        f"- **Anomalies on MNIST.** At {f['anomalies.neighbours_ahead']} of the papers' five digits the distance to "
        "neighbours on the same features is ahead of the ladder.",
        "- **Outliers in tables.** On the half of ADBench that the settings were chosen on, the detector ranks "
        f"{f['detector.at_hand.aucroc']} by AUCROC and {f['detector.at_hand.aucpr']} by AUCPR of 15. On the other "
        f"half, never seen, its mean rank is {f['detector.other_half.aucroc.mean_rank']} and "
        f"{f['detector.other_half.aucpr.mean_rank']}, where the best published detectors have "
        f"{f['published.other_half.aucroc.mean_rank']} and {f['published.other_half.aucpr.mean_rank']}. The defaults "
        "were fitted to the tables at hand.",
        f"- **Scale.** A fit of {f['scale.rows']} rows of 16 coordinates takes {f['scale.rows.seconds']} core seconds "
        f"and {f['scale.rows.mib']} MiB with short stages; {f['scale.coordinates']} coordinates take "
        f"{f['scale.coordinates.seconds']} s. Two processes of one thread take {f['processes.two_processes']} s where "
        f"two threads of one process take {f['processes.two_threads']} s. There is no figure on GPUs.",
        "",
    ]


def choices() -> list[str]:
    """Return the tables of what was chosen with which test rows in view, and of which figures are older."""
    return [(Path(__file__).parent / "_choices.md").read_text(encoding="utf-8")]
