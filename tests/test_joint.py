"""World models that imagine actions too."""

from dataclasses import dataclass, replace

import pytest
import torch
from small_world_model import SEGMENT, model, starts_of

from dawm.callbacks import RegenerateRollouts
from dawm.data.transitions import Segments
from dawm.diffusion.codecs import JointDifferences, JointSegments
from dawm.diffusion.preconditioning import EDM
from dawm.diffusion.samplers import DPMSolverPP2M
from dawm.errors import UserError
from dawm.inverse_dynamics import InverseDynamics
from dawm.synthesis.rollouts import Synthesizer
from dawm.synthesis.starts import Starts
from dawm.synthesis.targets import ScaledReturn

TWO_STEPS = replace(
    SEGMENT,
    actions=torch.tensor([[[0.7], [-0.4]]]),
    terminations=torch.zeros(1, 2),
    valid=torch.ones(1, 2),
)


@dataclass(eq=False)
class Knowing(EDM):
    """An optimal denoiser of N equally likely points, shape (N, H, D): their mean by the posterior."""

    points: torch.Tensor | None = None

    def denoise(self, network, x_t, sigma, condition):
        squared = (x_t.unsqueeze(1) - self.points).square().sum(dim=(-2, -1))
        weights = torch.softmax(-squared / (2 * sigma.unsqueeze(1) ** 2), dim=1)
        return torch.einsum("bn,nhd->bhd", weights, self.points)


def knowing(codec, segments, **settings):
    """A world model whose denoiser knows the segments; its actions are normalised by mean 0.1 and deviation 0.5."""
    world_model = model(len(segments.rewards[0]), codec=codec, forward_members=0, **settings)
    action = {"mean": torch.tensor([0.1]), "std": torch.tensor([0.5])}
    world_model.codec.action_normalizer.load_state_dict(action)
    world_model.preconditioning = Knowing(points=world_model.codec.encode(segments))
    return world_model.eval()


def test_joint_encoding_by_hand():
    """Action (a - 0.1) / 0.5, then the differences, reward and end of `Differences`."""
    encoded = knowing(JointDifferences, TWO_STEPS).codec.encode(TWO_STEPS)
    torch.testing.assert_close(encoded, torch.tensor([[[1.2, 1.0, 1.0, 1.0, -1.0], [-1.0, -1.0, 0.0, -1.5, -1.0]]]))


def test_imagined_actions_are_clamped_and_begin_with_the_given_one():
    codec = knowing(JointDifferences, TWO_STEPS).codec
    x = codec.encode(TWO_STEPS)
    x[..., 0] = 4.0
    given = torch.tensor([[-0.2]])
    torch.testing.assert_close(
        codec.decode(TWO_STEPS.observations[:, 0], given, x).actions[0, :, 0], torch.tensor([-0.2, 1.0])
    )


def test_a_perfect_joint_model_gives_the_segment_back():
    """Its own actions, which the inverse dynamics, untrained, cannot know; and none of them is uncertain."""
    synthesizer = Synthesizer(knowing(JointDifferences, TWO_STEPS), InverseDynamics(2, 1).eval(), max_disagreement=0.0)
    made = synthesizer.judge(synthesizer.imagine(starts_of(TWO_STEPS)))
    assert made.counts["kept"] == 2
    torch.testing.assert_close(made.observations, TWO_STEPS.observations)
    torch.testing.assert_close(made.actions, TWO_STEPS.actions)
    torch.testing.assert_close(made.rewards, TWO_STEPS.rewards)
    assert made.terminations.tolist() == [[0.0, 0.0]]


