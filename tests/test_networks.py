"""Batched networks against loops of plain ones, and the contract of the denoisers."""

import itertools

import pytest
import torch
from torch import nn

from dawm.diffusion.denoisers import ResidualMLP, TemporalTransformer, TemporalUNet
from dawm.errors import UserError
from dawm.nn import mlp
from dawm.nn.mlp import BatchedMLP


def plain_copy(batched, member):
    """One network of a BatchedMLP as plain layers, with the activation between them."""
    layers = []
    for weight, bias, *norm in batched.layers(batched.weights[member].detach()):
        linear = nn.Linear(*weight.T.shape)
        linear.weight.data, linear.bias.data = weight.clone(), bias[:, 0].clone()
        layers.append(linear)
        if norm:
            layers.append(nn.LayerNorm(len(norm[0])))
            layers[-1].weight.data, layers[-1].bias.data = norm[0][:, 0].clone(), norm[1][:, 0].clone()
        layers.append(nn.ReLU())
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("members", [(), (1,), (3,), (3, 2)])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_batched_mlp_is_a_loop_of_plain_ones(members, layer_norm):
    torch.manual_seed(0)
    batched = BatchedMLP(members, 4, (8, 6), 3, layer_norm=layer_norm)
    nn.init.normal_(batched.weights)
    shared, own = torch.randn(5, 4), torch.randn(*members[:1], 5, 4)
    outputs, outputs_own = batched(shared), batched(own)
    assert outputs.shape == outputs_own.shape == (*members, 5, 3)
    for member in itertools.product(*map(range, members)):
        plain = plain_copy(batched, member)
        torch.testing.assert_close(outputs[member], plain(shared))
        torch.testing.assert_close(outputs_own[member], plain(own[member[:1]]))


@pytest.mark.parametrize("layer_norm", [False, True])
def test_all_networks_at_once_are_one_after_the_other(layer_norm, monkeypatch):
    """At once as on a GPU, by batched matmuls."""
    torch.manual_seed(0)
    network, inputs = BatchedMLP((3, 2), 4, (7, 6), 2, layer_norm=layer_norm).double(), torch.randn(3, 5, 4).double()

    def outputs_and_gradient(one_by_one):
        monkeypatch.setattr(mlp, "ONE_BY_ONE", one_by_one)
        outputs = network(inputs)
        return outputs.detach(), *torch.autograd.grad(outputs.square().sum(), network.weights)

    torch.testing.assert_close(outputs_and_gradient("cuda"), outputs_and_gradient("cpu"))


@pytest.mark.parametrize("layer_norm", [False, True])
def test_networks_run_in_half_precision_under_autocast(layer_norm):
    torch.manual_seed(0)
    network, inputs = BatchedMLP((2,), 4, (8,), 1, layer_norm=layer_norm), torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(inputs)
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.float(), network(inputs), atol=0.05, rtol=0.05)
    outputs.float().sum().backward()
    assert network.weights.grad.isfinite().all()


def test_a_head_is_one_network_of_each_seed():
    torch.manual_seed(0)
    critics, inputs = BatchedMLP((5, 2), 4, (8,), 1), torch.randn(5, 6, 4)
    torch.testing.assert_close(critics.head(inputs, 1), critics(inputs)[:, 1])
    assert not critics.head(inputs, 1).requires_grad
    critics.head(inputs, 1, detach=False).sum().backward()
    assert critics.weights.grad[:, 1].abs().sum() > 0
    assert critics.weights.grad[:, 0].abs().sum() == 0


def test_members_do_not_share_gradients_or_weights():
    torch.manual_seed(0)
    batched = BatchedMLP((2,), 4, (8,), 3)
    batched(torch.randn(5, 4))[0].sum().backward()
    assert not torch.equal(batched.weights[0], batched.weights[1])
    assert batched.weights.grad[0].abs().sum() > 0
    assert batched.weights.grad[1].abs().sum() == 0


def test_initialisation_is_that_of_torch_linear():
    torch.manual_seed(0)
    initial = BatchedMLP((3,), 400, (), 300)
    ((weights, bias),), reference = initial.layers(initial.weights), nn.Linear(400, 300)
    for weight in (*weights, reference.weight):  # uniform in +-1/sqrt(400)
        assert weight.abs().max().item() == pytest.approx(0.05, rel=1e-3)
        assert weight.std().item() == pytest.approx(0.05 / 3**0.5, rel=1e-2)
    assert bias.abs().max().item() == pytest.approx(0.05, rel=0.02)


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
    with pytest.raises(UserError, match="heads: got 3"):
        TemporalTransformer(4, 3, 4, width=16, heads=3)
    with pytest.raises(UserError, match="kernel_size: got 4"):
        TemporalUNet(4, 3, 4, kernel_size=4)
