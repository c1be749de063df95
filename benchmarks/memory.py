"""What it brings to keep freed memory, and to imagine few futures at once; one thread.

    python -m benchmarks.memory            # some 5 minutes

Contestants: TD3+BC and IQL with layer norm in the critics (Hopper's shape), an update of the world model with its
forward models, and imagined transitions (HalfCheetah's shape, horizon 8, residual MLP of 256x3, labels of the forward
models). Each in processes of its own that take turns, with glibc's default and with `keep_freed_memory`. "pages" are
those that the system fetched and cleared for each update, or for 1,000 transitions.
"""

import argparse
import functools
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.agent_update import random_data
from benchmarks.measure import Rates, command_of, report, rows
from benchmarks.world_model_step import random_segments
from dawm.agents import IQL, TD3BC
from dawm.diffusion.denoisers import ResidualMLP
from dawm.inverse_dynamics import InverseDynamics
from dawm.nn.matmul import prefer_onednn
from dawm.nn.memory import keep_freed_memory
from dawm.synthesis import rollouts
from dawm.synthesis.rollouts import Synthesizer
from dawm.world_model import DiffusionWorldModel

OBSERVATIONS, ACTIONS, HORIZON, STARTS = 17, 6, 8, 4096
WAYS = DEFAULT, KEPT = "glibc's default", "kept"


def world_model() -> DiffusionWorldModel:
    network = functools.partial(ResidualMLP, width=256, depth=3)
    return DiffusionWorldModel(OBSERVATIONS, ACTIONS, HORIZON, network=network)


def updates_of_agent(kind: type) -> tuple[Callable[[], object], float]:
    agent, batch = kind(11, 3, critic_layer_norm=True), random_data(256, 11, 3)

    def update() -> None:
        agent.update_index += 1
        agent.update(batch)

    return update, 1


def updates_of_world_model(batch: int = 256) -> tuple[Callable[[], object], float]:
    model = world_model()
    segments = random_segments(batch, HORIZON, OBSERVATIONS, ACTIONS)
    return lambda: model.update(segments), 1


def imagining(chunk: int) -> tuple[Callable[[], object], float]:
    rollouts.CHUNK_ON_CPU = chunk
    inverse_dynamics = InverseDynamics(OBSERVATIONS, ACTIONS, hidden=(256, 256), members=3).eval()
    synthesizer = Synthesizer(world_model().eval(), inverse_dynamics, labels="forward")
    start = torch.randn(STARTS, OBSERVATIONS), torch.rand(STARTS, ACTIONS) * 2 - 1, torch.randn(STARTS)
    return lambda: synthesizer.imagine(start), STARTS * HORIZON / 1000


WORK: dict[str, Callable[[], tuple[Callable[[], object], float]]] = {
    "TD3+BC, updates": lambda: updates_of_agent(TD3BC),
    "IQL, updates": lambda: updates_of_agent(IQL),
    "world model, updates": updates_of_world_model,
    "thousand transitions, 4,096 futures at once": lambda: imagining(4096),
    "thousand transitions, 512 futures at once": lambda: imagining(512),
}


def measured(name: str, keep: bool, seconds: float) -> None:
    """Prints units per second and pages per unit, of about so many seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    prefer_onednn()
    if keep:
        keep_freed_memory()
    work, units = WORK[name]()
    for _ in range(3):
        work()
    done, pages, begun = 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        work()
        done += units
    elapsed = time.perf_counter() - begun
    print(done / elapsed, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pages) / done)


def main(argv: list[str] | None = None) -> list[tuple[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--one", nargs=2, default=None, help=argparse.SUPPRESS)  # name and way, of a single process
    options = parser.parse_args(argv)
    if options.one is not None:
        measured(options.one[0], options.one[1] == KEPT, options.seconds)
        return []
    torch.set_num_threads(1)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {(name, way): [] for name in WORK for way in WAYS}
    for index in range(options.rounds):
        for name, way in list(found)[:: -1 if index % 2 else 1]:
            command = [sys.executable, "-m", "benchmarks.memory", "--seconds", str(options.seconds), "--one", name, way]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rate, pages = map(float, printed.split())
            found[name, way].append((rate, pages))
    tables, body = {}, []
    for name in WORK:
        tables[name] = [Rates(way, [rate for rate, _ in found[name, way]]) for way in WAYS]
        for row in rows(tables[name], [DEFAULT]):
            pages = statistics.median(count for _, count in found[name, row[0]])
            body.append([name, *row, f"{pages:,.0f}"])
    header = ["what", "freed memory", "a second, median", "min to max", f"x {DEFAULT}", "pages"]
    notes = "Contestants" + __doc__.split("Contestants", 1)[1].rstrip()
    report("memory", command_of(__doc__, options), [("Freed memory", header, body)], notes)
    *_, many, few = WORK
    gain = tables[few][1].median / tables[many][0].median
    return [(f"{few}, freed memory kept, x {many}, {DEFAULT}", f"{gain:.2f}")]


if __name__ == "__main__":
    main()
