"""What a CPU cannot show: mixed precision, NCCL, compiled networks and graphs on a CUDA device."""

import warnings

import pytest
import torch

from dawm.agents import IQL, TD3BC
from dawm.cli.main import main
from dawm.data.module import TransitionDataModule
from dawm.training.graphs import CUDAGraphs
from dawm.world_model import DiffusionWorldModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.precision", "bf16-mixed"],
        ["--trainer.strategy", "ddp"],  # one process, gradients and decisions through NCCL
    ],
)
def test_all_stages(smoke, tmp_path, options):
    assert main(["fit", "--config", str(smoke), "--trainer.accelerator", "gpu", *options]) == 0
    for stage in ("world_model", "inverse_dynamics", "agent"):
        (path,) = (tmp_path / "run" / stage).glob("*/last.ckpt")
        weights = torch.load(path, weights_only=True)["state_dict"]
        for key, value in weights.items():
            if value.is_floating_point() and key != "best_errors":
                assert value.dtype == torch.float32, "mixed precision keeps the weights whole"
                assert value.isfinite().all(), key


@pytest.mark.parametrize("make", [lambda *sizes: TD3BC(*sizes, policy_noise=0.0), IQL])
def test_updates_in_a_graph_are_those_one_by_one(dataset, make_trainer, make):
    trained = []
    for cuda_graphs in (False, True):
        data = TransitionDataModule(dataset, horizon=2, batch_size=64, updates_per_step=4, synthetic_fraction=0.0)
        data.setup()
        torch.manual_seed(0)
        agent = make(data.observation_size, data.action_size)
        agent.fit_normalizers(data)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "cuda_graphs")
            callbacks = [CUDAGraphs()] if cuda_graphs else []
            make_trainer(40, accelerator="gpu", devices=1, callbacks=callbacks).fit(agent, datamodule=data)
        trained.append(agent.cpu().state_dict())
    for key, value in trained[0].items():
        torch.testing.assert_close(trained[1][key], value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("stage", ["world_model", "agent"])
def test_compiled_networks_learn(dataset, make_trainer, stage):
    data = TransitionDataModule(dataset, horizon=2, batch_size=8, segment_batch_size=8, updates_per_step=2,
                                synthetic_fraction=0.0)  # fmt: skip
    sizes = data.observation_size, data.action_size
    if stage == "world_model":
        module = DiffusionWorldModel(*sizes, horizon=2)
        network = module.network
    else:
        module = TD3BC(*sizes, hidden=(32, 32))
        network = module.critics
    before = [parameter.clone() for parameter in network.parameters()]
    network.compile()
    make_trainer(10, accelerator="gpu", devices=1).fit(module, datamodule=data)
    after = [parameter.cpu() for parameter in network.parameters()]
    assert all(value.isfinite().all() for value in after)
    assert not any(torch.equal(*pair) for pair in zip(before, after))
