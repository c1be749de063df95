"""Matmuls on a CPU: which of PyTorch's two libraries computes them.

PyTorch's builds for x86 come with Intel's MKL, which computes float32 matmuls on a CPU by default, and with oneDNN.
On AMD processors MKL does not use AVX-512 and takes twice the time or more.
"""

import torch

__all__ = ["prefer_onednn"]

LARGEST_ERROR = 1e-5  # relative; single precision errs by some 1e-6 on this matmul, bfloat16 by more than 1e-3


def prefer_onednn() -> bool:
    """Uses oneDNN for float32 matmuls on CPUs where MKL does not use AVX-512 (AMD); for the whole process.

    The choice depends on the processor alone, never on a measurement of time, so that a run that is resumed rounds as
    before. PyTorch's setting only permits oneDNN to round to bfloat16; a processor on which it does so keeps MKL. A
    precision that was set before stays. Returned is whether oneDNN computes them now.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None or not hasattr(torch.cpu, "get_capabilities"):  # a PyTorch that does not offer the choice
        return False
    processor = torch.cpu.get_capabilities()
    if not ("AMD" in str(processor.get("cpu_name")) and processor.get("avx512_f")):
        return False
    if matmul.fp32_precision == "none":
        matmul.fp32_precision = "bf16"
        if not _single_precision():
            matmul.fp32_precision = "none"
    return matmul.fp32_precision == "bf16"


def _single_precision() -> bool:
    """Whether a matmul of the size that agents need is as exact as single precision is."""
    a, b = torch.linspace(-1, 1, 256 * 256).reshape(256, 256), torch.linspace(-1, 2, 256 * 256).cos().reshape(256, 256)
    exact = a.double() @ b.double()
    return bool((a @ b - exact).abs().max() <= LARGEST_ERROR * exact.abs().max())
