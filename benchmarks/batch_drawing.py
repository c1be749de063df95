"""Transitions drawn per second in batches of 256 from 1 M transitions of Hopper's shape, one thread; and its growth.

    python -m benchmarks.batch_drawing               # some 2 minutes

Contestants: DAWM's loader, `TransitionDataModule.mixed_loader`, handing over K batches at once, from real rows alone or
half of them from 80,000 synthetic ones; a plain PyTorch buffer of one tensor per field; TorchRL's
TensorDictReplayBuffer and d3rlpy's replay buffer where they are installed; PyTorch's DataLoader over single
transitions. The second table has DAWM's loader on 10 k to 10 M transitions.
"""

import argparse
from collections.abc import Callable, Iterator
from unittest import mock

import gymnasium as gym
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.agent_update import BATCH, random_data
from benchmarks.data_scale import RandomRows
from benchmarks.measure import command_of, interleave, ratio, report, rows
from benchmarks.plain_agents import PlainBuffer
from dawm.data import episodes
from dawm.data.module import TransitionDataModule
from dawm.data.sources.spaces import unbounded
from dawm.data.transitions import Transitions

SIZES = (11, 3)


class HopperLike(RandomRows):
    """Random rows of Hopper's shape in episodes of 1000 steps."""

    observation_space, action_space = unbounded(SIZES[0]), gym.spaces.Box(-1.0, 1.0, (SIZES[1],), np.float32)


def batches(count: int, chunk: int, fraction: float = 0.0) -> Iterator[Transitions]:
    """K batches at once from ``count`` real rows through the data module's loader, other rows every time."""
    settings = {"batch_size": BATCH, "synthetic_fraction": fraction, "updates_per_step": chunk, "horizon": 1}
    with mock.patch.object(episodes, "_open", return_value=HopperLike(count)):
        data = TransitionDataModule("random", memory_limit=1e9, **settings)
        data.setup()
    if fraction:
        data.refill(random_data(80_000, *SIZES))
    return iter(data.mixed_loader(10**12))


def ours(count: int, chunk: int, fraction: float = 0.0, updates: int = 1024) -> Callable[[], int]:
    drawn = batches(count, chunk, fraction)

    def work() -> int:
        for _ in range(updates // chunk):
            next(drawn)
        return updates * BATCH

    return work


def endless(loader: DataLoader) -> Iterator:
    while True:
        yield from loader


def several(draw: Callable[[], object], batches: int) -> Callable[[], int]:
    def work() -> int:
        for _ in range(batches):
            draw()
        return batches * BATCH

    return work


def contestants(data: Transitions) -> dict[str, Callable[[], int]]:
    buffer = PlainBuffer(data)
    loader = endless(DataLoader(TensorDataset(*buffer.fields), BATCH, shuffle=True))
    found = {
        **{f"DAWM, K={chunk}": ours(len(data), chunk) for chunk in (1, 8, 32)},
        "DAWM, K=32, half synthetic": ours(len(data), 32, 0.5),
        "plain PyTorch buffer": several(lambda: buffer.sample(BATCH), 64),
        "DataLoader of single transitions": several(lambda: next(loader), 8),
    }
    try:
        from tensordict import TensorDict
        from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

        torchrl = TensorDictReplayBuffer(storage=LazyTensorStorage(len(data)), batch_size=BATCH)
        torchrl.extend(TensorDict(dict(zip("abcde", buffer.fields)), [len(data)]))
        found["TorchRL"] = several(torchrl.sample, 64)
    except ImportError as error:
        print(f"TorchRL is left out ({error})")
    try:
        import d3rlpy

        # its buffer of Python objects is slow to build, and its drawing does not depend on the size
        count = min(len(data), 100_000)
        terminals = np.zeros(count)
        terminals[999::1000] = 1
        columns = data.observations[:count].numpy(), data.actions[:count].numpy(), data.rewards[:count].numpy()
        dataset = d3rlpy.dataset.MDPDataset(*columns, terminals)
        found["d3rlpy"] = several(lambda: dataset.sample_transition_batch(BATCH), 8)
    except ImportError as error:
        print(f"d3rlpy is left out ({error})")
    return found


def main(argv: list[str] | None = None) -> list[tuple[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--growth", type=int, nargs="*", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    entries = contestants(random_data(options.rows, *SIZES))
    results = interleave(entries, options.rounds)
    references = [name for name in entries if not name.startswith("DAWM")]
    header = ["contestant", "transitions/s, median", "min to max", *(f"x {name}" for name in references)]
    tables = [(f"Batches of {BATCH} from {options.rows:,} transitions", header, rows(results, references))]
    if options.growth:
        growth = {f"{count:,} transitions": ours(count, 32) for count in options.growth}
        first = next(iter(growth))
        header = ["DAWM, K=32, from", "transitions/s, median", "min to max", f"x {first}"]
        tables.append(("Growth", header, rows(interleave(growth, options.rounds), [first])))
    notes = "Contestants" + __doc__.split("Contestants", 1)[1].rstrip()
    report("batch-drawing", command_of(__doc__, options), tables, notes)
    return [(f"drawing, K=32: x {name}", ratio(results, "DAWM, K=32", name)) for name in references]


if __name__ == "__main__":
    main()
