"""Compiling a network in place, or telling in one line why it runs as it is."""

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from dawm.errors import first_line

__all__ = ["compile_or_tell"]


def compile_or_tell(network: nn.Module, *inputs: Tensor) -> None:
    """Compiles a network by `torch.compile`, both ways; its weights and the keys of its state stay what they are.

    Args:
        network: The network, which answers with one tensor.
        inputs: What it will be called with, in the shapes to come.
    """
    network.compile()
    try:
        # a failure shows at the first use, and that of the gradient at the first gradient
        torch.autograd.grad(network(*inputs).sum(), list(network.parameters()))
    except Exception as error:  # whatever the compiler stumbles over
        network._compiled_call_impl = None  # how nn.Module tells a compiled network
        reason = first_line(error)
        rank_zero_warn(f"compile: {type(network).__name__} cannot be compiled ({reason}); it runs as it is")
