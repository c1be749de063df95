"""IQL, implicit Q-learning (Kostrikov et al. 2021, arXiv 2110.06169): never asks for the value of an unseen action.

Symbols: B batch, O observation size, A action size, ... nothing, or the seeds side by side; ``Q1, Q2`` the critics,
``V`` the value network, ``pi`` the actor, ``Q'`` the smaller of the two target critics.

    value:    V(s)       -> the expectile of Q'(s, a) over the data's actions                 (equation 5)
    critics:  Q_m(s, a)  -> r + gamma (1 - terminated) V(s')                                  (equation 6)
    actor:    maximise  exp(beta (Q'(s, a) - V(s))) log pi(a | s)                              (equation 7)
    targets:  soft update with tau at every update

The three losses are taken at the weights before the update. No weight has a gradient in two of them, so their sum is
minimised in one step.
"""

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from dawm.agents import losses
from dawm.agents.base import OfflineAgent
from dawm.data.transitions import Transitions
from dawm.errors import require

__all__ = ["IQL"]

LOG_STD_RANGE = (-20.0, 2.0)


class IQL(OfflineAgent):
    """Implicit Q-learning with a Gaussian policy whose standard deviation is the same at every observation.

    `OfflineAgent` explains the settings that every agent takes.

    Args:
        hidden: Widths of the hidden layers of actor, value network and each critic.
        learning_rate: Adam's learning rate, of all networks.
        decay_actor_learning_rate: Let the actor's learning rate fall to 0 along a cosine over the run's
            ``max_steps``; without a trainer or a ``max_steps`` it stays constant.
        discount: Gamma, per environment step, in [0, 1].
        tau: Polyak coefficient of the target critics per update, in (0, 1].
        expectile: Expectile of Q that V stands for, in (0, 1).
        beta: Inverse temperature of the actor's weights.
        max_weight: Largest weight of a row in the actor's loss.
        actor_on_real: Let the actor clone real rows alone. Synthetic rows then teach value network and critics.
        deterministic_actor: Regress on the actions by squared error instead of by a Gaussian's likelihood.
        actor_dropout: Fraction of the actor's hidden units dropped in training, in [0, 1).
        critic_layer_norm: Layer norm in the critics, as `TD3BC` has; off as in the paper.
    """

    update_period = 1

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        hidden: tuple[int, ...] = (256, 256),
        learning_rate: float = 3e-4,
        decay_actor_learning_rate: bool = True,
        discount: float = 0.99,
        tau: float = 0.005,
        expectile: float = 0.7,
        beta: float = 3.0,
        max_weight: float = 100.0,
        actor_on_real: bool = False,
        deterministic_actor: bool = False,
        actor_dropout: float = 0.0,
        critic_layer_norm: bool = False,
        seeds: int = 1,
        normalize_observations: bool = True,
        normalize_rewards: bool = True,
        reward_shift: float = 0.0,
    ) -> None:
        require("agent.hidden", hidden, min(hidden, default=1) >= 1, "numbers of at least 1")
        require("agent.discount", discount, 0 <= discount <= 1, "a number from 0 to 1")
        require("agent.tau", tau, 0 < tau <= 1, "above 0 and at most 1")
        require("agent.expectile", expectile, 0 < expectile < 1, "between 0 and 1")
        require("agent.actor_dropout", actor_dropout, 0 <= actor_dropout < 1, "at least 0 and below 1")
        super().__init__(observation_size, action_size, seeds, normalize_observations, normalize_rewards, reward_shift)
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.decay_actor_learning_rate = self.schedule_follows_max_steps = decay_actor_learning_rate
        self.discount, self.tau = discount, tau
        self.expectile, self.beta, self.max_weight = expectile, beta, max_weight
        self.deterministic_actor = deterministic_actor
        self.actor_on_real = self.needs_real_rows = actor_on_real
        self.actor = self.mlp(observation_size, hidden, action_size, dropout=actor_dropout)
        self.log_std = nn.Parameter(torch.zeros(*self.seed_shape, action_size), requires_grad=not deterministic_actor)
        self.value = self.mlp(observation_size, hidden, 1)
        self.critics = self.mlp(observation_size + action_size, hidden, 1, ensemble=2, layer_norm=critic_layer_norm)
        self.target_critics = self.target_network(self.critics)
        policy = [*self.actor.parameters(), *([] if deterministic_actor else [self.log_std])]
        values = [*self.value.parameters(), *self.critics.parameters()]
        self.optimizer = Adam([{"params": policy}, {"params": values}], lr=learning_rate, fused=True)

    def critic_loss(self, batch: Transitions) -> tuple[Tensor, dict[str, Tensor]]:
        """Both critics' squared TD error against one target, on prepared transitions."""
        with torch.no_grad():
            next_values = self.value(batch.next_observations).squeeze(-1)
            target = losses.td_target(batch.rewards, batch.terminations, next_values, self.discount, batch.steps)
        values = self.critics(torch.cat([batch.observations, batch.actions], dim=-1)).squeeze(-1)
        loss = losses.critic_loss(values, target)
        return loss, {"critic_loss": loss.detach(), "q": values.detach().mean()}

    def actor_loss(self, batch: Transitions, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cloning of the data's actions, the better ones weighing more, by ``Q'(s, a) - V(s)``, shape (..., B)."""
        means = self.actor(batch.observations).tanh()
        if self.deterministic_actor:
            errors = (means - batch.actions).square().sum(dim=-1)
        else:
            errors = -losses.gaussian_log_likelihood(batch.actions, means, self.log_std.clamp(*LOG_STD_RANGE))
        weights = losses.advantage_weights(advantages, self.beta, self.max_weight)
        loss = losses.masked(weights * errors, batch.real if self.actor_on_real else None).mean(dim=-1)
        return loss, {"actor_loss": loss.detach(), "actor_weight": weights.mean()}

    def total_loss(self, batch: Transitions) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the three, on prepared transitions."""
        with torch.no_grad():
            target_values = self.target_critics(torch.cat([batch.observations, batch.actions], dim=-1))
        advantages = target_values.squeeze(-1).amin(dim=-2) - self.value(batch.observations).squeeze(-1)
        value_loss = losses.expectile_loss(advantages, self.expectile)
        value_metrics = {"value_loss": value_loss.detach(), "advantage": advantages.detach().mean()}
        critic_loss, critic_metrics = self.critic_loss(batch)
        actor_loss, actor_metrics = self.actor_loss(batch, advantages)
        return value_loss + critic_loss + actor_loss, value_metrics | critic_metrics | actor_metrics

    def update(self, batch: Transitions) -> dict[str, Tensor]:
        """One update of value network, critics, actor and targets."""
        loss, metrics = self.total_loss(self.prepare(batch))
        self.minimize(loss, self.optimizer)
        self.soft_update(self.target_critics, self.critics, self.tau)
        return metrics

    def configure_optimizers(self) -> list[Optimizer]:
        """One optimiser: actor, then value network and critics."""
        return [self.optimizer]

    def learning_rates(self, index: int) -> list[float] | None:
        """Of the actor, and of value network and critics, where the actor's falls."""
        if not self.decay_actor_learning_rate:
            return None
        return [self.decayed(self.learning_rate, index), self.learning_rate]

    @torch.no_grad()
    def act(self, observations: Tensor, deterministic: bool = True) -> Tensor:
        """The mean, or a draw from the Gaussian, bounded to [-1, 1]; see `OfflineAgent.act`."""
        actions = self.actor(self.observation_normalizer(observations)).tanh()
        if not (deterministic or self.deterministic_actor):
            std = self.log_std.clamp(*LOG_STD_RANGE).exp().unsqueeze(-2)
            actions = (actions + std * torch.randn_like(actions)).clamp(-1, 1)
        return actions
