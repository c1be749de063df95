"""Updates per second of TD3+BC and IQL, drawing included: batch 256, two hidden layers of 256, by default one thread.

    python -m benchmarks.agent_update                # some 10 minutes on one core
    python -m benchmarks.agent_update --threads 2
    python -m benchmarks.agent_update --device cuda

Each agent with and without layer norm in its critics. Contestants: compiled JAX, where installed (`jax_agents`, one
`lax.scan` over the updates); a plain PyTorch loop as single-file research code writes it (`plain_agents`); the same
networks and losses in naive Lightning (a DataLoader over single transitions, one update per training step, progress bar
and log); d3rlpy where it is installed; DAWM's update called in a loop; DAWM in its Trainer with K updates per training
step. DAWM's matmuls are computed as its commands compute them; the plain loop is measured with oneDNN's, too, which
AMD processors with AVX-512 need.

"bf16" rounds the factors of the MLPs' matmuls. "seeds" counts the updates of all agents trained side by side. Each
round of the contestants in a Trainer starts a Trainer of its own, which takes some 30 ms, and in DAWM's the first
updates are recorded and compared, some 0.1 s; so DAWM's in a Trainer makes eight times as many updates a round as the
others. With one thread the process is held on one core.
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measure import command_of, interleave, one_core, ratio, report, rows, with_dawm_matmuls
from benchmarks.plain_agents import PlainBuffer, PlainIQL, PlainTD3BC
from dawm.agents import IQL, TD3BC
from dawm.data.batches import BatchLoader, RowStream, take
from dawm.data.transitions import Transitions
from dawm.nn.compiled import has_bf16
from dawm.training.graphs import CUDAGraphs

SHAPES = {"hopper": (11, 3), "halfcheetah": (17, 6)}
BATCH, CHUNK = 256, 50
LONGER = 8  # rounds of DAWM in its Trainer
JAX = "compiled JAX"


def random_data(count: int, observation_size: int, action_size: int) -> Transitions:
    """Random rows: they serve to measure speed alone."""
    generator = torch.Generator().manual_seed(0)
    observations, next_observations = torch.randn(2, count, observation_size, generator=generator)
    actions = torch.rand(count, action_size, generator=generator) * 2 - 1
    rewards = torch.randn(count, generator=generator)
    return Transitions(observations, actions, rewards, next_observations, torch.zeros(count))


class Naive(L.LightningModule):
    """The plain agent as a first LightningModule: one update per step, everything logged."""

    def __init__(self, agent: PlainTD3BC | PlainIQL) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.agent = agent
        self.anchor = torch.nn.Linear(1, 1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log_dict(self.agent.train(batch), prog_bar=True)
        optimizer = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        optimizer.total.completed += 1

    def configure_optimizers(self) -> None:
        return None


def loader(data: torch.Tensor, sizes: tuple[int, int], updates: int, seeds: int = 1) -> BatchLoader:
    streams = [RowStream(seed) for seed in range(seeds)]

    def draw(count: int) -> Transitions:
        numbers = torch.stack([stream.draw(len(data), count, BATCH) for stream in streams], 1)
        return Transitions.unpack(take(data, numbers if seeds > 1 else numbers[:, 0]), *sizes)

    return BatchLoader(draw, [(stream, BATCH) for stream in streams], updates, CHUNK)


def trainer(updates: int, device: str, folder: str, graphs: bool = False) -> L.Trainer:
    return L.Trainer(
        callbacks=[CUDAGraphs()] if graphs else [],
        max_steps=updates,
        max_epochs=-1,
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        logger=L.pytorch.loggers.CSVLogger(folder),
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=2,
    )


def contestants(
    name: str, norm: bool, data: Transitions, updates: int, device: str, seeds: int, folder: str
) -> dict[str, Callable[[], int]]:
    sizes = data.observations.shape[1], data.actions.shape[1]
    packed, buffer = data.pack().to(device), PlainBuffer(data, device)
    kind, plain_kind = {"TD3+BC": (TD3BC, PlainTD3BC), "IQL": (IQL, PlainIQL)}[name]
    plain, settings = plain_kind(*sizes, device, norm), {"critic_layer_norm": norm}

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    def plain_loop() -> int:
        for _ in range(updates):
            plain.train(buffer.sample(BATCH))
        return updates

    def ours(count: int, precision: str = "fp32") -> Callable[[], int]:
        agent = kind(*sizes, seeds=count, **settings).to(device)
        agent.matmul_precision = precision

        def work() -> int:
            for batches in loader(packed, sizes, updates, count):
                agent.run_updates(batches)
            wait()
            return updates * count

        return work

    def in_trainer(graphs: bool) -> Callable[[], int]:
        agent = kind(*sizes, **settings)

        def work() -> int:
            trainer(LONGER * updates, device, folder, graphs).fit(agent, loader(packed, sizes, LONGER * updates))
            wait()
            return LONGER * updates

        return work

    fields = TensorDataset(*(field.cpu() for field in buffer.fields))

    def naive() -> int:
        data_loader = DataLoader(fields, BATCH, shuffle=True)
        trainer(updates, device, folder).fit(Naive(plain_kind(*sizes, device, norm)), data_loader)
        return updates

    found = {
        "plain PyTorch loop": plain_loop,
        "plain PyTorch loop, DAWM's matmuls": with_dawm_matmuls(plain_loop),
        "naive Lightning": naive,
        "DAWM, update in a loop": with_dawm_matmuls(ours(1)),
        f"DAWM, Trainer, K={CHUNK}": with_dawm_matmuls(in_trainer(graphs=False)),
    }
    if device != "cpu":
        found[f"DAWM, Trainer, K={CHUNK}, CUDA graph"] = in_trainer(graphs=True)
    peer = None if norm else _d3rlpy(name, data, device)
    if peer is not None:
        found["d3rlpy"] = lambda: peer(updates)
    if seeds > 1:
        found[f"DAWM, {seeds} seeds side by side"] = with_dawm_matmuls(ours(seeds))
    if device == "cpu" and has_bf16():
        found["DAWM in a loop, bf16"] = with_dawm_matmuls(ours(1, "bf16"))
    if device == "cpu" and torch.get_num_threads() == 1:
        found |= _jax(name, norm, buffer, updates, seeds)
    return found


def _jax(name: str, norm: bool, buffer: PlainBuffer, updates: int, seeds: int) -> dict[str, Callable[[], int]]:
    try:
        from benchmarks import jax_agents
    except ImportError as error:
        print(f"JAX is left out ({error})")
        return {}
    fields = [field.squeeze(-1).numpy() for field in buffer.fields]
    counts = {JAX: 1} | ({f"{JAX}, {seeds} seeds by vmap": seeds} if seeds > 1 else {})
    return {label: jax_agents.contestant(name, fields, norm, updates, count) for label, count in counts.items()}


def _d3rlpy(name: str, data: Transitions, device: str) -> Callable[[int], int] | None:
    try:
        import d3rlpy
    except ImportError as error:
        print(f"d3rlpy is left out ({error})")
        return None
    # its buffer of Python objects is slow to build, and its drawing does not depend on the size
    count = min(len(data), 100_000)
    terminals = np.zeros(count)
    terminals[999::1000] = 1
    dataset = d3rlpy.dataset.MDPDataset(
        data.observations[:count].numpy(), data.actions[:count].numpy(), data.rewards[:count].numpy(), terminals
    )
    config = {"TD3+BC": d3rlpy.algos.TD3PlusBCConfig, "IQL": d3rlpy.algos.IQLConfig}[name](batch_size=BATCH)
    algorithm = config.create(device=False if device == "cpu" else "cuda:0")
    algorithm.build_with_dataset(dataset)

    def work(updates: int) -> int:
        for _ in range(updates):
            algorithm.update(dataset.sample_transition_batch(BATCH))
        return updates

    return work


def main(argv: list[str] | None = None) -> list[tuple[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=300, help="updates of one round")
    parser.add_argument("--rows", type=int, default=1_000_000, help="transitions to draw from")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seeds", type=int, default=5, help="agents of the contestant with several")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; JAX takes part with one alone")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    tables: list = []
    headlines, against_jax = [], []
    alone = options.device == "cpu" and options.threads == 1
    with tempfile.TemporaryDirectory() as folder, one_core() if alone else nullcontext():
        for name, shape, norm in product(("TD3+BC", "IQL"), options.shapes, (False, True)):
            data = random_data(options.rows, *SHAPES[shape])
            entries = contestants(name, norm, data, options.updates, options.device, options.seeds, folder)
            results = interleave(entries, options.rounds)
            references = [n for n in ("plain PyTorch loop", "naive Lightning", "d3rlpy", JAX) if n in entries]
            header = ["contestant", "updates/s, median", "min to max", *(f"x {n}" for n in references)]
            title = f"{name}, {shape}{', layer norm' if norm else ''}"
            tables.append((title, header, rows(results, references)))
            ours = f"DAWM, Trainer, K={CHUNK}"
            headlines += [(f"{title}: DAWM in its Trainer x {n}", ratio(results, ours, n)) for n in references]
            if JAX in entries:
                of_seeds = ratio(results, f"DAWM, {options.seeds} seeds side by side", JAX) if options.seeds > 1 else ""
                against_jax.append([title, ratio(results, ours, JAX), of_seeds])
    if against_jax:
        head = ["case", f"DAWM in its Trainer / {JAX}", f"{options.seeds} seeds side by side / {JAX}, one seed"]
        tables.insert(0, (f"DAWM against {JAX}", head, against_jax))
    notes = "Contestants" + __doc__.split("Contestants", 1)[1].rstrip()
    name = "agent-update" if options.threads == 1 else f"agent-update-{options.threads}-threads"
    report(name, command_of(__doc__, options), tables, notes)
    return headlines


if __name__ == "__main__":
    main()
