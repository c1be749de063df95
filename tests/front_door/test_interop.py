"""Imagined data train in another library."""

import minari
import pytest
import torch
from rich.console import Console

from dawm.cli.synthesize import synthesize_dataset
from dawm.data.episodes import load_episodes
from dawm.data.sources.spaces import unscale_actions

torchrl_data = pytest.importorskip("torchrl.data", reason="TorchRL is not installed: pip install dawm[interop]")


def test_torchrl_learns_from_an_exported_data_set(hopper, finished_run):
    """A replay buffer filled through Minari has the transitions that ours has; TorchRL's loss takes steps on them."""
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.modules import MLP, ValueOperator
    from torchrl.objectives import DDPGLoss, SoftUpdate

    output = "imagined/interop-v0"
    synthesize_dataset(Console(quiet=True), finished_run, output, transitions=300, margin=10.0)
    storage = torchrl_data.LazyTensorStorage(300)
    replay = torchrl_data.TensorDictReplayBuffer(storage=storage, batch_size=64)
    for episode in minari.load_dataset(output).iterate_episodes():
        observations = torch.from_numpy(episode.observations)
        ends = {
            "terminated": torch.from_numpy(episode.terminations).unsqueeze(-1),
            "truncated": torch.from_numpy(episode.truncations).unsqueeze(-1),
        }
        after = {
            "observation": observations[1:],
            "reward": torch.from_numpy(episode.rewards).unsqueeze(-1),
            "done": ends["terminated"] | ends["truncated"],
            **ends,
        }
        steps = {"observation": observations[:-1], "action": torch.from_numpy(episode.actions), "next": after}
        replay.extend(TensorDict(steps, batch_size=[len(episode)]))

    episodes, theirs = load_episodes(output), replay[:]
    ours = episodes.transitions
    assert len(replay) == len(ours) == 300
    torch.testing.assert_close(theirs["observation"], ours.observations)
    torch.testing.assert_close(theirs["next", "observation"], ours.next_observations)
    torch.testing.assert_close(theirs["action"], unscale_actions(ours.actions, episodes.action_space))
    torch.testing.assert_close(theirs["next", "reward"].squeeze(-1), ours.rewards)
    assert torch.equal(theirs["next", "terminated"].squeeze(-1), ours.terminations.bool())
    assert torch.equal(theirs["next", "done"].squeeze(-1).nonzero().squeeze(-1) + 1, episodes.ends)

    actor = TensorDictModule(MLP(in_features=11, out_features=3, num_cells=[16]), ["observation"], ["action"])
    critic = ValueOperator(MLP(in_features=14, out_features=1, num_cells=[16]), in_keys=["observation", "action"])
    loss = DDPGLoss(actor, critic)
    targets, optimizer = SoftUpdate(loss, eps=0.99), torch.optim.Adam(loss.parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in loss.parameters()]
    for _ in range(5):
        values = loss(replay.sample())
        optimizer.zero_grad()
        (values["loss_actor"] + values["loss_value"]).backward()
        optimizer.step()
        targets.step()
    assert torch.isfinite(values["loss_value"])
    assert any(not torch.equal(now, then) for now, then in zip(loss.parameters(), before))
