"""DiffusionWorldModel: imagines observations and rewards; actions only with a joint codec.

Learns ``p(s_{t+1} .. s_{t+H}, r_t .. r_{t+H-1}, end | s_t, a_t, g_t)`` as DWM (arXiv 2402.03570) and DAWM
(arXiv 2509.19538) do, with a termination channel beside them. `dawm.diffusion.codecs` says what a sample ``x`` holds.
The return-to-go ``g_t`` is hidden from a fraction of the batch, so that one network is both the conditional and the
unconditional model of classifier-free guidance (arXiv 2207.12598).

Symbols: B batch, H horizon, O observation size, A action size.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Adam, Optimizer

from dawm.data.batches import BatchLoader
from dawm.data.module import TransitionDataModule
from dawm.data.transitions import Segments
from dawm.diffusion.codecs import Codec, Differences, Imagined
from dawm.diffusion.denoisers import Denoiser, ResidualMLP
from dawm.diffusion.preconditioning import EDM, Preconditioning, denoising_loss, guided
from dawm.diffusion.samplers import DPMSolverPP2M, Sampler
from dawm.errors import require
from dawm.forward_model import ForwardEnsemble
from dawm.nn.ema import EMA
from dawm.training.metrics import MeanPerColumn
from dawm.training.updates import UpdateModule

__all__ = ["DiffusionWorldModel", "Imagined"]

ERRORS = ("observation", "reward", "termination")  # of which validation takes the mean, at each step


class DiffusionWorldModel(UpdateModule):
    """Conditional diffusion over the next H steps.

    Args:
        horizon: Steps imagined H, in environment steps.
        codec: Class of the codec; called with (observation_size, action_size).
        network: Class of the denoiser; called with (horizon, features, condition_size).
        preconditioning: Noise levels and how the network is wrapped.
        sampler: How noise becomes ``x``.
        return_dropout: Fraction of the training batch whose return-to-go is hidden, in [0, 1].
        first_step_weight: Weight of the first imagined step's error against each later one's: the step that every
            rollout has and that all later ones add to.
        learning_rate: Adam's highest learning rate.
        warmup_steps: Updates of linear warm-up, then cosine decay to 0.
        max_gradient_norm: Gradient-norm clipping; None disables it.
        ema_decay: EMA decay per update; samples come from the EMA weights.
        forward_members: Forward models in the ensemble that is trained on the same batches. Its error is given beside
            the model's, and synthesis can relabel and filter by it; 0 trains none.
    """

    name = "world_model"
    update_period = 1
    schedule_follows_max_steps = True
    step_weights: Tensor

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        horizon: int = 8,
        codec: Callable[[int, int], Codec] = Differences,
        network: Callable[[int, int, int], Denoiser] = ResidualMLP,
        preconditioning: Preconditioning | None = None,
        sampler: Sampler | None = None,
        return_dropout: float = 0.25,
        first_step_weight: float = 3.0,
        learning_rate: float = 4e-3,
        warmup_steps: int = 200,
        max_gradient_norm: float | None = 1.0,
        ema_decay: float = 0.9967,
        forward_members: int = 5,
    ) -> None:
        require("world_model.horizon", horizon, horizon >= 1, "at least 1")
        require("world_model.return_dropout", return_dropout, 0 <= return_dropout <= 1, "from 0 to 1")
        require("world_model.ema_decay", ema_decay, 0 <= ema_decay <= 1, "from 0 to 1")
        require("world_model.forward_members", forward_members, forward_members >= 0, "at least 0")
        super().__init__()
        self.save_hyperparameters()
        self.horizon = horizon
        self.preconditioning = EDM() if preconditioning is None else preconditioning
        self.sampler = DPMSolverPP2M() if sampler is None else sampler
        self.preconditioning.sampler_sigmas(self.sampler.num_steps)  # says before training if the two do not suit
        self.return_dropout = return_dropout
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.max_gradient_norm = max_gradient_norm

        self.codec = codec(observation_size, action_size)
        self.network = network(self.codec.known_steps + horizon, self.codec.features, self.codec.condition_size)
        weights = torch.ones(1, horizon, 1)
        weights[:, 0] = first_step_weight
        self.register_buffer("step_weights", weights / weights.mean(), persistent=False)
        self.ema = EMA(self.network, ema_decay)
        self.optimizer = Adam(self.network.parameters(), lr=learning_rate, fused=True)
        self.forward_model: ForwardEnsemble | None = None
        if forward_members:
            self.forward_model = ForwardEnsemble(observation_size, action_size, forward_members, learning_rate)
        self.validation_errors, self.forward_errors = (MeanPerColumn(len(ERRORS), horizon) for _ in range(2))

    def configure_optimizers(self) -> list[Optimizer]:
        """The denoiser's optimiser and, where there are forward models, theirs."""
        return [self.optimizer] if self.forward_model is None else [self.optimizer, self.forward_model.optimizer]

    def fit_normalizers(self, data: TransitionDataModule) -> None:
        """Takes the codec's statistics from the training episodes."""
        rows = data.episodes.observed_rows(data.training_episodes)
        self.codec.fit(data.episodes.transitions[rows], data.returns_to_go[rows])

    def train_loader(self, data: TransitionDataModule, updates: int, rank: int) -> BatchLoader:
        """Random segments of the training episodes."""
        return data.segment_loader(updates, rank)

    def validation_loader(self, data: TransitionDataModule, rank: int, world_size: int) -> Iterable[Segments]:
        """A fixed sample of held-out segments."""
        return data.validation_segment_loader(rank, world_size)

    def update(self, batch: Segments) -> dict[str, Tensor]:
        """One step on the denoising loss, and one of the forward models, on segments (B, H, ...)."""
        start, x = batch.observations[:, 0], self.codec.encode(batch)
        keep = (torch.rand(len(start), device=start.device) >= self.return_dropout).to(start)
        condition = self.codec.condition(start, batch.actions[:, 0], batch.returns_to_go, keep)
        weights = self.step_weights
        if batch.observed is not None:
            weights = weights * self.codec.recorded(batch.observed)
        loss, metrics = denoising_loss(
            self.preconditioning, self.network, x, condition, weights=weights, known=self.codec.known(start)
        )
        self.minimize(loss, self.optimizer, self.max_gradient_norm)
        self.ema.update_parameters(self.network)
        metrics["loss"] = loss.detach()
        if self.forward_model is not None:
            forward_loss = self.forward_model.loss(self.codec, batch)
            self.minimize(forward_loss, self.forward_model.optimizer, self.max_gradient_norm)
            metrics["forward_loss"] = forward_loss.detach()
        return metrics

    def learning_rates(self, index: int) -> list[float]:
        """Linear warm-up, then cosine decay to 0 at the stage's last update; the same for the forward models."""
        warmup = min(1.0, (index + 1) / max(self.warmup_steps, 1))
        return [self.decayed(self.learning_rate * warmup, index)] * len(self.parameter_groups())

    @torch.no_grad()
    def imagine(
        self,
        observations: Tensor,
        actions: Tensor,
        returns_to_go: Tensor,
        guidance: float = 1.0,
        generator: torch.Generator | None = None,
        x: Tensor | None = None,
        noising: float = 1.0,
    ) -> Imagined:
        """Samples one future for each start ``s_t``, ``a_t`` (in [-1, 1]) and return-to-go to aim at, shape (B,).

        Guidance is the weight of classifier-free guidance; 1 is the plain conditional model and the cheapest. Encoded
        segments ``x``, shape (B, H, D), are noised by the part ``noising`` of the sampler's steps, and denoised.
        """
        require(
            "guidance", guidance, guidance == 1 or 0 < self.return_dropout < 1,
            f"1 (with return_dropout {self.return_dropout} the world model learnt only one of the two models to mix)",
            "set it to 1, or train with a --world_model.return_dropout between 0 and 1",
        )  # fmt: skip
        kind = next(self.parameters()).dtype  # NumPy's numbers are doubles
        observations, actions, returns_to_go = (part.to(kind) for part in (observations, actions, returns_to_go))
        # a model that never saw a return has learnt nothing for the flag 1
        keep = torch.full_like(returns_to_go, float(self.return_dropout < 1))

        def denoiser(keep: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
            condition = self.codec.condition(observations, actions, returns_to_go, keep)
            return lambda x_t, sigma: self.preconditioning.denoise(self.ema.module, x_t, sigma, condition)

        denoise = guided(denoiser(keep), denoiser(torch.zeros_like(keep)), guidance)
        shape = len(observations), self.network.horizon, self.network.features
        noise = torch.randn(shape, generator=generator, device=observations.device)
        sigmas = self.preconditioning.sampler_sigmas(self.sampler.num_steps, observations.device)
        # rounded up, if not by a rounding error of the product: without a step nothing would be imagined
        sigmas = sigmas[self.sampler.num_steps - math.ceil(noising * self.sampler.num_steps - 1e-9) :]
        inpaint = self.preconditioning.inpainting(self.codec.known(observations))
        if x is not None:
            x = functional.pad(x, (0, 0, self.codec.known_steps, 0))  # known steps are inpainted
        x = self.sampler.sample(denoise, sigmas, noise, generator, inpaint, x)
        return self.codec.decode(observations, actions, x[:, -self.horizon :])

    def validation_step(self, batch: Segments, batch_idx: int) -> None:
        """Squared errors per step of imagined futures against the recorded ones.

        Observation and reward errors are in units of the data's variance; the termination error is the fraction of
        wrong answers. The later actions, which matter too, are seen by the forward models but not by the world model.
        The batch's number seeds the noise, so that every validation uses the same.
        """
        generator = torch.Generator(self.device).manual_seed(batch_idx)
        start, action = batch.observations[:, 0], batch.actions[:, 0]
        self._record(self.validation_errors, self.imagine(start, action, batch.returns_to_go, 1.0, generator), batch)
        if self.forward_model is not None:
            self._record(self.forward_errors, self.forward_model.roll_out(self.codec, batch), batch)

    def _record(self, errors: MeanPerColumn, imagined: Imagined, batch: Segments) -> None:
        difference = (imagined.observations - batch.observations)[:, 1:] / self.codec.observation_normalizer.std
        reward_error = (imagined.rewards - batch.rewards) / self.codec.reward_normalizer.std
        wrong = (imagined.terminations > 0.5) != (batch.terminations > 0.5)
        observed = batch.valid if batch.observed is None else batch.valid * batch.observed
        errors.update(
            torch.stack([difference.square().mean(dim=-1), reward_error.square(), wrong.float()], dim=1),
            torch.stack([observed, batch.valid, batch.valid], dim=1),
        )

    def on_validation_epoch_end(self) -> None:
        """Logs every error at every step, and the first step's ratio to the forward models'."""
        self.log("step", float(self.trainer.global_step))  # the x-axis, in updates
        sources = {"validation": self.validation_errors.compute_and_reset()}
        if self.forward_model is not None:
            sources["forward"] = self.forward_errors.compute_and_reset()
        for source, errors in sources.items():
            for key, values in zip(ERRORS, errors):
                self.log_dict({f"world_model/{source}_{key}_error/step_{k + 1}": v for k, v in enumerate(values)})
        first = {source: float(errors[0, 0]) for source, errors in sources.items()}
        self.log("world_model/validation_error", first["validation"], prog_bar=True)
        if "forward" in first:
            self.log("world_model/first_step_error_ratio", first["validation"] / max(first["forward"], 1e-12))