def test_unconditional_transitions_are_those_of_the_data():
    """Half of them each of two recorded ones, wherever they are asked to start."""
    steps = [TWO_STEPS.observations[0, k : k + 2] for k in (0, 1)]
    two = Segments(
        torch.stack(steps), TWO_STEPS.actions[0].unsqueeze(1), TWO_STEPS.rewards.T, torch.tensor([[0.0], [1.0]]),
        torch.ones(2, 1), torch.zeros(2),
    )  # fmt: skip
    world_model = knowing(JointSegments, two, return_dropout=1.0, sampler=DPMSolverPP2M(20))
    elsewhere = torch.full((1000, 2), 9.0), torch.zeros(1000, 1), torch.zeros(1000)
    synthesizer = Synthesizer(world_model, InverseDynamics(2, 1).eval())
    futures = synthesizer.imagine(elsewhere, torch.Generator().manual_seed(0))
    rows = synthesizer.judge(futures).transitions().pack()
    second = rows[:, 2] < 0  # by its action
    assert 0.45 < second.float().mean() < 0.55
    torch.testing.assert_close(rows[~second], torch.tensor([[0.0, 0, 0.7, 5, 1, 2, 0]]).expand((~second).sum(), -1))
    torch.testing.assert_close(rows[second], torch.tensor([[1.0, 2, -0.4, 0, 1, 2, 1]]).expand(second.sum(), -1))


@pytest.mark.parametrize(
    ("codec", "settings"),
    [(JointSegments, {"first_action": "policy"}), (JointDifferences, {"max_disagreement": 0.1})],
)
def test_settings_without_effect_on_imagined_actions_are_refused(codec, settings):
    (name,) = settings
    with pytest.raises(UserError, match=f"--stages.agent.callbacks.RegenerateRollouts.{name}: got "):
        RegenerateRollouts(**settings).connect(model(codec=codec), InverseDynamics(2, 1))


def test_whole_segments_depend_on_the_return_alone():
    codec, (start, action, _) = model(codec=JointSegments).codec, starts_of(TWO_STEPS)
    condition = codec.condition(start, action, torch.tensor([20.0]), torch.ones(1))
    assert condition.tolist() == [[2.0, 1.0]]


class Recorded:
    """Data of one segment."""

    seed = 0

    def random_segments(self, count, seed):
        return TWO_STEPS[torch.zeros(count, dtype=torch.int64)]


@pytest.mark.parametrize("codec", [JointDifferences, JointSegments])
def test_partial_noising(codec):
    """Noised by half of the ten steps, it is denoised at their levels and under three times its return-to-go of 5."""
    world_model = knowing(codec, replace(TWO_STEPS, rewards=TWO_STEPS.rewards + 40), sampler=DPMSolverPP2M(10))
    asked = []
    denoise = world_model.preconditioning.denoise

    def watched(network, x_t, sigma, condition):
        asked.append((float(sigma[0]), condition[0, -2].item()))
        return denoise(network, x_t, sigma, condition)

    world_model.preconditioning.denoise = watched
    starts = Starts(ScaledReturn(3.0).fit(None, None))
    synthesizer = Synthesizer(world_model, InverseDynamics(2, 1).eval(), starts, noising=0.0)
    made = synthesizer.rollouts(Recorded(), 3, seed=0)
    assert asked == []
    torch.testing.assert_close(made.observations, TWO_STEPS.observations.expand(3, -1, -1))
    torch.testing.assert_close(made.actions, TWO_STEPS.actions.expand(3, -1, -1))
    torch.testing.assert_close(made.rewards, TWO_STEPS.rewards.expand(3, -1))
    replace(synthesizer, noising=0.01).rollouts(Recorded(), 3, seed=0)
    assert len(asked) == 1, "one step, not none"
    asked.clear()
    made = replace(synthesizer, noising=0.5).rollouts(Recorded(), 3, seed=0)
    levels = world_model.preconditioning.sampler_sigmas(10)[5:10].tolist()
    assert [sigma for sigma, _ in asked] == pytest.approx(levels)
    assert {returns for _, returns in asked} == {1.0}  # (3 * 5 - 10) / 5
    torch.testing.assert_close(made.rewards, TWO_STEPS.rewards.expand(3, -1) + 40)


def test_the_sampler_begins_at_the_noised_segment():
    x, noise = torch.full((1, 2, 1), 3.0), torch.ones(1, 2, 1)
    seen = []

    def denoise(x_t, sigma):
        seen.append(x_t)
        return x_t

    DPMSolverPP2M(1).sample(denoise, torch.tensor([0.5, 0.0]), noise, x=x)
    torch.testing.assert_close(seen[0], torch.full((1, 2, 1), 3.5))
