"""InverseDynamics: the action that led from one observation to the next.

An ensemble of MLPs learns ``a_t = f(s_t, s_{t+1} - s_t)`` on the real transitions, both inputs normalised; the
normalised difference carries the information that ``s_{t+1}`` beside ``s_t`` would bury. The ensemble's mean fills in
the actions that the world model leaves out; its disagreement says how certain they are. The recipe of inferring actions
after a diffusion model is Decision Diffuser's (arXiv 2211.15657) and DAWM's (arXiv 2509.19538).

The network that infers is the one of the best validation so far, so that training too long does no harm.

Symbols: B batch, O observation size, A action size, M members.
"""

from copy import deepcopy
from typing import NamedTuple

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Adam, Optimizer

from dawm.data.batches import BatchLoader, FixedBatches
from dawm.data.module import TransitionDataModule
from dawm.data.transitions import Transitions
from dawm.errors import require
from dawm.nn.mlp import BatchedMLP
from dawm.nn.normalizer import Normalizer
from dawm.training.metrics import MeanPerColumn
from dawm.training.updates import UpdateModule

__all__ = ["InferredActions", "InverseDynamics"]


class InferredActions(NamedTuple):
    """Actions of an ensemble."""

    actions: Tensor  # mean over the members, in [-1, 1], shape (..., A)
    disagreement: Tensor  # largest standard deviation over the members of any action dimension, shape (...,)


class InverseDynamics(UpdateModule):
    """Ensemble of MLPs that infers actions from pairs of observations.

    Args:
        members: Networks in the ensemble M.
        hidden: Widths of the hidden layers.
        learning_rate: Adam's learning rate.
    """

    name = "inverse_dynamics"
    update_period = 1
    best_errors: Tensor

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        members: int = 3,
        hidden: tuple[int, ...] = (256, 256),
        learning_rate: float = 1e-3,
    ) -> None:
        require("inverse_dynamics.members", members, members >= 1, "at least 1")
        require("inverse_dynamics.hidden", hidden, min(hidden, default=1) >= 1, "numbers of at least 1")
        super().__init__()
        self.save_hyperparameters()
        self.observation_normalizer = Normalizer(observation_size)
        self.difference_normalizer = Normalizer(observation_size)
        self.network = BatchedMLP((members,), 2 * observation_size, hidden, action_size)
        self.optimizer = Adam(self.network.parameters(), lr=learning_rate, fused=True)
        self.best_network = deepcopy(self.network).requires_grad_(False)
        self.register_buffer("best_errors", torch.full((action_size,), torch.inf))
        self.validation_errors = MeanPerColumn(action_size)

    def configure_optimizers(self) -> list[Optimizer]:
        """The one optimiser."""
        return [self.optimizer]

    def fit_normalizers(self, data: TransitionDataModule) -> None:
        """Takes the normalizers' statistics from the training episodes."""
        transitions = data.episodes.transitions[data.episodes.observed_rows(data.training_episodes)]
        self.observation_normalizer.fit(transitions.observations)
        self.difference_normalizer.fit(transitions.next_observations - transitions.observations)

    def forget_best(self) -> None:
        """Forgets the best network so far: its error was on other data."""
        self.best_errors.fill_(torch.inf)

    def train_loader(self, data: TransitionDataModule, updates: int, rank: int) -> BatchLoader:
        """Real transitions of the training episodes."""
        return data.transition_loader(updates, rank)

    def validation_loader(self, data: TransitionDataModule, rank: int, world_size: int) -> FixedBatches:
        """Held-out transitions."""
        return data.validation_transition_loader(rank, world_size)

    def features(self, observations: Tensor, next_observations: Tensor) -> Tensor:
        """What the networks see, shape (B, 2 O), of ``s_t`` and ``s_{t+1}``, each of shape (B, O)."""
        differences = self.difference_normalizer(next_observations - observations)
        return torch.cat([self.observation_normalizer(observations), differences], dim=-1)

    def update(self, batch: Transitions) -> dict[str, Tensor]:
        """One step on the mean squared error of the action, the same batch for every member."""
        features = self.features(batch.observations, batch.next_observations)
        loss = (self.network(features) - batch.actions).square().mean()
        self.minimize(loss, self.optimizer)
        return {"loss": loss.detach()}

    @torch.no_grad()
    def infer(self, observations: Tensor, next_observations: Tensor) -> InferredActions:
        """The ensemble's action for each pair ``s_t`` and ``s_{t+1}``, each of shape (B, O)."""
        # trained without validation, there is no best one
        network = self.best_network if self.best_errors.isfinite().all() else self.network
        actions = network(self.features(observations, next_observations)).clamp(-1, 1)
        return InferredActions(actions.mean(dim=0), actions.std(dim=0, correction=0).amax(dim=-1))

    def validation_step(self, batch: Transitions, batch_idx: int) -> None:
        """Squared error of the ensemble's action on held-out transitions."""
        actions = self.network(self.features(batch.observations, batch.next_observations)).clamp(-1, 1).mean(dim=0)
        self.validation_errors.update((actions - batch.actions).square())

    def on_validation_epoch_end(self) -> None:
        """Keeps the network if it is the best so far; logs the error of each action dimension and their mean."""
        self.log("step", float(self.trainer.global_step))  # the x-axis, in updates
        errors = self.validation_errors.compute_and_reset()
        # a validation after fit comes too late: the checkpoint is written, and a module must equal its checkpoint;
        # Lightning's sanity check comes too early: the network has learnt nothing
        learning = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        if learning and errors.mean() < self.best_errors.mean():
            self.best_errors.copy_(errors)
            self.best_network.load_state_dict(self.network.state_dict())
        self.log("inverse_dynamics/validation_error", errors.mean(), prog_bar=True)
        self.log_dict({f"inverse_dynamics/validation_action_error/action_{d}": e for d, e in enumerate(errors)})
        self.log("inverse_dynamics/best_validation_error", self.best_errors.mean())
