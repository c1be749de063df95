"""Batched networks against loops of plain ones, and the contract of the denoisers."""

import copy
import itertools

import pytest
import torch
from torch import nn

from dawm.diffusion.denoisers import ResidualMLP, TemporalTransformer, TemporalUNet
from dawm.errors import UserError
from dawm.nn import mlp
from dawm.nn.mlp import BatchedMLP


def plain_copy(batched, member):
    """The member of a BatchedMLP as plain layers, with the activation between them."""
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


@pytest.mark.parametrize("hidden", [(), (7,), (6, 5)])
@pytest.mark.parametrize("constant_inputs", [False, True])
@pytest.mark.parametrize("constant_weights", [False, True])
@pytest.mark.parametrize("members", [(2,), (3, 2)])
@pytest.mark.parametrize("at_once", [False, True])  # as on a GPU
def test_gradients_written_by_hand_are_those_of_autograd(
    hidden, constant_inputs, constant_weights, members, at_once, monkeypatch
):
    if at_once:
        monkeypatch.setattr(mlp, "_parts", lambda networks: (networks,))
    torch.manual_seed(0)
    network = BatchedMLP(members, 3, hidden, 2).double()
    inputs = torch.randn(*members[:-1], 4, 3, dtype=torch.float64, requires_grad=not constant_inputs)
    wanted = [x for x, constant in ((inputs, constant_inputs), (network.weights, constant_weights)) if not constant]
    if not wanted:
        return

    def gradients():
        outputs = network.head(inputs, 1) if constant_weights else network(inputs)
        return torch.autograd.grad(outputs.square().sum(), wanted)

    by_hand = gradients()
    network.dropout = 1e-12  # drops nothing here, but takes the general way
    torch.testing.assert_close(by_hand, gradients())


def test_one_of_the_copies_answers_with_constant_weights():
    torch.manual_seed(0)
    critics, inputs = BatchedMLP((5, 2), 4, (8,), 1), torch.randn(5, 6, 4)
    torch.testing.assert_close(critics.head(inputs, 0), critics(inputs)[:, 0])
    assert not critics.head(inputs, 0).requires_grad


@pytest.mark.parametrize("change", ["optimiser", "load", "data", "copy"])
def test_a_network_answers_by_the_weights_it_has_now(change):
    torch.manual_seed(0)
    network, other, inputs = BatchedMLP((2,), 4, (8,), 1), BatchedMLP((2,), 4, (8,), 1), torch.randn(6, 4)
    before = network(inputs), network.head(inputs, 0)
    if change == "optimiser":
        network.weights.grad = network.weights.detach() - other.weights.detach()
        torch.optim.SGD(network.parameters(), lr=1.0).step()
    elif change == "load":
        network.load_state_dict(other.state_dict())
    elif change == "data":
        network.weights.data = other.weights.data.clone()
    else:
        network = copy.deepcopy(network)
        network.load_state_dict(other.state_dict())
    torch.testing.assert_close(network(inputs), other(inputs))
    torch.testing.assert_close(network.head(inputs, 0), other(inputs)[0])
    assert not torch.allclose(network(inputs), before[0])


def test_members_do_not_share_gradients_or_weights():
    torch.manual_seed(0)
    batched = BatchedMLP((2,), 4, (8,), 3)
    batched(torch.randn(5, 4))[0].sum().backward()
    assert not torch.equal(batched.weights[0], batched.weights[1])
    assert batched.weights.grad[0].abs().sum() > 0
    assert batched.weights.grad[1].abs().sum() == 0


def test_initialisation_is_that_of_torch_linear():
    torch.manual_seed(0)
    ((weights, bias),), reference = BatchedMLP((3,), 400, (), 300).layers(), nn.Linear(400, 300)
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
    # With one step there is nothing to attend to: queries and keys of the transformer rightly get no gradient.
    silent = [n for n, p in network.named_parameters() if not p.grad.abs().sum() > 0 and "in_proj" not in n]
    assert silent == []


@pytest.mark.parametrize("kind", DENOISERS)
def test_every_step_depends_on_every_input(kind):
    torch.manual_seed(0)
    network = kind(5, 3, 4, width=16)
    inputs = [torch.randn(2, 5, 3), torch.tensor([-0.2, 0.3]), torch.randn(2, 4)]
    answer = network(*inputs)
    for i in range(3):
        changed = list(inputs)
        changed[i] = inputs[i].clone()
        changed[i][0] += 0.5
        difference = (network(*changed) - answer).abs().amax(dim=-1)
        assert (difference[0] > 1e-5).all(), i  # all steps of the sample that was changed
        assert difference[1].max() == 0, i  # and no other sample


def test_wrong_sizes_are_named():
    with pytest.raises(UserError, match="--world_model.network.heads: got 3"):
        TemporalTransformer(4, 3, 4, width=16, heads=3)
    with pytest.raises(UserError, match="--world_model.network.kernel_size: got 4"):
        TemporalUNet(4, 3, 4, kernel_size=4)
