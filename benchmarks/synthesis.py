"""Imagined transitions per second, and what fewer sampler steps cost in quality.

    python -m dawm fit --config lightning_configs/quickstart.yaml      # trains the world model of the second part
    python -m benchmarks.synthesis --run runs/quickstart               # some 10 minutes on one core

Contestants of the first part, on Hopper's shape, networks untrained and of equal width: DAWM's residual MLP over a
whole horizon with its few-step sampler, and the same network over a single transition with EDM's stochastic Heun
sampler of 128 steps (255 evaluations, churn 80 at levels of 0.05 to 50), as SynthER (arXiv 2303.06614) generates; both
with the matmuls that DAWM's commands choose. A horizon of H counts as H transitions.

The second part takes ONE trained world model, swaps its sampler and compares what it imagines with held-out segments:
"sliced Wasserstein" is the mean distance over random directions between the distributions of whole futures (normalised
differences and rewards), "standard deviation" that of imagined differences over that of real ones (1 is right),
"first step" the mean squared error of the first imagined difference, normalised. "Heun, churn 80" adds noise between
0.05 and 50, as above. "halves" compares one half of the real segments with the other: smaller samples from other
starts, so no lower bound.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import RESULTS, command_of, hardware_slug, interleave, ratio, report, rows
from dawm.cli.report import read_results
from dawm.data.module import TransitionDataModule
from dawm.data.transitions import Segments
from dawm.diffusion.denoisers import ResidualMLP
from dawm.diffusion.preconditioning import EDM
from dawm.diffusion.samplers import DDIM, DPMSolverPP2M, Heun, Sampler
from dawm.nn.matmul import prefer_onednn
from dawm.training.build import load_module
from dawm.world_model import DiffusionWorldModel

OBSERVATIONS, ACTIONS = 11, 3
CHURNED = partial(Heun, churn=80.0, churn_min=0.05, churn_max=50.0)
SAMPLERS = {
    "DDIM": DDIM,
    "DPM-Solver++(2M)": DPMSolverPP2M,
    "Heun": Heun,
    "Heun, churn 80": CHURNED,
}


def whole_horizon(horizon: int, width: int, depth: int, batch: int) -> Callable[[], int]:
    model = DiffusionWorldModel(
        OBSERVATIONS, ACTIONS, horizon, network=lambda *sizes: ResidualMLP(*sizes, width=width, depth=depth)
    ).eval()
    observations, actions, returns = torch.randn(batch, OBSERVATIONS), torch.rand(batch, ACTIONS), torch.randn(batch)

    @torch.no_grad()
    def work() -> int:
        model.imagine(observations, actions, returns)
        return batch * horizon

    return work


def single_transition(width: int, depth: int, batch: int) -> Callable[[], int]:
    size = 2 * OBSERVATIONS + ACTIONS + 2
    network, edm, sampler = ResidualMLP(1, size, 1, width=width, depth=depth).eval(), EDM(), CHURNED(128)
    condition = torch.zeros(batch, 1)

    @torch.no_grad()
    def work() -> int:
        sigmas, noise = edm.sampler_sigmas(128), torch.randn(batch, 1, size)
        sampler.sample(lambda x_t, sigma: edm.denoise(network, x_t, sigma, condition), sigmas, noise)
        return batch

    return work


def sliced_wasserstein(first: Tensor, second: Tensor, directions: int = 256) -> float:
    """Mean over random directions of the distance between two samples, each of shape (N, D)."""
    generator = torch.Generator().manual_seed(0)
    lines = torch.nn.functional.normalize(torch.randn(first.shape[1], directions, generator=generator), dim=0)
    return float(((first @ lines).sort(dim=0).values - (second @ lines).sort(dim=0).values).abs().mean())


def futures(model: DiffusionWorldModel, observations: Tensor, rewards: Tensor) -> Tensor:
    """Normalised differences and rewards, shape (B, H, O + 1)."""
    differences = model.codec.difference_normalizer(observations[:, 1:] - observations[:, :-1])
    return torch.cat([differences, model.codec.reward_normalizer(rewards.unsqueeze(-1))], dim=-1)


@torch.no_grad()
def quality(model: DiffusionWorldModel, real: Segments, sampler: Sampler) -> tuple[float, float, float, float]:
    """Sliced Wasserstein distance, standard deviation, first-step error and transitions per second."""
    model.sampler = sampler
    start = time.perf_counter()
    imagined = model.imagine(
        real.observations[:, 0], real.actions[:, 0], real.returns_to_go, generator=torch.Generator().manual_seed(0)
    )
    seconds = time.perf_counter() - start
    mine = futures(model, imagined.observations, imagined.rewards)
    true = futures(model, real.observations, real.rewards)
    return (
        sliced_wasserstein(mine.flatten(1), true.flatten(1)),
        float(mine[..., :-1].std() / true[..., :-1].std()),
        float((mine[:, 0, :-1] - true[:, 0, :-1]).square().mean()),
        real.rewards.numel() / seconds,
    )


def held_out(run: Path) -> tuple[DiffusionWorldModel, Segments]:
    """A run's world model, and segments that it was not trained on."""
    results = read_results(run)
    model = load_module(Path(results["stages"]["world_model"]["checkpoint"]))
    assert isinstance(model, DiffusionWorldModel)
    data = TransitionDataModule(results["data"]["dataset"], horizon=model.horizon, seed=results["seed"])
    data.setup()
    batches = list(data.validation_segment_loader())
    recorded = (name for name, values in vars(batches[0]).items() if values is not None)
    segments = Segments(**{name: torch.cat([getattr(batch, name) for batch in batches]) for name in recorded})
    return model, segments[segments.valid.bool().all(dim=1)]


