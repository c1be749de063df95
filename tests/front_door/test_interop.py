"""Imagined data train in another library."""

import pytest
import torch
from rich.console import Console

from dawm.data.episodes import load_episodes, unscale_actions
from dawm.export import synthesize_dataset

minari_data = pytest.importorskip(
    "torchrl.data.datasets.minari_data", reason="TorchRL is not installed; pip install dawm[interop]"
)


def test_torchrl_learns_from_an_exported_data_set(hopper, finished_run, tmp_path):
    """TorchRL's own reader finds the transitions that ours does, and its TD3 loss takes a few steps on them."""
    from tensordict.nn import TensorDictModule as Module
    from torchrl.modules import MLP, ValueOperator
    from torchrl.objectives import DDPGLoss, SoftUpdate

    output = "imagined/interop-v0"
    synthesize_dataset(Console(quiet=True), finished_run, output, transitions=300, margin=10.0)
    replay = minari_data.MinariExperienceReplay(
        output, batch_size=64, root=tmp_path, download=False, load_from_local_minari=True
    )
    episodes = load_episodes(output)
    ours, theirs = episodes.transitions, replay[:]
    assert len(replay) == len(ours) == 300
    torch.testing.assert_close(theirs["observation"], ours.observations)
    torch.testing.assert_close(theirs["next", "observation"], ours.next_observations)
    torch.testing.assert_close(theirs["action"], unscale_actions(ours.actions, episodes.action_space))
    torch.testing.assert_close(theirs["next", "reward"].squeeze(-1), ours.rewards)
    assert torch.equal(theirs["next", "terminated"].squeeze(-1), ours.terminations.bool())
    ends = theirs["next", "done"].squeeze(-1).nonzero().squeeze(-1) + 1
    assert torch.equal(ends, episodes.ends)

    actor = Module(
        MLP(in_features=11, out_features=3, num_cells=[16], activate_last_layer=True), ["observation"], ["action"]
    )
    critic = ValueOperator(MLP(in_features=14, out_features=1, num_cells=[16]), in_keys=["observation", "action"])
    loss = DDPGLoss(actor, critic)
    target = SoftUpdate(loss, eps=0.99)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in loss.parameters()]
    for _ in range(5):
        values = loss(replay.sample())
        optimizer.zero_grad()
        (values["loss_actor"] + values["loss_value"]).backward()
        optimizer.step()
        target.step()
    assert torch.isfinite(values["loss_value"])
    assert any(not torch.equal(now, then) for now, then in zip(loss.parameters(), before))
