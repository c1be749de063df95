"""World models that imagine actions too."""

from dataclasses import dataclass, replace

import torch
from small_world_model import SEGMENT, model, starts_of

from dawm.diffusion.codecs import JointDifferences
from dawm.diffusion.preconditioning import EDM
from dawm.inverse_dynamics import InverseDynamics
from dawm.synthesis.rollouts import Synthesizer

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
    made = synthesizer.imagine(*starts_of(TWO_STEPS))
    assert made.counts["kept"] == 2
    torch.testing.assert_close(made.observations, TWO_STEPS.observations)
    torch.testing.assert_close(made.actions, TWO_STEPS.actions)
    torch.testing.assert_close(made.rewards, TWO_STEPS.rewards)
    assert made.terminations.tolist() == [[0.0, 0.0]]