def draw_plot(path: Path, curves: dict[str, list[tuple[int, tuple[float, ...]]]], floor: float) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for name, points in curves.items():
        for axis, column in zip(axes, range(3)):
            axis.plot([steps for steps, _ in points], [values[column] for _, values in points], marker=".", label=name)
    axes[0].axhline(floor, color="grey", linestyle="--", label="halves of the real segments")
    axes[1].axhline(1.0, color="grey", linestyle="--")
    for axis, title in zip(axes, ("sliced Wasserstein distance", "standard deviation", "first-step error")):
        axis.set(title=title, xlabel="sampler steps", xscale="log")
        axis.set_yscale("log")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(argv: list[str] | None = None) -> list[tuple[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=None, help="finished run whose world model the second part takes")
    parser.add_argument("--widths", nargs="+", default=["256x2", "1024x6"], help="networks of the first part")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4, 6, 8, 10, 16, 32, 64, 128])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    prefer_onednn()
    tables, headlines = [], []
    for text in options.widths:
        width, depth = (int(part) for part in text.split("x"))
        peer = "one transition, EDM Heun 128"
        entries = {f"DAWM, horizon {h}": whole_horizon(h, width, depth, options.batch) for h in (4, 8, 16, 32)}
        entries[peer] = single_transition(width, depth, options.batch)
        header = ["contestant", "transitions/s, median", "min to max", f"x {peer}"]
        results = interleave(entries, options.rounds)
        tables.append((f"Residual MLP {text}", header, rows(results, [peer])))
        for horizon in (8, 32):
            name = f"DAWM, horizon {horizon}"
            headlines.append((f"imagined transitions, {text}, horizon {horizon}: x {peer}", ratio(results, name, peer)))
    if options.run is not None:
        model, real = held_out(options.run)
        half = len(real) // 2
        true = futures(model, real.observations, real.rewards).flatten(1)
        shuffled = true[torch.from_numpy(np.random.default_rng(0).permutation(len(true)))]
        floor = sliced_wasserstein(shuffled[:half], shuffled[half : 2 * half])
        curves = {
            name: [(steps, quality(model, real, kind(num_steps=steps))) for steps in options.steps]
            for name, kind in SAMPLERS.items()
        }
        body = [
            [name, str(steps), f"{distance:.4f}", f"{std:.3f}", f"{error:.5f}", f"{rate:,.0f}"]
            for name, points in curves.items()
            for steps, (distance, std, error, rate) in points
        ]
        body.append(["halves", "", f"{floor:.4f}", "1", "", ""])
        header = [
            "sampler",
            "steps",
            "sliced Wasserstein",
            "standard deviation",
            "first step",
            "transitions/s (one call)",
        ]
        dataset = json.loads((options.run / "results.json").read_text())["data"]["dataset"]
        title = f"One world model on {len(real)} held-out segments of {dataset}, horizon {model.horizon}"
        tables.append((title, header, body))
        draw_plot(RESULTS / f"sampler-quality-{hardware_slug()}.png", curves, floor)
    notes = "Contestants" + __doc__.split("Contestants", 1)[1].rstrip()
    report("synthesis", command_of(__doc__, options), tables, notes)
    return headlines


if __name__ == "__main__":
    main()
