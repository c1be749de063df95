"""A replayed update does what the update itself does, to the last bit, or is not replayed."""

import copy
import itertools
import pickle
import threading
import warnings
from functools import partial

import lightning as L
import pytest
import torch
from small_world_model import TINY

from dawm.agents import IQL, TD3BC
from dawm.data.module import TransitionDataModule
from dawm.data.transitions import Transitions
from dawm.diffusion.denoisers import ResidualMLP
from dawm.diffusion.preconditioning import EDM
from dawm.inverse_dynamics import InverseDynamics
from dawm.nn import compiled
from dawm.nn.ema import EMA
from dawm.training import recording, replay
from dawm.world_model import DiffusionWorldModel

HIDDEN = {"hidden": (8, 8)}


def small_world_model(*sizes):
    return DiffusionWorldModel(*sizes, horizon=2, network=TINY, forward_members=2)


MODULES = [
    pytest.param(lambda *sizes: TD3BC(*sizes, **HIDDEN, decay_actor_learning_rate=True), id="td3_bc"),
    pytest.param(lambda *sizes: TD3BC(*sizes, **HIDDEN, policy_every=3, critic_layer_norm=True), id="every third"),
    pytest.param(lambda *sizes: TD3BC(*sizes, **HIDDEN, seeds=2, clone_real_only=True), id="two seeds"),
    pytest.param(lambda *sizes: IQL(*sizes, **HIDDEN), id="iql"),
    pytest.param(lambda *sizes: IQL(*sizes, **HIDDEN, actor_dropout=0.1), id="dropout"),
    pytest.param(lambda *sizes: InverseDynamics(*sizes, members=2, **HIDDEN), id="inverse dynamics"),
    pytest.param(small_world_model, id="world model"),
]


@pytest.fixture
def replays(monkeypatch):
    """Counts the updates that are replayed; None in it rules replaying out."""
    counts = [0]
    call = recording.Recording.__call__

    def counted(self, batch):
        counts[0] += 1
        return call(self, batch)

    monkeypatch.setattr(recording.Recording, "__call__", counted)
    ticks = itertools.count()
    monkeypatch.setattr(recording, "perf_counter", lambda: next(ticks) ** 2)  # by which a replay is always faster
    monkeypatch.setattr(
        replay, "applies", lambda module, applies=replay.applies: counts[0] is not None and applies(module)
    )
    return counts


def batches(count, first=0, rows=8):
    generator = torch.Generator().manual_seed(first)
    return Transitions.unpack(torch.rand(count, rows, 2 * 3 + 2 + 2, generator=generator), 3, 2)


def same(one, other):
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


class Logged(L.Callback):
    """Keeps what is logged at each training step."""

    def on_train_start(self, trainer, module):
        self.values = []

    def on_train_batch_end(self, trainer, module, *args):
        self.values.append({k: v.clone() for k, v in trainer.callback_metrics.items()})
        if trainer.global_step == 20:  # the first synthetic rows come late
            data = trainer.datamodule
            data.refill(data.episodes.transitions[:5])


@pytest.mark.parametrize("build", ["compiled", "plain"])
@pytest.mark.parametrize("make", MODULES)
def test_what_is_replayed_learns_and_logs_the_same(make, build, dataset, make_trainer, replays, monkeypatch):
    if build == "plain":
        monkeypatch.setattr(compiled, "library", lambda: None)

    def trained():
        data = TransitionDataModule(dataset, horizon=2, batch_size=8, updates_per_step=4, synthetic_fraction=0.5)
        data.setup()
        torch.manual_seed(0)
        module = make(data.observation_size, data.action_size)
        logged = Logged()
        make_trainer(102, callbacks=[logged]).fit(module, datamodule=data)
        return module, logged.values, torch.rand(1)

    replayed, logged, random = trained()
    assert replays[0] >= 100 - 2 * replayed.update_period  # an update as it is, a recorded one, all others replayed
    replays[0] = None
    plain, expected, same_random = trained()
    assert same(replayed, plain)
    assert logged == expected
    assert random == same_random
    assert all(isinstance(group["lr"], float) for group in replayed.parameter_groups())


