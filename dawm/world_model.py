"""DiffusionWorldModel: imagines observations and rewards, no actions.

Learns ``p(s_{t+1} .. s_{t+H}, r_t .. r_{t+H-1}, end | s_t, a_t, g_t)`` as DWM (arXiv 2402.03570) and DAWM
(arXiv 2509.19538) do, with a termination channel beside them. One sample is H rows; row k holds

* the normalised difference ``s_{t+k+1} - s_{t+k}`` (or, as an option, the normalised observation ``s_{t+k+1}``),
* the normalised reward ``r_{t+k}``,
* the termination: +1 if the task has ended at or before ``s_{t+k+1}``, else -1.

The condition is the normalised ``s_t``, the action ``a_t`` in [-1, 1], the normalised return-to-go ``g_t`` and a flag
that is 0 where the return was dropped, so that one network is both the conditional and the unconditional model of
classifier-free guidance (arXiv 2207.12598).

Symbols: B batch, H horizon, O observation size, A action size, R = O + 2 row size.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dawm.data.transitions import Segments, Transitions
from dawm.diffusion.denoisers import Denoiser, ResidualMLP
from dawm.diffusion.preconditioning import EDM, Preconditioning, denoising_loss, guided
from dawm.diffusion.samplers import DPMSolverPP2M, Sampler
from dawm.errors import UserError, require
from dawm.nn.mlp import BatchedMLP
from dawm.nn.normalizer import Normalizer
from dawm.training.compilation import compile_or_tell
from dawm.training.metrics import HorizonErrors
from dawm.training.updates import UpdateModule

__all__ = ["DiffusionWorldModel", "Imagined"]


class Imagined(NamedTuple):
    """Imagined futures.

    Args:
        observations: ``s_t`` (as given) and ``s_{t+1} .. s_{t+H}``, shape (B, H + 1, O).
        rewards: ``r_t .. r_{t+H-1}``, shape (B, H).
        terminations: How far the task is believed to have ended at each step, around 0 or 1, shape (B, H).
    """

    observations: Tensor
    rewards: Tensor
    terminations: Tensor


class DiffusionWorldModel(UpdateModule):
    """Conditional diffusion over H rows of (difference, reward, termination).

    Args:
        observation_size: O.
        action_size: A.
        horizon: Steps imagined H, in environment steps.
        network: Class of the denoiser network; called with (horizon, row_size, condition_size).
        preconditioning: Noise levels and how the network is wrapped.
        sampler: How noise becomes rows.
        return_dropout: Share of the training batch whose return-to-go is hidden, in [0, 1].
        predict_differences: Rows hold differences to the observation before; False for absolute observations.
        inpaint_start: Put ``s_t`` as a known row before the imagined ones, as DWM does; it stays in the condition too.
        first_step_weight: Weight of the first imagined step's error against each later one's: the step that every
            rollout has and that all later ones add to.
        learning_rate: Adam's highest learning rate.
        warmup_steps: Updates over which the learning rate rises from 0; it then falls to 0 along a cosine.
        max_gradient_norm: Longer gradients are shortened to this norm; None leaves them.
        ema_decay: Decay of the averaged weights, which are what is sampled, per update.
        compile_network: Compile the denoiser for training by `torch.compile`; where that fails, one line says so.
        regression_baseline: Train a one-step regression MLP on the same batches, to have its error beside the model's.
    """

    name = "world_model"
    step_weights: Tensor

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        horizon: int = 8,
        network: Callable[[int, int, int], Denoiser] = ResidualMLP,
        preconditioning: Preconditioning | None = None,
        sampler: Sampler | None = None,
        return_dropout: float = 0.25,
        predict_differences: bool = True,
        inpaint_start: bool = False,
        first_step_weight: float = 3.0,
        learning_rate: float = 4e-3,
        warmup_steps: int = 200,
        max_gradient_norm: float | None = 1.0,
        ema_decay: float = 0.9967,
        compile_network: bool = False,
        regression_baseline: bool = True,
    ) -> None:
        require("DiffusionWorldModel.horizon", horizon, horizon >= 1, "at least 1")
        require("DiffusionWorldModel.return_dropout", return_dropout, 0 <= return_dropout <= 1, "from 0 to 1")
        require("DiffusionWorldModel.ema_decay", ema_decay, 0 <= ema_decay <= 1, "from 0 to 1")
        super().__init__()
        self.save_hyperparameters()
        self.horizon = horizon
        self.preconditioning = EDM() if preconditioning is None else preconditioning
        self.sampler = DPMSolverPP2M() if sampler is None else sampler
        self.preconditioning.sampling_sigmas(self.sampler.num_steps)  # says before training if the two do not suit
        self.return_dropout = return_dropout
        self.predict_differences = predict_differences
        self.inpaint_start = inpaint_start
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.max_gradient_norm = max_gradient_norm
        self.to_be_compiled = compile_network

        self.observation_normalizer = Normalizer(observation_size)
        self.difference_normalizer = Normalizer(observation_size)
        self.reward_normalizer = Normalizer(1)
        self.return_normalizer = Normalizer(1)

        row_size, condition_size = observation_size + 2, observation_size + action_size + 2
        self.network = network(horizon + int(inpaint_start), row_size, condition_size)
        weights = torch.ones(horizon)
        weights[0] = first_step_weight
        weights /= weights.mean()
        if inpaint_start:  # the known row is given, not learnt
            weights = torch.cat([weights.new_zeros(1), weights])
        self.register_buffer("step_weights", weights.view(1, -1, 1), persistent=False)
        self.ema = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        self.ema.requires_grad_(False)
        self.optimizer = Adam(self.network.parameters(), lr=learning_rate, fused=True)

        self.regression: BatchedMLP | None = None
        if regression_baseline:
            self.regression = BatchedMLP((), observation_size + action_size, (256, 256), row_size)
            self.regression_optimizer = Adam(self.regression.parameters(), lr=learning_rate, fused=True)
        self.validation_errors, self.regression_errors = HorizonErrors(horizon), HorizonErrors(horizon)

    def fit_normalizers(self, transitions: Transitions, returns_to_go: Tensor) -> None:
        """Takes the normalisers' statistics from real transitions.

        Args:
            transitions: Real transitions, fields of shape (N, ...).
            returns_to_go: Their returns-to-go, shape (N,).
        """
        self.observation_normalizer.fit(transitions.observations)
        self.difference_normalizer.fit(transitions.next_observations - transitions.observations)
        self.reward_normalizer.fit(transitions.rewards.unsqueeze(-1))
        self.return_normalizer.fit(returns_to_go.unsqueeze(-1))

    # Rows and condition

    def rows(self, segments: Segments) -> Tensor:
        """What the model learns to generate, shape (B, H, R), or (B, H + 1, R) with ``inpaint_start``.

        Args:
            segments: Segments, fields of shape (B, H, ...).
        """
        before, after = segments.observations[:, :-1], segments.observations[:, 1:]
        if self.predict_differences:
            observations = self.difference_normalizer(after - before)
        else:
            observations = self.observation_normalizer(after)
        rewards = self.reward_normalizer(segments.rewards.unsqueeze(-1))
        rows = torch.cat([observations, rewards, 2 * segments.terminations.unsqueeze(-1) - 1], dim=-1)
        return torch.cat([self.start_row(before[:, 0]), rows], dim=1) if self.inpaint_start else rows

    def start_row(self, observations: Tensor) -> Tensor:
        """The known row of ``s_t``, with no reward and no termination, shape (B, 1, R).

        Args:
            observations: ``s_t``, shape (B, O).
        """
        reward, termination = observations.new_zeros(len(observations), 1), -observations.new_ones(len(observations), 1)
        return torch.cat([self.observation_normalizer(observations), reward, termination], dim=-1).unsqueeze(1)

    def known_entries(self) -> Tensor:
        """True at the entries that ``inpaint_start`` knows, shape (1, H + 1, R)."""
        mask = torch.zeros(1, self.network.horizon, self.network.row_size, dtype=torch.bool, device=self.device)
        mask[:, 0] = True
        return mask

    def condition(self, observations: Tensor, actions: Tensor, returns_to_go: Tensor, keep: Tensor) -> Tensor:
        """What a future depends on, shape (B, O + A + 2).

        Args:
            observations: ``s_t``, shape (B, O).
            actions: ``a_t`` in [-1, 1], shape (B, A).
            returns_to_go: ``g_t``, shape (B,).
            keep: 0 where the return is hidden, else 1, shape (B,).
        """
        keep = keep.unsqueeze(-1)
        returns = self.return_normalizer(returns_to_go.unsqueeze(-1)) * keep
        return torch.cat([self.observation_normalizer(observations), actions, returns, keep], dim=-1)

    # Training

    def update(self, batch: Segments) -> dict[str, Tensor]:
        """One step on the denoising loss, and one of the regression baseline.

        Args:
            batch: Segments, fields of shape (B, H, ...).
        """
        rows = self.rows(batch)
        keep = (torch.rand(len(rows), device=rows.device) >= self.return_dropout).to(rows)
        condition = self.condition(batch.observations[:, 0], batch.actions[:, 0], batch.returns_to_go, keep)
        observe = self.preconditioning.inpainting(rows, self.known_entries()) if self.inpaint_start else None
        if self.to_be_compiled:
            self.to_be_compiled = False
            compile_or_tell(self.network, rows, keep, condition)
        loss, metrics = denoising_loss(
            self.preconditioning, self.network, rows, condition, weights=self.step_weights, observe=observe
        )
        self.minimize(loss, self.optimizer, self.max_gradient_norm)
        self.ema.update_parameters(self.network)
        metrics["loss"] = loss.detach()
        if self.regression is not None:
            target = rows[:, 1] if self.inpaint_start else rows[:, 0]
            prediction = self._regress(batch.observations[:, 0], batch.actions[:, 0])
            regression_loss = (prediction - target).square().mean()
            self.minimize(regression_loss, self.regression_optimizer, self.max_gradient_norm)
            metrics["regression_loss"] = regression_loss.detach()
        return metrics

    def learning_rates(self, index: int) -> list[float]:
        """A linear rise, then a cosine to 0 at the stage's last update; the same for the baseline."""
        rise = min(1.0, (index + 1) / max(self.warmup_steps, 1))
        total = self.trainer.max_steps
        rate = self.learning_rate * rise * (0.5 * (1 + math.cos(math.pi * index / total)) if total > 0 else 1.0)
        return [rate] * len(self.parameter_groups())

    def _regress(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The baseline's row for one step, shape (B, R)."""
        assert self.regression is not None
        return self.regression(torch.cat([self.observation_normalizer(observations), actions], dim=-1))

    # Imagining

    @torch.no_grad()
    def imagine(
        self,
        observations: Tensor,
        actions: Tensor,
        returns_to_go: Tensor,
        guidance: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Imagined:
        """Samples one future for each start.

        Args:
            observations: ``s_t``, shape (B, O).
            actions: ``a_t`` in [-1, 1], shape (B, A).
            returns_to_go: The return-to-go to aim at, shape (B,).
            guidance: Weight of classifier-free guidance; 1 is the plain conditional model and the cheapest.
            generator: Source of the noise.
        """
        network = self.ema.module
        if guidance != 1 and self.return_dropout in (0, 1):
            raise UserError(
                f"guidance is {guidance}, but with return_dropout {self.return_dropout} the world model learnt only "
                "one of the two models to mix; set guidance to 1, or train with a return_dropout between 0 and 1"
            )
        # a model that never saw a return has learnt nothing for the flag 1
        keep = torch.full_like(returns_to_go, float(self.return_dropout < 1))

        def denoiser(keep: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
            condition = self.condition(observations, actions, returns_to_go, keep)
            return lambda noisy, sigma: self.preconditioning.denoise(network, noisy, sigma, condition)

        shape = len(observations), self.network.horizon, self.network.row_size
        noise = torch.randn(shape, generator=generator, device=observations.device)
        sigmas = self.preconditioning.sampling_sigmas(self.sampler.num_steps, observations.device)
        observe = None
        if self.inpaint_start:
            observe = self.preconditioning.inpainting(self.start_row(observations), self.known_entries())
        denoise = guided(denoiser(keep), denoiser(torch.zeros_like(keep)), guidance)
        rows = self.sampler.sample(denoise, sigmas, noise, generator, observe)
        rows = rows[:, 1:] if self.inpaint_start else rows
        return Imagined(
            torch.cat([observations.unsqueeze(1), self._observations(observations, rows)], dim=1),
            self.reward_normalizer.inverse(rows[..., -2:-1]).squeeze(-1),
            (rows[..., -1] + 1) / 2,
        )

    def _observations(self, observations: Tensor, rows: Tensor) -> Tensor:
        """``s_{t+1} ..`` from generated rows, shape (B, H, O)."""
        if self.predict_differences:
            return observations.unsqueeze(1) + self.difference_normalizer.inverse(rows[..., :-2]).cumsum(dim=1)
        return self.observation_normalizer.inverse(rows[..., :-2])

    # Validation

    def validation_step(self, batch: Segments, batch_idx: int) -> None:
        """Squared errors per step of imagined futures against the recorded ones.

        Observation and reward errors are in units of the data's variance; the termination error is the share of wrong
        answers. The future also depends on later actions, which the world model is not told; the baseline, rolled out
        step by step, is given them.

        Args:
            batch: Held-out segments, fields of shape (B, H, ...).
            batch_idx: Seeds the noise, so that every validation uses the same.
        """
        generator = torch.Generator(self.device).manual_seed(batch_idx)
        start, action = batch.observations[:, 0], batch.actions[:, 0]
        self._record(self.validation_errors, self.imagine(start, action, batch.returns_to_go, 1.0, generator), batch)
        if self.regression is not None:
            self._record(self.regression_errors, self._roll_out_regression(batch), batch)

    def _roll_out_regression(self, batch: Segments) -> Imagined:
        steps = []
        current = batch.observations[:, 0]
        for k in range(self.horizon):
            row = self._regress(current, batch.actions[:, k]).unsqueeze(1)
            current = self._observations(current, row)[:, 0]
            steps.append((current, self.reward_normalizer.inverse(row[:, 0, -2:-1])[:, 0], (row[:, 0, -1] + 1) / 2))
        observations, rewards, terminations = (torch.stack(part, dim=1) for part in zip(*steps))
        return Imagined(torch.cat([batch.observations[:, :1], observations], dim=1), rewards, terminations)

    def _record(self, errors: HorizonErrors, imagined: Imagined, batch: Segments) -> None:
        difference = (imagined.observations - batch.observations)[:, 1:] / self.observation_normalizer.std
        reward_error = (imagined.rewards - batch.rewards) / self.reward_normalizer.std
        wrong = (imagined.terminations > 0.5) != (batch.terminations > 0.5)
        errors.update(difference.square(), reward_error.square(), wrong.float(), batch.valid)

    def on_validation_epoch_end(self) -> None:
        """Logs every error at every step, and the first step's ratio to the baseline."""
        self.log("step", float(self.trainer.global_step))  # the x-axis, in updates
        sources = {"validation": self.validation_errors.compute_and_reset()}
        if self.regression is not None:
            sources["regression"] = self.regression_errors.compute_and_reset()
        for source, errors in sources.items():
            for key, values in errors.items():
                self.log_dict({f"world_model/{source}_{key}_error/step_{k + 1}": v for k, v in enumerate(values)})
        first = {source: float(errors["observation"][0]) for source, errors in sources.items()}
        self.log("world_model/validation_error", first["validation"], prog_bar=True)
        if self.regression is not None:
            self.log("world_model/first_step_error_ratio", first["validation"] / max(first["regression"], 1e-12))

    def optimizers_in_order(self) -> list[Optimizer]:
        """The denoiser's optimiser and, with a baseline, the baseline's."""
        return [self.optimizer] if self.regression is None else [self.optimizer, self.regression_optimizer]
