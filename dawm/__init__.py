"""DAWM: diffusion action world models for offline reinforcement learning, on PyTorch Lightning."""

from pathlib import Path

__version__ = "0.2.0"

# In a checkout (or wherever the checkout's dawm/ shadows an installed one) the sub-packages callbacks and
# lightning_configs lie one folder up, on the repository's top level; an installed wheel has them inside.
if not (Path(__file__).parent / "callbacks").is_dir():
    __path__.append(str(Path(__file__).parent.parent))
