"""Agents of one's own: the simplest, and one with a critic that learns by one-step TD.

From the folder that holds this file:

    python -m dawm fit --config ../lightning_configs/quickstart.yaml --agent own_agent.FilteredCloning
"""

import torch

from dawm.agents import OfflineAgent


class Cloning(OfflineAgent):
    def __init__(self, observation_size: int, action_size: int):
        super().__init__(observation_size, action_size)
        self.save_hyperparameters()
        self.actor = self.mlp(observation_size, (256, 256), action_size)
        self.optimizer = torch.optim.Adam(self.actor.parameters(), lr=3e-4)

    def configure_optimizers(self):
        return [self.optimizer]

    def act(self, observations, deterministic=True):
        return self.actor(self.observation_normalizer(observations)).tanh()

    def update(self, batch):
        batch = self.prepare(batch)  # normalised observations
        loss = (self.actor(batch.observations).tanh() - batch.actions).square().mean()
        self.minimize(loss, self.optimizer)
        return {"loss": loss.detach()}


class FilteredCloning(Cloning):
    """Clones the actions that its critic prefers to the policy's (CRR, arXiv 2006.15134)."""

    def __init__(self, observation_size: int, action_size: int, discount: float = 0.99):
        super().__init__(observation_size, action_size)
        self.save_hyperparameters()
        self.discount = discount
        self.critic = self.mlp(observation_size + action_size, (256, 256), 1)
        self.target = self.target_network(self.critic)
        self.optimizer = torch.optim.Adam([*self.actor.parameters(), *self.critic.parameters()], lr=3e-4)

    def q(self, critic, observations, actions):
        return critic(torch.cat([observations, actions], dim=-1)).squeeze(-1)

    def update(self, batch):
        batch = self.prepare(batch)
        s, a, next_s = batch.observations, batch.actions, batch.next_observations
        policy, q = self.actor(s).tanh(), self.q(self.critic, s, a)
        with torch.no_grad():
            next_q = self.q(self.target, next_s, self.actor(next_s).tanh())
            target = batch.rewards + self.discount * (1 - batch.terminations) * next_q
            better = q > self.q(self.critic, s, policy)
        critic_loss = (q - target).square().mean()
        cloning_loss = (better * (policy - a).square().mean(dim=-1)).mean()
        self.minimize(critic_loss + cloning_loss, self.optimizer)
        self.soft_update(self.target, self.critic, tau=0.005)
        return {"critic_loss": critic_loss.detach(), "cloning_loss": cloning_loss.detach()}
