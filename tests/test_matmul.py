"""Which library multiplies depends on the processor, and never costs precision."""

import pytest
import torch

from dawm.nn import matmul

AMD = {"cpu_name": "AMD EPYC", "avx512_f": True}


@pytest.fixture(autouse=True)
def _before():
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


def use(monkeypatch, capabilities, error=None):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    if error is not None:
        monkeypatch.setattr(matmul, "_single_precision", lambda: error < matmul.LARGEST_ERROR)
    return matmul.prefer_onednn(), torch.backends.mkldnn.matmul.fp32_precision


@pytest.mark.parametrize("capabilities", [{"cpu_name": "Intel Xeon", "avx512_f": True}, AMD | {"avx512_f": False}, {}])
def test_other_processors_keep_their_library(monkeypatch, capabilities):
    assert use(monkeypatch, capabilities) == (False, "none")


def test_an_older_pytorch_keeps_its_library(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not matmul.prefer_onednn()


def test_a_processor_that_would_round_keeps_its_library(monkeypatch):
    assert use(monkeypatch, AMD, error=1e-3) == (False, "none")
    assert use(monkeypatch, AMD, error=1e-6) == (True, "bf16")


def test_a_precision_set_before_stays(monkeypatch):
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    assert use(monkeypatch, AMD) == (False, "ieee")


def test_matmuls_have_single_precision():
    matmul.prefer_onednn()
    assert matmul._single_precision()


def test_half_precision_is_told_from_single(monkeypatch):
    original = torch.Tensor.__matmul__

    def rounded(a, b):
        return original(a.bfloat16(), b.bfloat16()) if a.dtype == torch.float32 else original(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not matmul._single_precision()
