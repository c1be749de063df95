"""The forward models: what they learn from, what they predict, and where they disagree."""

import torch
from small_world_model import SEGMENT, accelerating, fit_normalizers, model
from torch.testing import assert_close

from dawm.data.transitions import Segments
from dawm.diffusion.codecs import Absolute


def test_prediction_and_disagreement_by_hand(monkeypatch):
    """In the data's units and in normalised ones; the same for every codec. Differences have mean .5, 0, std .5, 2."""
    world_model = model(codec=Absolute, forward_members=2)
    members = torch.tensor([[[0.0, 1.0, 1.0, 0.8]], [[2.0, 4.0, 2.0, 1.0]]])
    monkeypatch.setattr(world_model.forward_model, "forward", lambda *args: members)
    predicted = world_model.forward_model.predict(world_model.codec, torch.tensor([[10.0, 20.0]]), torch.zeros(1, 1))
    assert_close(predicted.next_observations, torch.tensor([[10 + 0.5 + 1 * 0.5, 20 + 2.5 * 2.0]]))
    assert_close(predicted.rewards, torch.tensor([3 + 1.5 * 2.0]))
    assert_close(predicted.terminations, torch.tensor([0.95]))
    assert_close(predicted.disagreement, torch.tensor([1.5]))


def test_every_recorded_step_is_learnt_from_and_no_absorbing_one(monkeypatch):
    """Of one segment with an absorbing row and one without; members draw steps of their own."""
    world_model, seen = model(forward_members=4), []

    def forward(codec, observations, actions):
        seen.append((observations, actions))
        return torch.zeros(4, 2, 4)

    monkeypatch.setattr(world_model.forward_model, "forward", forward)
    whole = torch.tensor([[[5.0, 5.0], [6.0, 7.0], [8.0, 9.0]]])
    batch = Segments(
        torch.cat([SEGMENT.observations, whole]), torch.tensor([[[0.7], [0.0]], [[0.1], [0.2]]]),
        torch.tensor([[5.0, 0.0], [3.0, 7.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]]),
        torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.zeros(2),
    )  # fmt: skip
    losses = torch.stack([world_model.forward_model.loss(world_model.codec, batch) for _ in range(30)])
    rows = [tuple(row) for o, a in seen for row in torch.cat([o, a], dim=-1).flatten(0, 1).tolist()]
    expected = {(0, 0, 0.7), (5, 5, 0.1), (6, 7, 0.2)}
    assert {tuple(round(value, 4) for value in row) for row in rows} == expected
    assert any(len(member_rows[:, 1].unique(dim=0)) == 2 for member_rows, _ in seen)
    # targets of the first segment: (1, 1, 1, 1); of the others: (1, 1, 0, -1) or (3, 1, 2, -1)
    assert {round(loss, 4) for loss in losses.flatten().tolist()} == {(4 + 3) / 8, (4 + 15) / 8}


def test_a_linear_system_is_predicted_and_disagreement_grows_away_from_the_data():
    data, world_model = accelerating(2000, 3), model(forward_members=3)
    fit_normalizers(world_model, data)
    forward_model, codec = world_model.forward_model, world_model.codec
    for _ in range(300):
        loss = forward_model.loss(codec, data[torch.randint(2000, (64,))])
        world_model.minimize(loss, forward_model.optimizer)
    held_out = accelerating(500, 1)
    start, action = held_out.observations[:, 0], held_out.actions[:, 0]
    predicted = forward_model.predict(codec, start, action)
    truth = held_out.observations[:, 1]
    assert (predicted.next_observations - truth).square().mean() < 0.01 * (truth - start).square().mean()
    assert (predicted.rewards - held_out.rewards[:, 0]).square().mean() < 0.01 * held_out.rewards.var()
    far = forward_model.predict(codec, start + 5.0, action)
    assert far.disagreement.mean() > 5 * predicted.disagreement.mean()