def test_settings_weights_and_sizes_changed_in_between_are_seen(replays, monkeypatch):
    monkeypatch.setattr(replay, "WORTHWHILE", 10)

    def trained():
        torch.manual_seed(0)
        module = TD3BC(3, 2, **HIDDEN)
        module.run_updates(batches(40))
        module.alpha = 40.0
        module.run_updates(batches(40, 1), 40)
        module.actor.weights.data = module.actor.weights.data * 1.5  # other memory
        module.run_updates(batches(40, 2), 80)
        module.critic_optimizer.load_state_dict(copy.deepcopy(module.critic_optimizer.state_dict()))  # other memory
        module.run_updates(batches(40, 3), 120)
        module.actor_optimizer.param_groups[0]["lr"] = 1e-2
        module.run_updates(batches(40, 4, rows=5), 160)
        module.run_updates(batches(40, 5), 200)
        return module

    replayed = trained()
    assert replays[0] >= 6 * (40 - 4)
    replays[0] = None
    assert same(replayed, trained())


def test_settings_of_parts_and_ema_changed_in_between_are_seen(dataset, make_trainer, replays):
    data = TransitionDataModule(dataset, horizon=2, batch_size=8, segment_batch_size=8, updates_per_step=4)
    data.setup()

    def trained():
        torch.manual_seed(0)
        module = small_world_model(data.observation_size, data.action_size)
        module.fit_normalizers(data)
        start = copy.deepcopy(module.state_dict())
        for step, batch in enumerate(data.segment_loader(60, 0)):
            if step == 5:
                module.preconditioning.log_sigma_mean = -1.0
            if step == 10:
                module.load_state_dict(start)  # whose EMA has not begun
            module.run_updates(batch, 4 * step)
        return module

    replayed = trained()
    assert replays[0] > 30
    replays[0] = None
    assert same(replayed, trained())


def test_a_copy_goes_on_by_itself(replays):
    module = TD3BC(3, 2, **HIDDEN)
    module.run_updates(batches(40))
    twin = copy.deepcopy(module)
    assert same(module, twin)
    assert isinstance(pickle.loads(pickle.dumps(module._replay)), replay.Replay)
    torch.manual_seed(1)
    module.run_updates(batches(40, 1), 40)
    torch.manual_seed(1)
    twin.run_updates(batches(40, 1), 40)
    assert same(module, twin)


def hook_a_module(module, calls):
    module.actor.register_forward_hook(lambda *args: calls.append(1))
    return 6


def hook_an_optimizer(module, calls):
    module.critic_optimizer.register_step_post_hook(lambda *args: calls.append(1))
    return 12


def hook_a_gradient(module, calls):
    module.actor.weights.register_hook(lambda gradient: calls.append(1))
    return 6


def patch_a_method(module, calls):
    critic_loss = module.critic_loss
    module.critic_loss = lambda batch: calls.append(1) or critic_loss(batch)
    return 12


def patch_a_method_by_partial(module, calls):
    def counted(critic_loss, batch):
        calls.append(1)
        return critic_loss(batch)

    module.critic_loss = partial(counted, module.critic_loss)
    return 12


@pytest.mark.parametrize(
    "intrude", [hook_a_module, hook_an_optimizer, hook_a_gradient, patch_a_method, patch_a_method_by_partial]
)
def test_hooks_and_patched_methods_are_called_each_time(intrude, replays):
    module, calls = TD3BC(3, 2, **HIDDEN), []
    module.run_updates(batches(40))
    before = replays[0]
    expected = intrude(module, calls)
    module.run_updates(batches(12, 1), 12)
    assert replays[0] == before > 0
    assert len(calls) == expected


def test_gradients_are_those_of_the_last_update(replays):
    def trained():
        torch.manual_seed(0)
        module, found = TD3BC(3, 2, **HIDDEN), []
        for step in range(30):
            module.run_updates(batches(1, step), step)
            found.append([p.grad.norm() for p in module.parameters() if p.grad is not None])
        return found

    replayed = trained()
    assert replays[0] > 10
    replays[0] = None
    assert replayed == trained()


