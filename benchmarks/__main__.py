"""Runs every benchmark of speed and prints their headline ratios in one table.

    python -m benchmarks                             # some half hour; each script also runs alone
    python -m benchmarks --run runs/quickstart       # with the quality of the samplers
    python -m benchmarks --quick                     # whether they run: figures of no use

`data_scale` and `long_run`, which take long and much disk, and `memory`, which starts many processes, run only alone.
"""

import argparse
from pathlib import Path

from rich.console import Console

from benchmarks import agent_update, batch_drawing, end_to_end, evaluation, growth, synthesis, world_model_step
from benchmarks.measure import show

QUICK = {
    agent_update: "--updates 2 --rows 2000 --rounds 1 --shapes hopper --seeds 2",
    batch_drawing: "--rows 2000 --rounds 1 --growth 1000",
    world_model_step: "--horizons 8 --batches 8 --rounds 1",
    synthesis: "--widths 16x1 --batch 4 --rounds 1",
    growth: "--rows 1000 2000 --numbers 100 200 --horizons 2 4 --starts 8 --rounds 1",
    evaluation: "--environments Hopper-v5 --episodes 2 --num_envs 2 --rounds 1",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest sizes")
    parser.add_argument("--run", type=Path, default=None, help="finished run whose world model the samplers share")
    options = parser.parse_args(argv)
    headlines = []
    for script, quick in QUICK.items():
        arguments = quick.split() if options.quick else []
        if script is synthesis and options.run is not None:
            arguments = [*arguments, "--run", str(options.run)]
        headlines += script.main(arguments)
    if not options.quick:  # a whole fit
        headlines += end_to_end.main([])
    show(Console(), "Ratios", ["what", "ratio"], headlines)


if __name__ == "__main__":
    main()
