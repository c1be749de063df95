"""What an update costs as the data grow, and an imagined transition as their number and the horizon grow.

    python -m benchmarks.growth                      # some 5 minutes, one thread, Hopper's shape

Updates are TD3+BC's, drawing included, 32 batches at once through the data module. World model and inverse dynamics
have their default sizes and are untrained, which does not change what they compute; both their tables go through
`dawm.synthesis.rollouts.Synthesizer`; a horizon of H counts as H transitions, whatever is dropped.
"""

import argparse
from collections.abc import Callable

import torch

from benchmarks.batch_drawing import batches
from benchmarks.measure import command_of, interleave, report, rows
from dawm.agents import TD3BC
from dawm.inverse_dynamics import InverseDynamics
from dawm.nn.matmul import prefer_onednn
from dawm.synthesis.rollouts import Synthesizer
from dawm.world_model import DiffusionWorldModel

OBSERVATIONS, ACTIONS, HORIZON = 11, 3, 8


def imagined(count: int, horizon: int) -> Callable[[], int]:
    """Imagines ``count`` transitions, rounded up to whole rollouts."""
    torch.manual_seed(0)
    model = DiffusionWorldModel(OBSERVATIONS, ACTIONS, horizon).eval()
    synthesizer = Synthesizer(model, InverseDynamics(OBSERVATIONS, ACTIONS).eval())
    starts = -(-count // horizon)
    start = torch.randn(starts, OBSERVATIONS), torch.rand(starts, ACTIONS), torch.randn(starts)

    def work() -> int:
        futures = synthesizer.imagine(start, torch.Generator().manual_seed(0))
        synthesizer.judge(futures).transitions()
        return starts * horizon

    return work


def updates(count: int, number: int = 256) -> Callable[[], int]:
    """TD3+BC updates on batches from ``count`` transitions."""
    torch.manual_seed(0)
    agent, drawn = TD3BC(OBSERVATIONS, ACTIONS), batches(count, 32)

    def work() -> int:
        for _ in range(number // 32):
            for agent.update_index, batch in enumerate(next(drawn)):
                agent.update(batch)
        return number

    return work


def main(argv: list[str] | None = None) -> list[tuple[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--numbers", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--horizons", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--starts", type=int, default=4096, help="rollouts of each horizon")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    prefer_onednn()
    tables, headlines = [], []
    for title, what, entries in (
        (
            "Updates, by number of real transitions",
            "updates",
            {f"{n:,} real transitions": updates(n) for n in options.rows},
        ),
        (
            f"Imagined transitions by number, horizon {HORIZON}",
            "transitions",
            {f"{n:,} transitions": imagined(n, HORIZON) for n in options.numbers},
        ),
        (
            f"Imagined transitions by horizon, {options.starts:,} rollouts each",
            "transitions",
            {f"horizon {h}": imagined(options.starts * h, h) for h in options.horizons},
        ),
    ):
        first, *_, last = [*entries, *entries]
        results = interleave(entries, options.rounds)
        body = rows(results, [first])
        for row, result in zip(body, results):
            row.append(f"{1e6 / result.median:,.2f}")
        header = ["with", f"{what}/s, median", "min to max", f"x {first}", "us each"]
        tables.append((title, header, body))
        headlines.append((f"{what}/s, {last} x {first}", next(row[3] for row in body if row[0] == last)))
    report("growth", command_of(__doc__, options), tables, " ".join(__doc__.split("\n\n")[2].split()))
    return headlines


if __name__ == "__main__":
    main()
