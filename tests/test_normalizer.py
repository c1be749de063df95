import torch

from dawm.nn.normalizer import Normalizer


def fitted(values):
    normalizer = Normalizer(values.shape[1])
    normalizer.fit(values)
    return normalizer


def test_standardises_and_inverts():
    values = torch.tensor([[1.0, -30.0], [3.0, 10.0], [5.0, 20.0]])
    normalizer = fitted(values)
    torch.testing.assert_close(normalizer.mean, torch.tensor([3.0, 0.0]))
    torch.testing.assert_close(normalizer.std, torch.tensor([8 / 3, 1400 / 3]).sqrt())
    torch.testing.assert_close(normalizer(values).square().mean(0), torch.ones(2))
    torch.testing.assert_close(normalizer.inverse(normalizer(values)), values)


def test_a_constant_dimension_is_only_shifted():
    """Rounding of the last digit is no variation either: divided by it, a new value would be blown up."""
    rounded = torch.full((1000,), 0.1)
    rounded[::2] = torch.nextafter(rounded[::2], torch.ones(500))
    normalizer = fitted(torch.stack([rounded, torch.zeros(1000), torch.full((1000,), 1e4)], dim=1))
    assert normalizer.std.tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(normalizer(torch.tensor([0.1, 0.0, 1e4 + 2])), torch.tensor([0.0, 0.0, 2.0]))


def test_a_small_variation_is_not_taken_for_a_constant():
    values = torch.tensor([[1e-4], [-1e-4]])
    torch.testing.assert_close(fitted(values)(values), torch.tensor([[1.0], [-1.0]]))


def test_statistics_travel_with_the_state_dict():
    values = torch.randn(50, 3) * 5 + 2
    other = Normalizer(3)
    other.load_state_dict(fitted(values).state_dict())
    assert torch.equal(other(values), fitted(values)(values))
