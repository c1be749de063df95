"""Batched networks against loops of plain ones, and the contract of the denoisers."""

import pytest
import torch
from torch import nn

from dawm.errors import UserError
from dawm.networks import BatchedLinear, BatchedMLP, ResidualMLP, TemporalTransformer, TemporalUNet


def plain_copy(batched, member):
    """The member of a BatchedMLP as plain layers."""
    layers = []
    for i, layer in enumerate(batched.layers):
        _, in_size, out_size = layer.weight.shape
        linear = nn.Linear(in_size, out_size)
        linear.weight.data = layer.weight[member].detach().T.clone()
        linear.bias.data = layer.bias[member, 0].detach().clone()
        layers.append(linear)
        if i < len(batched.layers) - 1:
            if not isinstance(batched.norms[i], nn.Identity):
                norm = nn.LayerNorm(out_size)
                norm.weight.data = batched.norms[i].weight[member, 0].detach().clone()
                norm.bias.data = batched.norms[i].bias[member, 0].detach().clone()
                layers.append(norm)
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_batched_mlp_is_a_loop_of_plain_ones(members, layer_norm):
    torch.manual_seed(0)
    batched = BatchedMLP(members, 4, (8, 6), 3, layer_norm=layer_norm)
    for norm in batched.norms if layer_norm else []:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    shared, own = torch.randn(5, 4), torch.randn(members, 5, 4)
    plain = [plain_copy(batched, m) for m in range(members)]
    torch.testing.assert_close(batched(shared), torch.stack([mlp(shared) for mlp in plain]))
    torch.testing.assert_close(batched(own), torch.stack([mlp(x) for mlp, x in zip(plain, own)]))


def test_members_do_not_share_gradients_or_weights():
    torch.manual_seed(0)
    batched = BatchedMLP(2, 4, (8,), 3)
    batched(torch.randn(5, 4))[0].sum().backward()
    for parameter in batched.parameters():
        assert not torch.equal(parameter[0], parameter[1])
        assert parameter.grad[0].abs().sum() > 0
        assert parameter.grad[1].abs().sum() == 0


def test_initialisation_is_that_of_torch_linear():
    torch.manual_seed(0)
    layer, reference = BatchedLinear(3, 400, 300), nn.Linear(400, 300)
    for weight in (*layer.weight, reference.weight):  # uniform in +-1/sqrt(400)
        assert weight.abs().max().item() == pytest.approx(0.05, rel=1e-3)
        assert weight.std().item() == pytest.approx(0.05 / 3**0.5, rel=1e-2)
    assert layer.bias.abs().max().item() == pytest.approx(0.05, rel=0.02)


DENOISERS = [ResidualMLP, TemporalUNet, TemporalTransformer]


@pytest.mark.parametrize("horizon", [1, 2, 5, 7, 8])
@pytest.mark.parametrize("kind", DENOISERS)
def test_denoiser_answers_any_horizon_and_every_parameter_learns(kind, horizon):
    torch.manual_seed(0)
    network = kind(horizon, 3, 4, width=16)
    answer = network(torch.randn(6, horizon, 3), torch.randn(6), torch.randn(6, 4))
    assert answer.shape == (6, horizon, 3)
    (answer * torch.randn_like(answer)).sum().backward()
    dead = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert dead == []
    # With one row there is nothing to attend to: queries and keys of the transformer rightly get no gradient.
    silent = [n for n, p in network.named_parameters() if not p.grad.abs().sum() > 0 and "in_proj" not in n]
    assert silent == []


@pytest.mark.parametrize("kind", DENOISERS)
def test_every_row_depends_on_every_input(kind):
    torch.manual_seed(0)
    network = kind(5, 3, 4, width=16)
    inputs = [torch.randn(2, 5, 3), torch.tensor([-0.2, 0.3]), torch.randn(2, 4)]
    answer = network(*inputs)
    for i in range(3):
        changed = list(inputs)
        changed[i] = inputs[i].clone()
        changed[i][0] += 0.5
        difference = (network(*changed) - answer).abs().amax(dim=-1)
        assert (difference[0] > 1e-5).all(), i  # all rows of the sample that was changed
        assert difference[1].max() == 0, i  # and no other sample


def test_wrong_sizes_are_named():
    with pytest.raises(UserError, match="heads 3"):
        TemporalTransformer(4, 3, 4, width=16, heads=3)
    with pytest.raises(UserError, match="kernel_size 4"):
        TemporalUNet(4, 3, 4, kernel_size=4)
