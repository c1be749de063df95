"""Training updates per second of the world model on Hopper's shape, one thread.

    python -m benchmarks.world_model_step            # some 3 minutes

Contestants: DAWM's world model (denoising loss, clipping, averaged weights, without forward models) with its
networks, the default one and wider ones; and a residual MLP of 1024x6 on single transitions with EDM's loss in a plain
loop, the network of SynthER (arXiv 2303.06614), with and without the matmuls that DAWM's commands choose. An update of
DAWM's learns H transitions of each segment of its batch at once, one of SynthER's a single one.
"""

import argparse
from collections.abc import Callable

import torch

from benchmarks.measure import command_of, interleave, ratio, report, rows, with_dawm_matmuls
from benchmarks.synthesis import ACTIONS, OBSERVATIONS
from dawm.data.transitions import Segments
from dawm.diffusion.denoisers import Denoiser, ResidualMLP, TemporalTransformer, TemporalUNet
from dawm.diffusion.preconditioning import EDM, denoising_loss
from dawm.world_model import DiffusionWorldModel

PEER = "SynthER-style 1024x6, plain loop"
NETWORKS: dict[str, Callable[..., Denoiser]] = {
    "residual MLP 256x2 (default)": lambda *sizes: ResidualMLP(*sizes, width=256, depth=2),
    "residual MLP 512x4": lambda *sizes: ResidualMLP(*sizes, width=512, depth=4),
    "residual MLP 1024x6": lambda *sizes: ResidualMLP(*sizes, width=1024, depth=6),
    "temporal U-Net": TemporalUNet,
    "temporal transformer": TemporalTransformer,
}


def random_segments(batch: int, horizon: int, observations: int = OBSERVATIONS, actions: int = ACTIONS) -> Segments:
    return Segments(
        torch.randn(batch, horizon + 1, observations),
        torch.rand(batch, horizon, actions) * 2 - 1,
        torch.randn(batch, horizon),
        torch.zeros(batch, horizon),
        torch.ones(batch, horizon),
        torch.randn(batch),
    )


def ours(network: Callable[..., Denoiser], horizon: int, batch: int, updates: int = 4) -> Callable[[], int]:
    model = DiffusionWorldModel(OBSERVATIONS, ACTIONS, horizon, network=network, forward_members=0)
    segments = random_segments(batch, horizon)

    def work() -> int:
        for _ in range(updates):
            model.update(segments)
        return updates

    return work


def peer(batch: int) -> Callable[[], int]:
    size = 2 * OBSERVATIONS + ACTIONS + 2
    network, edm = ResidualMLP(1, size, 1, width=1024, depth=6), EDM()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-4)
    data, condition = torch.randn(batch, 1, size), torch.zeros(batch, 1)

    def work() -> int:
        loss, _ = denoising_loss(edm, network, data, condition)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return 1

    return work


def main(argv: list[str] | None = None) -> list[tuple[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--horizons", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    tables, headlines = [], []
    for horizon in options.horizons:
        for batch in options.batches:
            entries = {n: with_dawm_matmuls(ours(network, horizon, batch)) for n, network in NETWORKS.items()}
            entries[f"{PEER}, DAWM's matmuls"] = with_dawm_matmuls(peer(batch))
            entries[PEER] = peer(batch)
            header = ["contestant", "updates/s, median", "min to max", f"x {PEER}"]
            results = interleave(entries, options.rounds)
            tables.append((f"Horizon {horizon}, batch {batch}", header, rows(results, [PEER])))
            what = f"world model update, horizon {horizon}, batch {batch}: default x {PEER}"
            headlines.append((what, ratio(results, next(iter(NETWORKS)), PEER)))
    notes = "Contestants" + __doc__.split("Contestants", 1)[1].rstrip()
    report("world-model-step", command_of(__doc__, options), tables, notes)
    return headlines


if __name__ == "__main__":
    main()
