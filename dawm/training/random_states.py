"""The states of all random generators that training may draw from, as bytes that need no unpickling."""

import random

import numpy as np
import torch
from torch import Tensor

__all__ = ["random_states", "restore_random_states"]

WORDS = 624  # of a Mersenne Twister, as of NumPy's and Python's generators


def random_states(device: torch.device) -> Tensor:
    """States of the generators of NumPy, Python, PyTorch and, if that is the device, of a GPU; shape (n,), uint8."""
    _, keys, place, has_normal, normal = np.random.get_state()
    _, words, own_normal = random.getstate()
    numbers = np.array([*keys, place, has_normal, *words, own_normal is not None], np.int64)
    normals = np.array([normal, own_normal or 0.0])
    parts = [torch.from_numpy(part.view(np.uint8)) for part in (numbers, normals)]
    on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return torch.cat([*parts, torch.get_rng_state(), *on_gpu])


def restore_random_states(state: Tensor, device: torch.device) -> None:
    """Puts all of them where `random_states` found them."""
    sizes = 8 * (2 * WORDS + 4), 16, torch.get_rng_state().numel()
    numbers, normals, torch_state, on_gpu = state.split([*sizes, state.numel() - sum(sizes)])
    keys, (place, has_normal), words, (has_own,) = np.split(
        numbers.numpy().view(np.int64), [WORDS, WORDS + 2, 2 * WORDS + 3]
    )
    normal, own_normal = normals.numpy().view(np.float64).tolist()
    np.random.set_state(("MT19937", keys.astype(np.uint32), int(place), int(has_normal), normal))
    random.setstate((3, tuple(words.tolist()), own_normal if has_own else None))
    torch.set_rng_state(torch_state.clone())  # of a view it would read another part
    if len(on_gpu) and device.type == "cuda":
        torch.cuda.set_rng_state(on_gpu.clone(), device)
