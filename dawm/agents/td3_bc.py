"""TD3+BC (Fujimoto & Gu 2021, arXiv 2106.06860): TD3 whose actor also clones the data.

Symbols: B batch, O observation size, A action size, ... nothing, or the seeds trained side by side; ``Q1, Q2`` the
critics, ``pi`` the actor, ``'`` a target network.

    critics:  Q_m(s, a) -> r + gamma (1 - terminated) min_m Q'_m(s', pi'(s') + clipped noise)
    actor:    minimise  -lambda Q1(s, pi(s)) + (pi(s) - a)^2,   lambda = alpha / mean |Q1(s, pi(s))|
    targets:  soft update with tau at every update of the actor
"""

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from dawm.agents import losses
from dawm.agents.base import OfflineAgent
from dawm.data.transitions import Transitions
from dawm.errors import require

__all__ = ["TD3BC"]


class TD3BC(OfflineAgent):
    """TD3 with behaviour cloning; `OfflineAgent` explains the settings that every agent takes.

    Args:
        hidden: Widths of the hidden layers of the actor and of each critic.
        learning_rate: Adam's learning rate, of actor and critics.
        discount: Gamma, per environment step, in [0, 1].
        tau: Polyak coefficient of the targets per actor update, in (0, 1].
        alpha: Strength of the value term against behaviour cloning. Its weight ``lambda`` is taken over the rows of one
            batch, under DDP each process's own.
        clone_real_only: Clone the actions of real rows alone. Synthetic rows then teach the critics and, by the value
            term, the actor.
        scale_on_real: Take the value term's weight ``lambda`` over the real rows alone.
        policy_noise: Standard deviation of the noise on the target's actions, actions being in [-1, 1].
        noise_clip: Largest absolute noise on the target's actions.
        policy_every: Critic updates per update of the actor and the targets.
        critic_layer_norm: Layer norm in the critics, which holds back their overestimation of actions that the data
            lack (ReBRAC, arXiv 2305.09836); off as in the paper.
        decay_actor_learning_rate: Let the actor's learning rate fall to 0 along a cosine over the run's ``max_steps``,
            which settles the last policy; off as in the paper.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        hidden: tuple[int, ...] = (256, 256),
        learning_rate: float = 3e-4,
        discount: float = 0.99,
        tau: float = 0.005,
        alpha: float = 2.5,
        clone_real_only: bool = False,
        scale_on_real: bool = False,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        policy_every: int = 2,
        critic_layer_norm: bool = False,
        decay_actor_learning_rate: bool = False,
        seeds: int = 1,
        normalize_observations: bool = True,
    ) -> None:
        require("agent.hidden", hidden, min(hidden, default=1) >= 1, "numbers of at least 1")
        require("agent.discount", discount, 0 <= discount <= 1, "a number from 0 to 1")
        require("agent.tau", tau, 0 < tau <= 1, "above 0 and at most 1")
        require("agent.policy_every", policy_every, policy_every >= 1, "at least 1")
        super().__init__(observation_size, action_size, seeds, normalize_observations)
        self.save_hyperparameters()
        self.discount, self.tau, self.alpha = discount, tau, alpha
        self.clone_real_only, self.scale_on_real = clone_real_only, scale_on_real
        self.needs_real_rows = clone_real_only or scale_on_real
        self.policy_noise, self.noise_clip = policy_noise, noise_clip
        self.policy_every = self.update_period = policy_every
        self.learning_rate = learning_rate
        self.decay_actor_learning_rate = self.schedule_follows_max_steps = decay_actor_learning_rate
        self.actor = self.mlp(observation_size, hidden, action_size)
        self.critics = self.mlp(observation_size + action_size, hidden, 1, ensemble=2, layer_norm=critic_layer_norm)
        self.target_actor = self.target_network(self.actor)
        self.target_critics = self.target_network(self.critics)
        self.critic_optimizer = Adam(self.critics.parameters(), lr=learning_rate, fused=True)
        self.actor_optimizer = Adam(self.actor.parameters(), lr=learning_rate, fused=True)

    def critic_loss(self, batch: Transitions) -> tuple[Tensor, dict[str, Tensor]]:
        """Both critics' squared TD error against one target, on prepared transitions."""
        # target: the smaller of the two target critics at a noisy action of the target actor
        with torch.no_grad():
            noise = self.policy_noise * torch.randn_like(batch.actions)
            next_actions = self.target_actor(batch.next_observations).tanh()
            next_actions = losses.smoothed_actions(next_actions, noise, self.noise_clip)
            next_values = self.target_critics(torch.cat([batch.next_observations, next_actions], dim=-1))
            next_values = next_values.squeeze(-1).amin(dim=-2)
            target = losses.td_target(batch.rewards, batch.terminations, next_values, self.discount, batch.steps)
        values = self.critics(torch.cat([batch.observations, batch.actions], dim=-1)).squeeze(-1)
        loss = losses.critic_loss(values, target)
        return loss, {"critic_loss": loss.detach(), "q": values.detach().mean()}

    def actor_loss(self, batch: Transitions) -> tuple[Tensor, dict[str, Tensor]]:
        """The value of the actor's actions under the first critic, against their distance from the data's."""
        actions = self.actor(batch.observations).tanh()
        # of the first critic alone, whose weights are constants here
        values = self.critics.head(torch.cat([batch.observations, actions], dim=-1), 0).squeeze(-1)
        scaled, cloned = (batch.real if only else None for only in (self.scale_on_real, self.clone_real_only))
        value_loss = -losses.policy_improvement_weight(values, self.alpha, scaled) * values.mean(dim=-1)
        cloning_loss = losses.behaviour_cloning_loss(actions, batch.actions, cloned)
        loss = value_loss + cloning_loss
        return loss, {"actor_loss": loss.detach(), "cloning_loss": cloning_loss.detach()}

    def update(self, batch: Transitions) -> dict[str, Tensor]:
        """One update of the critics, and every ``policy_every`` times one of the actor and the targets."""
        batch = self.prepare(batch)
        loss, metrics = self.critic_loss(batch)
        self.minimize(loss, self.critic_optimizer)
        if (self.update_index + 1) % self.policy_every == 0:
            loss, actor_metrics = self.actor_loss(batch)
            self.minimize(loss, self.actor_optimizer)
            self.soft_update(self.target_critics, self.critics, self.tau)
            self.soft_update(self.target_actor, self.actor, self.tau)
            metrics |= actor_metrics
        return metrics

    def configure_optimizers(self) -> list[Optimizer]:
        """Critics, actor."""
        return [self.critic_optimizer, self.actor_optimizer]

    def learning_rates(self, index: int) -> list[float] | None:
        """Of critics and actor, where the actor's falls."""
        if not self.decay_actor_learning_rate:
            return None
        return [self.learning_rate, self.decayed(self.learning_rate, index)]

    @torch.no_grad()
    def act(self, observations: Tensor, deterministic: bool = True) -> Tensor:
        """The actor's actions; ``deterministic`` is without effect: this policy has no noise of its own."""
        return self.actor(self.observation_normalizer(observations)).tanh()
