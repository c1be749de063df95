"""A compiled network is the same network; one that cannot be compiled runs as it is, and one line says so."""

import re

import pytest
import torch
from torch import nn

from dawm.data.transitions import Segments
from dawm.diffusion.denoisers import ResidualMLP
from dawm.training.compilation import compile_or_tell
from dawm.world_model import DiffusionWorldModel

INPUTS = torch.randn(4, 2, 3), torch.randn(4), torch.randn(4, 5)


def network() -> ResidualMLP:
    torch.manual_seed(0)
    return ResidualMLP(2, 3, 5, width=8, depth=1)


@pytest.fixture
def compiler(monkeypatch):
    """Puts another compiler in place of PyTorch's, which takes long."""
    return lambda compiled: monkeypatch.setattr(torch, "compile", lambda call, **options: compiled(call))


def test_a_compiled_network_answers_and_is_saved_as_before(compiler):
    calls = []

    def compiled(call):
        return lambda *inputs: calls.append(len(inputs)) or call(*inputs)

    compiler(compiled)
    plain, other = network(), network()
    compile_or_tell(other, *INPUTS)
    torch.testing.assert_close(other(*INPUTS), plain(*INPUTS))
    assert calls == [3, 3]
    assert other.state_dict().keys() == plain.state_dict().keys()
    assert all(parameter.grad is None for parameter in other.parameters())


@pytest.mark.parametrize("wanted", [False, True])
def test_the_world_model_compiles_its_denoiser_once_if_asked(compiler, wanted):
    compiled = []
    compiler(lambda call: compiled.append(call) or call)
    model = DiffusionWorldModel(2, 1, 2, network=lambda *sizes: ResidualMLP(*sizes, width=8), compile_network=wanted)
    segments = Segments(
        torch.randn(4, 3, 2),
        torch.randn(4, 2, 1),
        torch.randn(4, 2),
        torch.zeros(4, 2),
        torch.ones(4, 2),
        torch.zeros(4),
    )
    for _ in range(2):
        assert model.update(segments)["loss"].isfinite()
    assert len(compiled) == wanted


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no kernel for this gradient\nand much more")


@pytest.mark.parametrize("where", ["call", "gradient"])
def test_a_network_that_cannot_be_compiled_runs_as_it_is(compiler, where):
    def compiled(call):
        def fail(*inputs):
            if where == "call":
                raise RuntimeError("no C++ compiler\nand much more")
            return NoGradient.apply(call(*inputs))

        return fail

    compiler(compiled)
    plain, other = network(), network()
    reason = "no C++ compiler" if where == "call" else "no kernel for this gradient"
    line = f"compile: ResidualMLP cannot be compiled ({reason}); it runs as it is"
    with pytest.warns(UserWarning, match=f"^{re.escape(line)}$"):
        compile_or_tell(other, *INPUTS)
    loss = other(*INPUTS).square().sum()
    torch.testing.assert_close(loss, plain(*INPUTS).square().sum())
    loss.backward()


@pytest.mark.slow
def test_pytorchs_compiler_makes_the_same_network():
    plain, other = network(), network()
    compile_or_tell(other, *INPUTS)
    assert isinstance(other, nn.Module)
    assert other._compiled_call_impl is not None
    torch.testing.assert_close(other(*INPUTS), plain(*INPUTS))
