"""One process of a run: ``python process_worker.py FOLDER TASK``, the launcher's variables in the environment."""

import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from latentprior import LatentPriorError
from latentprior.data.images import Images
from latentprior.models.model import LatentVariableModel
from latentprior.models.networks import build_decoder, build_encoder, network_spec
from latentprior.runtime.events import Event
from latentprior.runtime.processes import Processes, joined, launched_processes
from latentprior.training.config import TrainingConfig
from latentprior.training.joint import train
from latentprior.training.joint_learner import JointLearner
from latentprior.training.joint_task import JointTask
from linear_gaussian import PIXELS, LinearDecoder

SPEC = network_spec("mlp", 2, 8, PIXELS)
CONFIG = TrainingConfig(
    stages=1, steps=6, switch="schedule", settle_steps=4, batch_size=16, posterior_steps=3, prior_steps=3,
    posterior_start="persistent", prior_sampler="persistent", ratio_width=8, ratio_depth=1, ratio_learning_rate=1e-2,
    learning_rate=1e-3, average=0.9, evaluate_every=2, held_out=20, bound=2.0,
)  # fmt: skip


def images() -> Images:
    g = torch.Generator().manual_seed(0)
    x = LinearDecoder(2, scale=0.25).float()(torch.randn(116, 2, generator=g)).detach()
    return Images((x + 0.1 * torch.randn(x.shape, generator=g)).clamp(-1, 1))


def model() -> LatentVariableModel:
    g = torch.Generator().manual_seed(4)
    return LatentVariableModel(build_decoder(SPEC, g), sigma=0.2, encoder=build_encoder(SPEC, g))


def followed(processes: Processes, updates: int) -> dict[str, Tensor]:
    """Weights and gradients after some updates, with latents that are functions of the images alone."""
    one = JointLearner(model(), images(), CONFIG, 0, processes)
    for _ in range(updates):
        x, _ = one.task.batch()
        posterior = x.flatten(1)[:, :2] + x.flatten(1)[:, 2:4]
        one.ratio.update(posterior, 2 * x.flatten(1)[:, 4:])
        one.decoder.update(x, posterior)
    found = {}
    for name, network in (("networks", one.decoder.networks.module), ("ratio", one.ratio.ratio)):
        for key, value in network.named_parameters():
            found |= {f"{name}.{key}": value.detach(), f"{name}.{key}.grad": value.grad}
    return found


def messages(processes: Processes) -> dict[str, Tensor]:
    """What comes of averaging, gathering and telling numbers that differ between processes."""
    rank = processes.rank
    whole = torch.arange(3, dtype=torch.float64) * 10 ** (8 * rank)
    half = torch.full((2, 2), 1.0 + rank, dtype=torch.bfloat16)
    processes.average([whole, half])
    ranks = torch.tensor([*processes.gather(10.0 * rank), *processes.first((7.0 + rank, 2.0))])
    mine = joined(processes, processes.stripe(torch.arange(5)))
    return {"whole": whole, "half": half.float(), "ranks": ranks, "joined": mine}


def main(folder: Path, task: str) -> None:
    processes = launched_processes()

    def die(event: Event) -> None:
        if task == "stop" and (event.kind, event.step) == ("step", 5):
            raise KeyboardInterrupt

    if task == "check":
        found = messages(processes) | followed(processes, 5)
        save_file({k: v.contiguous() for k, v in found.items()}, folder / f"found-{processes.rank}.safetensors")
    if task == "die" and processes.rank == 1:
        batch = JointTask.batch

        def fatal(self: JointTask) -> tuple[Tensor, Tensor]:
            if self.step == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return batch(self)

        JointTask.batch = fatal  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = train(
            model(), images(), CONFIG, checkpoint_dir=folder / "run", resume=True, processes=processes,
            callbacks=[lambda event: print(event.kind, event.stage, event.step, flush=True), die],
        )  # fmt: skip
    save_file({k: v.contiguous() for k, v in made.state()[1].items()}, folder / f"made-{processes.rank}.safetensors")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except LatentPriorError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
