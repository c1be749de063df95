"""TD3+BC and IQL as published single-file research code writes them: the yardstick of `agent_update`.

One module per network, one optimiser per network with PyTorch's default Adam, losses by ``backward``, target networks
moved tensor by tensor, a buffer of one tensor per field that draws one batch at a time, and each loss read back with
``.item()`` for the log. Nothing here is slow on purpose, and nothing is tuned.
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dawm.data.transitions import Transitions

DISCOUNT, TAU = 0.99, 0.005
Device = torch.device | str


def mlp(in_size: int, out_size: int, hidden: int = 256, tanh: bool = False, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in (in_size, hidden):
        layers += [nn.Linear(size, hidden), *([nn.LayerNorm(hidden)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, out_size), *([nn.Tanh()] if tanh else []))


def soft_update(target: nn.Module, source: nn.Module) -> None:
    for target_parameter, parameter in zip(target.parameters(), source.parameters()):
        target_parameter.data.copy_((1 - TAU) * target_parameter.data + TAU * parameter.data)


class PlainBuffer:
    """One tensor per field; a batch is five gathers by row numbers from numpy."""

    def __init__(self, transitions: Transitions, device: torch.device | str = "cpu") -> None:
        self.fields = [
            transitions.observations.contiguous().to(device),
            transitions.actions.contiguous().to(device),
            transitions.rewards.reshape(-1, 1).to(device),
            transitions.next_observations.contiguous().to(device),
            transitions.terminations.reshape(-1, 1).to(device),
        ]

    def sample(self, batch_size: int) -> list[Tensor]:
        rows = np.random.randint(0, len(self.fields[0]), size=batch_size)
        return [field[rows] for field in self.fields]


class PlainTD3BC:
    """TD3+BC (arXiv 2106.06860), one update per call."""

    def __init__(self, observation_size: int, action_size: int, device: Device = "cpu", norm: bool = False) -> None:
        self.actor = mlp(observation_size, action_size, tanh=True).to(device)
        self.critic_1 = mlp(observation_size + action_size, 1, norm=norm).to(device)
        self.critic_2 = mlp(observation_size + action_size, 1, norm=norm).to(device)
        self.actor_target = copy.deepcopy(self.actor)
        self.critic_1_target = copy.deepcopy(self.critic_1)
        self.critic_2_target = copy.deepcopy(self.critic_2)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=3e-4)
        self.critic_1_optimizer = torch.optim.Adam(self.critic_1.parameters(), lr=3e-4)
        self.critic_2_optimizer = torch.optim.Adam(self.critic_2.parameters(), lr=3e-4)
        self.updates = 0

    def train(self, batch: list[Tensor]) -> dict[str, float]:
        log = {}
        self.updates += 1
        observations, actions, rewards, next_observations, terminations = batch

        with torch.no_grad():
            noise = (torch.randn_like(actions) * 0.2).clamp(-0.5, 0.5)
            next_actions = (self.actor_target(next_observations) + noise).clamp(-1, 1)
            next_inputs = torch.cat([next_observations, next_actions], 1)
            next_q = torch.min(self.critic_1_target(next_inputs), self.critic_2_target(next_inputs))
            target = rewards + (1 - terminations) * DISCOUNT * next_q

        inputs = torch.cat([observations, actions], 1)
        critic_loss = functional.mse_loss(self.critic_1(inputs), target) + functional.mse_loss(
            self.critic_2(inputs), target
        )
        log["critic_loss"] = critic_loss.item()
        self.critic_1_optimizer.zero_grad()
        self.critic_2_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_1_optimizer.step()
        self.critic_2_optimizer.step()

        if self.updates % 2 == 0:
            policy = self.actor(observations)
            q = self.critic_1(torch.cat([observations, policy], 1))
            weight = 2.5 / q.abs().mean().detach()
            actor_loss = -weight * q.mean() + functional.mse_loss(policy, actions)
            log["actor_loss"] = actor_loss.item()
            self.actor_optimizer.zero_grad()
            actor_loss.backward()
            self.actor_optimizer.step()
            soft_update(self.critic_1_target, self.critic_1)
            soft_update(self.critic_2_target, self.critic_2)
            soft_update(self.actor_target, self.actor)
        return log


class PlainIQL:
    """IQL (arXiv 2110.06169), one update per call."""

    def __init__(self, observation_size: int, action_size: int, device: Device = "cpu", norm: bool = False) -> None:
        self.value = mlp(observation_size, 1).to(device)
        self.critic_1 = mlp(observation_size + action_size, 1, norm=norm).to(device)
        self.critic_2 = mlp(observation_size + action_size, 1, norm=norm).to(device)
        self.critic_1_target = copy.deepcopy(self.critic_1)
        self.critic_2_target = copy.deepcopy(self.critic_2)
        self.actor = mlp(observation_size, action_size, tanh=True).to(device)
        self.log_std = nn.Parameter(torch.zeros(action_size, device=device))
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), lr=3e-4)
        critic_parameters = [*self.critic_1.parameters(), *self.critic_2.parameters()]
        self.critic_optimizer = torch.optim.Adam(critic_parameters, lr=3e-4)
        self.actor_optimizer = torch.optim.Adam([*self.actor.parameters(), self.log_std], lr=3e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.actor_optimizer, 1_000_000)

    def train(self, batch: list[Tensor]) -> dict[str, float]:
        log = {}
        observations, actions, rewards, next_observations, terminations = batch
        inputs = torch.cat([observations, actions], 1)
        with torch.no_grad():
            next_value = self.value(next_observations)
            target_q = torch.min(self.critic_1_target(inputs), self.critic_2_target(inputs))

        advantage = target_q - self.value(observations)
        value_loss = (torch.abs(0.7 - (advantage < 0).float()) * advantage**2).mean()
        log["value_loss"] = value_loss.item()
        self.value_optimizer.zero_grad()
        value_loss.backward()
        self.value_optimizer.step()

        target = rewards + (1 - terminations) * DISCOUNT * next_value
        critic_loss = functional.mse_loss(self.critic_1(inputs), target) + functional.mse_loss(
            self.critic_2(inputs), target
        )
        log["critic_loss"] = critic_loss.item()
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()
        soft_update(self.critic_1_target, self.critic_1)
        soft_update(self.critic_2_target, self.critic_2)

        weight = (3.0 * advantage.detach()).exp().clamp(max=100.0)
        policy = torch.distributions.Normal(self.actor(observations), self.log_std.clamp(-20, 2).exp())
        actor_loss = (-weight.squeeze(-1) * policy.log_prob(actions).sum(-1)).mean()
        log["actor_loss"] = actor_loss.item()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()
        self.schedule.step()
        return log
