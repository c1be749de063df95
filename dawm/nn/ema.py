"""EMA: the exponential moving average of a network's weights."""

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["EMA"]


class EMA(AveragedModel):
    """A copy of a network, in ``module``, that follows it: ``copy = decay copy + (1 - decay) network`` at each update.

    At the first update it becomes the network as it is. PyTorch's `AveragedModel` reads from a tensor each time whether
    it is the first, which a recorded update (`dawm.training.replay`) cannot.

    Args:
        network: The network.
        decay: Its weight, per update, in [0, 1].
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._follow = get_ema_multi_avg_fn(decay)
        super().__init__(network, multi_avg_fn=self._follow)
        self.requires_grad_(False)
        self.began = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.began = False  # as far as is known

    def update_parameters(self, model: nn.Module) -> None:
        """Follows the network, whose weights have changed."""
        if not self.began:
            self.began = True
            super().update_parameters(model)
            return
        self._follow(list(self.module.parameters()), list(model.parameters()), None)
        for own, other in zip(self.module.buffers(), model.buffers()):
            own.copy_(other)
        self.n_averaged += 1
