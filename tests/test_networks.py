"""Batched networks against loops of plain ones, and the contract of the denoisers."""

import itertools

import pytest
import torch
from torch import nn

from dawm.diffusion.denoisers import ResidualMLP, TemporalTransformer, TemporalUNet
from dawm.errors import UserError
from dawm.nn import compiled, mlp
from dawm.nn.mlp import BatchedMLP


def plain_copy(batched, index):
    """One network of a BatchedMLP as plain layers, with the activation between them."""
    layers = []
    for weight, bias, *norm in batched.layers(batched.weights[index].detach()):
        linear = nn.Linear(*weight.T.shape)
        linear.weight.data, linear.bias.data = weight.clone(), bias[:, 0].clone()
        layers.append(linear)
        if norm:
            layers.append(nn.LayerNorm(len(norm[0])))
            layers[-1].weight.data, layers[-1].bias.data = norm[0][:, 0].clone(), norm[1][:, 0].clone()
        layers.append(nn.ReLU())
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("own_inputs", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("hidden", [(), (7,), (8, 6)])
@pytest.mark.parametrize("ensemble", [(), (1,), (3,), (3, 2)])
@pytest.mark.parametrize("one_by_one", ["cpu", "cuda"])  # else all at once by batched matmuls, as on a GPU
def test_batched_mlp_equals_plain_networks_in_value_and_gradient(
    ensemble, hidden, layer_norm, own_inputs, one_by_one, monkeypatch
):
    monkeypatch.setattr(mlp, "ONE_BY_ONE", one_by_one)
    torch.manual_seed(0)
    batched = BatchedMLP(ensemble, 4, hidden, 3, layer_norm=layer_norm).double()
    nn.init.normal_(batched.weights)
    inputs = torch.randn(*ensemble[: int(own_inputs)], 5, 4, dtype=torch.float64, requires_grad=True)
    outputs = batched(inputs)
    assert outputs.shape == (*ensemble, 5, 3)
    gradients = torch.autograd.grad(outputs.square().sum(), (batched.weights, inputs))

    input_gradient = torch.zeros_like(inputs)
    for index in itertools.product(*map(range, ensemble)):
        own = index[: inputs.dim() - 2]
        plain, plain_inputs = plain_copy(batched, index), inputs[own].detach().requires_grad_()
        plain_outputs = plain(plain_inputs)
        plain_outputs.square().sum().backward()
        torch.testing.assert_close(outputs[index], plain_outputs)
        weight_gradient = torch.cat([parameter.grad.flatten() for parameter in plain.parameters()])
        torch.testing.assert_close(gradients[0][index], weight_gradient)
        input_gradient[own] += plain_inputs.grad
    torch.testing.assert_close(gradients[1], input_gradient)


def test_a_head_is_one_network_of_the_innermost_dimension():
    torch.manual_seed(0)
    critics, inputs = BatchedMLP((5, 2), 4, (8,), 1), torch.randn(5, 6, 4, requires_grad=True)
    head, all_outputs = critics.head(inputs, 1), critics(inputs)[:, 1]
    torch.testing.assert_close(head, all_outputs)
    wanted = (inputs, critics.weights)
    gradients = torch.autograd.grad(head.square().sum(), wanted, allow_unused=True)
    expected = torch.autograd.grad(all_outputs.square().sum(), wanted)
    torch.testing.assert_close(gradients[0], expected[0])
    assert gradients[1] is None, "its weights are constants"


@pytest.mark.parametrize("ensemble", [(), (2,)])
def test_units_are_dropped_in_training_alone(ensemble):
    torch.manual_seed(0)
    network, inputs = BatchedMLP(ensemble, 4, (8,), 1, dropout=0.25), torch.randn(6, 4)
    assert not torch.equal(network(inputs), network(inputs))
    network.eval()
    assert torch.equal(network(inputs), network(inputs))


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


@pytest.fixture(params=compiled.usable_builds())
def each_build(request, monkeypatch):
    library = compiled.load(request.param)
    monkeypatch.setattr(compiled, "library", lambda: library)


@pytest.mark.skipif(not all(map(compiled._path, compiled.BUILDS)), reason="installed without a C compiler")
def test_the_best_build_that_the_processor_can_run_is_chosen(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "fma3": True})
    assert compiled.usable_builds() == ["_avx2"]
    assert not compiled.has_bf16()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(sum(compiled.BUILDS.values(), ()), True))
    assert compiled.usable_builds() == ["_avx512", "_avx2"]
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert compiled.usable_builds() == []


@pytest.mark.usefixtures("each_build")
def test_the_default_device_does_not_move_what_the_compiled_half_writes_to():
    network, residual = BatchedMLP((), 4, (64,), 2), ResidualMLP(2, 3, 4, width=32, depth=1)
    inputs = torch.randn(300, 4)
    x, c_noise, condition = torch.randn(300, 2, 3), torch.rand(300), torch.randn(300, 4)
    expected = network(inputs), residual(x, c_noise, condition)
    with torch.device("meta"):
        found = network(inputs), residual(x, c_noise, condition)
    assert all(map(torch.equal, found, expected))


