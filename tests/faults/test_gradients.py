"""Two ranks with half a batch each take the gradient of the whole batch."""

import types
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dawm.agents import IQL, TD3BC
from dawm.data.transitions import Segments, Transitions
from dawm.inverse_dynamics import InverseDynamics
from dawm.world_model import DiffusionWorldModel

pytestmark = pytest.mark.ddp

ROWS, HORIZON, OBSERVATIONS, ACTIONS = 32, 3, 4, 2
DRAWS = ("rand", "randn", "rand_like", "randn_like")


def transitions() -> Transitions:
    return Transitions(
        torch.randn(ROWS, OBSERVATIONS),
        torch.rand(ROWS, ACTIONS) * 2 - 1,
        torch.randn(ROWS),
        torch.randn(ROWS, OBSERVATIONS),
        (torch.rand(ROWS) < 0.2).float(),
    )


def segments() -> Segments:
    fields = {
        "observations": torch.randn(ROWS, HORIZON + 1, OBSERVATIONS),
        "actions": torch.rand(ROWS, HORIZON, ACTIONS) * 2 - 1,
        "rewards": torch.randn(ROWS, HORIZON),
        "terminations": torch.zeros(ROWS, HORIZON),
        "returns_to_go": torch.randn(ROWS),
        "valid": torch.ones(ROWS, HORIZON),
    }
    return Segments(**{key: fields[key] for key in Segments.__dataclass_fields__ if key in fields})


def cases() -> dict:
    """Modules whose optimisers do not move (the actor's gradient follows a step of the critics), and their batches."""
    torch.manual_seed(0)
    sizes = {"observation_size": OBSERVATIONS, "action_size": ACTIONS, "learning_rate": 0.0}
    agent = sizes | {"hidden": (32, 32)}
    return {
        "TD3BC": (TD3BC(**agent, policy_every=1), transitions()),
        "TD3BC cloning": (TD3BC(**agent, policy_every=1, alpha=0.0), transitions()),
        "IQL": (IQL(**agent), transitions()),
        "world model": (DiffusionWorldModel(**sizes, horizon=HORIZON, warmup_steps=1), segments()),
        "inverse dynamics": (InverseDynamics(**sizes, hidden=(32, 32)), transitions()),
    }


def gradients(part: slice) -> dict[str, list[list[torch.Tensor]]]:
    """Gradients of each module's optimisers after one update on a part of its batch.

    Random numbers are drawn for the whole batch, of which each rank takes its part.
    """
    originals = {name: getattr(torch, name) for name in DRAWS}

    def whole(name: str):
        def draw(*args, **kwargs):
            if name.endswith("_like"):
                shape = (ROWS, *args[0].shape[1:])
            else:
                shape = (ROWS, *torch.Size(args[0] if isinstance(args[0], tuple | torch.Size) else args)[1:])
            return originals[name.removesuffix("_like")](shape)[part]

        return draw

    result = {}
    for key, (module, batch) in cases().items():
        module._trainer = types.SimpleNamespace(max_steps=-1)
        for name in DRAWS:
            setattr(torch, name, whole(name))
        try:
            torch.manual_seed(1)
            module.update(batch[part])
        finally:
            for name, original in originals.items():
                setattr(torch, name, original)
        result[key] = [
            [parameter.grad.clone() for group in optimizer.param_groups for parameter in group["params"]]
            for optimizer in module.configure_optimizers()
        ]
    return result


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(gradients(HALVES[rank]), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


HALVES = slice(0, ROWS // 2), slice(ROWS // 2, ROWS)


def assert_equal(ours: list, theirs: list) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
        assert any(gradient.abs().max() > 1e-3 for gradient in mine), "nothing was learnt, so nothing was compared"


def test_two_ranks_take_the_gradient_of_the_joint_batch(tmp_path):
    mp.start_processes(rank_main, (tmp_path,), nprocs=2, start_method=processes.CONTEXT.get_start_method())
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    joint, halves = gradients(slice(0, ROWS)), [gradients(half) for half in HALVES]
    for key in joint:
        assert_equal(ranks[0][key], ranks[1][key])
    for key in ("TD3BC cloning", "IQL", "world model", "inverse dynamics"):
        assert_equal(ranks[0][key], joint[key])
    # TD3+BC's lambda is a mean over the batch, which each rank takes of its own: critics as above, and the actor's
    # gradient is the mean of the two ranks' own
    assert_equal(ranks[0]["TD3BC"][:1], joint["TD3BC"][:1])
    mean = [(a + b) / 2 for a, b in zip(halves[0]["TD3BC"][1], halves[1]["TD3BC"][1])]
    assert_equal(ranks[0]["TD3BC"][1:], [mean])
