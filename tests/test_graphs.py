"""A graph of K updates does what the updates do one by one; a stand-in repeats the recorded work on a CPU."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch

from dawm.agents import IQL, TD3BC
from dawm.data.module import TransitionDataModule
from dawm.data.transitions import Transitions
from dawm.inverse_dynamics import InverseDynamics
from dawm.training import graphs
from dawm.training.graphs import CUDAGraphs, reason_against

HIDDEN = {"hidden": (8, 8)}
MODULES = [
    pytest.param(lambda *sizes: TD3BC(*sizes, **HIDDEN, decay_actor_learning_rate=True), id="td3_bc"),
    pytest.param(lambda *sizes: IQL(*sizes, **HIDDEN), id="iql"),
    pytest.param(lambda *sizes: TD3BC(*sizes, **HIDDEN, seeds=2), id="two seeds"),
]


class Repeated:
    """In place of a CUDA graph: keeps the work and what Python decided, and runs it at every launch."""

    launches = 0

    def __init__(self, work):
        self.work = work

    def __call__(self):
        Repeated.launches += 1
        return self.work()


@pytest.fixture
def repeated(monkeypatch):
    monkeypatch.setattr(graphs, "reason_against", lambda *args: None)
    monkeypatch.setattr(graphs, "record", Repeated)
    Repeated.launches = 0


def single(rate: float) -> float:
    """A learning rate as a tensor holds it, in single precision: a graph and updates one by one then round alike."""
    return float(torch.tensor(rate))


def trained(make, dataset, make_trainer, cuda_graphs, max_steps=50, callbacks=(), fraction=0.0):
    data = TransitionDataModule(dataset, horizon=2, batch_size=8, updates_per_step=4, synthetic_fraction=fraction)
    data.setup()
    torch.manual_seed(0)
    module = make(data.observation_size, data.action_size)
    exact = module.learning_rates
    module.learning_rates = lambda index: None if exact(index) is None else [single(rate) for rate in exact(index)]
    for group in module.parameter_groups():
        group["lr"] = single(group["lr"])
    trainer = make_trainer(max_steps, callbacks=[*callbacks, *([CUDAGraphs()] if cuda_graphs else [])])
    trainer.fit(module, datamodule=data)
    return module, trainer


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("max_steps", [48, 50])  # the last step may have two updates, and then runs them one by one
@pytest.mark.filterwarnings("error:cuda_graphs")
def test_a_graph_learns_what_updates_one_by_one_learn(make, max_steps, dataset, make_trainer, repeated):
    plain, _ = trained(make, dataset, make_trainer, False, max_steps)
    graphed, trainer = trained(make, dataset, make_trainer, True, max_steps)
    assert Repeated.launches == 48 // 4 - graphs.WARM_UP
    assert graphed.update_index == plain.update_index == max_steps
    for key, value in plain.state_dict().items():
        assert torch.equal(graphed.state_dict()[key], value), key
    assert trainer.callback_metrics["agent/critic_loss"].isfinite()
    assert graphed.update_graph is None
    assert all(isinstance(group["lr"], float) and not group["capturable"] for group in graphed.parameter_groups())


class FirstRefill(L.Callback):
    """Makes the first synthetic rows when the graph was recorded long ago."""

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == 24:
            data = trainer.datamodule
            data.refill(data.episodes.transitions[:5])


def test_a_graph_is_told_anew_which_rows_are_real(dataset, make_trainer, repeated):
    def make(*sizes):
        return TD3BC(*sizes, **HIDDEN, clone_real_only=True)

    states = [
        trained(make, dataset, make_trainer, graph, 48, [FirstRefill()], 0.5)[0].state_dict() for graph in (False, True)
    ]
    assert Repeated.launches == 48 // 4 - graphs.WARM_UP
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_a_batch_that_does_not_say_which_rows_are_real_is_recorded_too(repeated):
    module, batches = TD3BC(1, 1, **HIDDEN), Transitions.unpack(torch.rand(4, 8, 5), 1, 1)
    graphed = CUDAGraphs()
    graphed.on_fit_start(SimpleNamespace(), module)
    for step in range(4):
        graphed.run_updates(batches, 4 * step, [None] * 4)
    assert Repeated.launches == 2


def test_a_checkpoint_made_in_between_has_no_trace_of_the_graph(dataset, make_trainer, repeated, tmp_path):
    path = tmp_path / "last.ckpt"
    make = MODULES[1].values[0]

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            if trainer.global_step == 24:
                assert isinstance(module.parameter_groups()[0]["lr"], torch.Tensor)
                trainer.save_checkpoint(path)
                trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    trained(make, dataset, make_trainer, True, callbacks=[Save()])
    (state,) = torch.load(path, weights_only=True)["optimizer_states"]
    assert all(isinstance(group["lr"], float) and not group["capturable"] for group in state["param_groups"])


class Setting(TD3BC):
    """Sets its learning rate where a graph does not see it."""

    def update(self, batch):
        self.actor_optimizer.param_groups[0]["lr"] = 1e-3
        return super().update(batch)


class Recorder:
    """Runs the work while it is recorded, as far as Python goes."""

    def __init__(self, work):
        work()


def test_updates_that_cannot_be_recorded_run_one_by_one(dataset, make_trainer, monkeypatch):
    monkeypatch.setattr(graphs, "reason_against", lambda *args: None)

    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing\nand more lines")

    monkeypatch.setattr(graphs, "record", refuse)
    plain, _ = trained(MODULES[0].values[0], dataset, make_trainer, False)
    with pytest.warns(UserWarning, match="^cuda_graphs: .*when stream is capturing.; they run one by one$"):
        refused, _ = trained(MODULES[0].values[0], dataset, make_trainer, True)
    assert all(torch.equal(value, refused.state_dict()[key]) for key, value in plain.state_dict().items())
    monkeypatch.setattr(graphs, "record", Recorder)
    with pytest.warns(UserWarning, match="sets learning rates itself"):
        trained(lambda *sizes: Setting(*sizes, **HIDDEN), dataset, make_trainer, True)


class Plain(L.LightningModule):
    """Not an UpdateModule."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"strategy": SimpleNamespace(root_device=torch.device("cpu"))}, "cpu"),
        ({"world_size": 2}, "processes"),
        ({"precision": "bf16-mixed"}, "precision"),
    ],
)
def test_what_rules_a_graph_out(change, reason):
    trainer = {"strategy": SimpleNamespace(root_device=torch.device("cuda")), "world_size": 1, "precision": "32-true"}
    for module in (TD3BC(1, 1), IQL(1, 1), InverseDynamics(1, 1)):
        found = reason_against(module, SimpleNamespace(**trainer | change))
        assert found is None if reason is None else reason in found
    module.update_period = None
    assert "InverseDynamics does not" in reason_against(module, SimpleNamespace(**trainer))
    assert "Plain does not" in reason_against(Plain(), SimpleNamespace(**trainer))


def test_without_a_gpu_one_line_says_so(dataset, make_trainer):
    with pytest.warns(UserWarning, match="^cuda_graphs: it needs a CUDA device, and training is on cpu"):
        trained(MODULES[1].values[0], dataset, make_trainer, True, max_steps=4)


def test_a_graph_is_recorded_only_where_its_period_begins(dataset, make_trainer, repeated):
    trained(lambda *sizes: TD3BC(*sizes, **HIDDEN, policy_every=3), dataset, make_trainer, True)
    assert Repeated.launches == 0  # four updates a step are no multiple of three