@pytest.mark.usefixtures("each_build")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(
    ("batch", "sizes"), [(256, (14, 256, 256, 1)), (37, (50, 33, 70, 9)), (1, (3, 4)), (5, (2, 16, 3))]
)
def test_compiled_networks_agree_with_autograd_in_double_precision(batch, sizes, layer_norm, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    network = BatchedMLP((3, 2), sizes[0], sizes[1:-1], sizes[-1], layer_norm=layer_norm)
    nn.init.normal_(network.weights, std=0.3)
    x, toward = torch.randn(3, batch, sizes[0], requires_grad=True), torch.randn(3, 2, batch, sizes[-1])
    assert compiled.applies(x, network.weights)
    found = [network(x), *torch.autograd.grad((network(x) * toward).sum(), (network.weights, x))]
    with torch.no_grad():
        assert torch.equal(network(x), found[0]), "with no gradient to come"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3 - threads)
    again = [network(x), *torch.autograd.grad((network(x) * toward).sum(), (network.weights, x))]
    assert all(torch.equal(one, other) for one, other in zip(found, again)), "whatever the number of threads"
    exact, x = network.double(), x.detach().double().requires_grad_()
    expected = [exact(x), *torch.autograd.grad((exact(x) * toward.double()).sum(), (exact.weights, x))]
    for one, other in zip(found, expected):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-6 * other.abs().max().item())


@pytest.mark.usefixtures("each_build")
def test_compiled_networks_pass_nan_on_and_have_second_derivatives():
    torch.manual_seed(0)
    network, x = BatchedMLP((), 4, (8, 8), 1, layer_norm=True), torch.randn(5, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    penalty = torch.autograd.grad(slope.square().sum(), network.weights)[0]
    (slope,) = torch.autograd.grad(network.double()(x.double()).sum(), x, create_graph=True)
    torch.testing.assert_close(
        penalty.double(), torch.autograd.grad(slope.square().sum(), network.weights)[0], rtol=1e-4, atol=1e-6
    )
    for layer_norm in (False, True):
        network = BatchedMLP((), 4, (8, 8), 1, layer_norm=layer_norm)
        outputs = network(torch.tensor([[0.0, 0, 0, torch.nan], [1, 2, 3, 4]]))
        assert outputs.isnan().flatten().tolist() == [True, False]
        outputs.sum().backward()
        assert network.weights.grad.isnan().any()


@pytest.mark.skipif(not compiled.has_bf16(), reason="this processor lacks AVX512_BF16")
@pytest.mark.parametrize(("batch", "ins", "outs"), [(256, 14, 256), (37, 51, 19), (9, 1, 33)])
def test_bf16_rounds_the_factors_of_matmuls_and_nothing_else(batch, ins, outs):
    def rounded(values):
        return values.detach().bfloat16().double()

    torch.manual_seed(0)
    network, x = BatchedMLP((), ins, (), outs), torch.randn(batch, ins, requires_grad=True)
    toward = torch.randn(batch, outs)
    with compiled.rounding(True):
        outputs = network(x)
    gradients = torch.autograd.grad(outputs, (network.weights, x), toward)
    ((weight, bias),) = network.layers(network.weights.detach())
    expected = rounded(x) @ rounded(weight).T + bias[:, 0].double()
    of_weight, of_bias = rounded(toward).T @ rounded(x), toward.double().sum(0)
    of_weights = torch.cat([of_weight.flatten(), of_bias])
    for one, other in zip((outputs, *gradients), (expected, of_weights, rounded(toward) @ rounded(weight))):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


@pytest.mark.usefixtures("each_build")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("batch", "sizes", "width", "depth"), [(130, (8, 13, 15), 256, 2), (70, (3, 5, 2), 33, 3)])
def test_the_compiled_residual_mlp_agrees_with_autograd_in_double_precision(
    batch, sizes, width, depth, threads, monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    network, toward = ResidualMLP(*sizes, width=width, depth=depth), torch.randn(batch, *sizes[:2])
    for parameter in network.parameters():  # norms of their own scale and shift
        nn.init.normal_(parameter, 0.1, parameter.shape[-1] ** -0.5)
    inputs = [torch.randn(batch, *sizes[:2]), torch.randn(batch), torch.randn(batch, sizes[2])]

    def answer_and_gradients(values, toward):
        answer = network(*values)
        return [answer, *torch.autograd.grad(answer, list(network.parameters()), toward)]

    found = answer_and_gradients(inputs, toward)
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "library", lambda: None)
        plain = answer_and_gradients(inputs, toward)
    network, inputs = network.double(), [values.double() for values in inputs]
    for one, other, exact in zip(found, plain, answer_and_gradients(inputs, toward.double())):
        worst = max((other - exact).abs().max().item(), 1e-6 * exact.abs().max().item())
        assert (one - exact).abs().max().item() < 3 * worst
    inputs[0].requires_grad_()
    (slope,) = torch.autograd.grad(network(*inputs).sum(), inputs[0])  # PyTorch's own way
    assert slope.abs().sum() > 0


def test_members_do_not_share_gradients_or_weights():
    torch.manual_seed(0)
    batched = BatchedMLP((2,), 4, (8,), 3)
    batched(torch.randn(5, 4))[0].sum().backward()
    assert not torch.equal(batched.weights[0], batched.weights[1])
    assert batched.weights.grad[0].abs().sum() > 0
    assert batched.weights.grad[1].abs().sum() == 0


def test_initialisation_is_that_of_torch_linear():
    torch.manual_seed(0)
    network, reference = BatchedMLP((3,), 400, (), 300), nn.Linear(400, 300)
    ((weights, bias),) = network.layers(network.weights)
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
