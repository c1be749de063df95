"""The arithmetic of the agents, as pure functions of tensors.

Symbols: B batch, M critics, A action size, ... nothing, or the seeds trained side by side; ``s, a, r, s'`` a
transition, ``gamma`` the discount, ``Q(s, a)`` and ``V(s)`` the value of an action and of an observation, ``pi`` the
policy.

Values have the shape (..., B), those of several critics (..., M, B), actions (..., B, A); a loss has the shape (...),
one for each seed. Every function refuses shapes that differ: a column (B, 1) beside a row (B,) would silently become a
matrix.

Sources: TD3 (arXiv 1802.09477), TD3+BC (arXiv 2106.06860), IQL (arXiv 2110.06169).
"""

import math

import torch
from torch import Tensor

__all__ = [
    "advantage_weights", "behaviour_cloning_loss", "critic_loss", "expectile_loss", "gaussian_log_likelihood", "masked",
    "policy_improvement_weight", "smoothed_actions", "td_target",
]  # fmt: skip


def td_target(
    rewards: Tensor, terminations: Tensor, next_values: Tensor, discount: float, steps: Tensor | None = None
) -> Tensor:
    """Target ``r + gamma^steps (1 - terminated) V(s')``, shape (..., B), without gradient.

    ``terminations`` is 1 where the task ended at ``s'``; a truncated end bootstraps like any other step. ``steps``
    says how many of the environment's lie between ``s`` and ``s'``, whose discounted rewards ``r`` sums; None is one.
    """
    _require_equal_shapes(rewards=rewards, terminations=terminations, next_values=next_values)
    discounts: float | Tensor = discount
    if steps is not None:
        _require_equal_shapes(rewards=rewards, steps=steps)
        discounts = discount**steps
    return (rewards + discounts * (1 - terminations) * next_values).detach()


def critic_loss(values: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of ``Q_m(s, a)``, (..., M, B), from one target, (..., B), summed over the critics."""
    _require_equal_shapes(values_of_one_critic=values[..., 0, :], targets=targets)
    return (values - targets.unsqueeze(-2)).square().mean(dim=-1).sum(dim=-1)


def smoothed_actions(actions: Tensor, noise: Tensor, noise_clip: float) -> Tensor:
    """Target policy smoothing of TD3 (section 5.3): clipped noise is added, and the sum stays in [-1, 1]."""
    _require_equal_shapes(actions=actions, noise=noise)
    return (actions + noise.clamp(-noise_clip, noise_clip)).clamp(-1, 1)


def policy_improvement_weight(values: Tensor, alpha: float, mask: Tensor | None = None) -> Tensor:
    """Weight of TD3+BC's value term (equation 5), shape (...): ``alpha / mean |Q(s, pi(s))|``, without gradient.

    The mean is over the rows of a ``mask``, or over all.
    """
    # the bound only matters where every value is 0, as on the first update of a critic that starts at 0
    return alpha / masked(values.detach().abs(), mask).mean(dim=-1).clamp(min=1e-8)


def behaviour_cloning_loss(policy_actions: Tensor, actions: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared distance of ``pi(s)`` from the data's actions, over dimensions and the rows of a mask, or all."""
    _require_equal_shapes(policy_actions=policy_actions, actions=actions)
    return masked((policy_actions - actions).square(), mask).mean(dim=(-2, -1))


def expectile_loss(errors: Tensor, expectile: float) -> Tensor:
    """Asymmetric squared error of IQL (equation 5): ``mean |expectile - 1(u < 0)| u^2`` with ``u = Q(s, a) - V(s)``.

    The expectile is in (0, 1); 0.5 is half the mean squared error, and near 1 V tends to the largest Q of the data.
    """
    weights = torch.where(errors < 0, 1 - expectile, expectile)
    return (weights * errors.square()).mean(dim=-1)


def advantage_weights(advantages: Tensor, beta: float, max_weight: float) -> Tensor:
    """Weights of advantage-weighted regression in IQL (equation 7), shape (..., B), without gradient.

    They are ``exp(beta (Q(s, a) - V(s)))``, bounded; with the inverse temperature ``beta`` at 0 the data are cloned.
    """
    return (beta * advantages.detach()).exp().clamp(max=max_weight)


def gaussian_log_likelihood(actions: Tensor, means: Tensor, log_std: Tensor) -> Tensor:
    """Log density of independent Gaussians, summed over the action's dimensions, shape (..., B).

    ``log_std``, shape (..., A), holds the logarithms of the standard deviations, the same for every row.
    """
    _require_equal_shapes(actions=actions, means=means)
    _require_equal_shapes(action=actions[..., 0, :], log_std=log_std)
    log_std = log_std.unsqueeze(-2)
    squared = ((actions - means) * (-log_std).exp()).square()
    return (-0.5 * squared - log_std - 0.5 * math.log(2 * math.pi)).sum(dim=-1)


def masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """Values, shape (..., B) or (..., B, A), whose mean over all rows is that over the rows in the mask, (..., B).

    The mask is 1 for a row in it, else 0. None, or one with all rows in it, changes nothing; with no row all are 0.
    """
    if mask is None:
        return values
    by_row = values.dim() > mask.dim()
    _require_equal_shapes(values_of_a_dimension=values[..., 0] if by_row else values, mask=mask)
    weights = mask / mask.mean(dim=-1, keepdim=True).clamp(min=1e-9)  # a bound below one row of any batch
    return values * (weights.unsqueeze(-1) if by_row else weights)


def _require_equal_shapes(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {shapes}")