def test_another_thread_may_act_meanwhile(replays):
    module = TD3BC(3, 2, **HIDDEN)
    actor, ended = copy.deepcopy(module), threading.Event()

    def act():
        while not ended.is_set():
            actor.act(torch.zeros(4, 3))

    thread = threading.Thread(target=act)
    thread.start()
    try:
        torch.manual_seed(0)
        for step in range(20):
            module.run_updates(batches(20, step), 20 * step)
    finally:
        ended.set()
        thread.join()
    assert replays[0] > 300
    replays[0] = None
    torch.manual_seed(0)
    for step in range(20):
        actor.run_updates(batches(20, step), 20 * step)
    assert same(module, actor)


def test_what_changes_all_the_time_is_not_recorded_again_and_again(replays):
    module = TD3BC(3, 2, **HIDDEN)
    for step in range(20):
        module.alpha = 1.0 + step
        module.run_updates(batches(20, step), 20 * step)
    assert module._replay._given_up
    assert len(module._replay._recordings) == 0


class Warming(EDM):
    """Whose noise levels follow a count."""

    count = 0

    def training_sigmas(self, batch, generator=None, device=None):
        self.count += 1
        return super().training_sigmas(batch, generator, device) * min(1, self.count / 20)


class Skipping(ResidualMLP):
    """Which counts less at times."""

    count = 0

    def forward(self, x_t, noise_level, condition):
        self.count += 1
        x = super().forward(x_t, noise_level, condition)
        return 0.5 * x if self.count % 5 == 0 else x


@pytest.mark.parametrize("own", [{"preconditioning": Warming()}, {"network": partial(Skipping, width=8, depth=1)}])
def test_parts_of_ones_own_are_not_replayed(own, dataset, make_trainer, replays):
    data = TransitionDataModule(dataset, horizon=2, batch_size=8, segment_batch_size=8, updates_per_step=4)
    data.setup()
    module = DiffusionWorldModel(data.observation_size, data.action_size, horizon=2, **own)
    make_trainer(40).fit(module, datamodule=data)
    count = module.preconditioning.count if "preconditioning" in own else module.network.count
    assert count == 40
    assert replays[0] == 0


class Scheduled(TD3BC):
    """Whose alpha grows, which a recording would not see."""

    def actor_loss(self, batch):
        self.alpha = 2.5 + 0.1 * self.update_index
        return super().actor_loss(batch)


class Asking(TD3BC):
    """Whose control flow depends on numbers."""

    def critic_loss(self, batch):
        loss, metrics = super().critic_loss(batch)
        return (loss if float(loss.detach()) > 1 else 2 * loss), metrics


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Scheduled, "an update and its recording gave different numbers"),
        (Asking, "Python sees a number by `aten._local_scalar_dense.default`"),
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_what_cannot_be_replayed_runs_as_it_is(kind, reason, known, replays, monkeypatch):
    if known:
        monkeypatch.setattr(replay, "KNOWN", replay.KNOWN | {__name__})

    def trained():
        torch.manual_seed(0)
        module = kind(3, 2, **HIDDEN)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(4):
                module.run_updates(batches(6, step), 6 * step)
        return module, [str(warning.message) for warning in caught]

    module, said = trained()
    expected = f"the updates of {kind.__name__} cannot be recorded and replayed: {reason}; they run as they are"
    assert said == ([expected] if known else [])
    if not known:
        assert replays[0] == 0
    replays[0] = None
    assert same(module, trained()[0])


def test_operations_without_a_place_for_their_result_are_copied():
    a, b = torch.rand(3), torch.rand(3)
    function = torch.ops.aten._foreach_mul.List
    assert recording.out_variant(function) is None
    results = [torch.zeros(3)]
    step, arguments, options = recording.into(function, ([a], [b]), {}, results)
    step(*arguments, **options)
    assert torch.equal(results[0], a * b)


def test_an_ema_begins_again_with_what_is_loaded():
    network = torch.nn.Linear(2, 2)
    ema = EMA(network, 0.9)
    start = copy.deepcopy(ema.state_dict())
    ema.update_parameters(network)
    ema.load_state_dict(start)
    network.weight.data += 1
    ema.update_parameters(network)
    assert torch.equal(ema.module.weight, network.weight)
    network.weight.data += 1
    ema.update_parameters(network)
    torch.testing.assert_close(ema.module.weight, network.weight - 0.9)
    assert ema.n_averaged == 2
