"""Stage and Stages: what differs between the three stages of an experiment, as a config gives it."""

from dataclasses import dataclass, field

import lightning as L

from dawm.errors import UserError

__all__ = ["Stage", "Stages"]

EVERY = ("log_every_n_steps", "validate_every_n_steps", "checkpoint_every_n_steps")


@dataclass
class Stage:
    """What differs between the stages; everything is counted in updates.

    Args:
        max_steps: Gradient updates of the stage's main network.
        log_every_n_steps: Updates between two rows in the logs.
        validate_every_n_steps: Updates between two validations on held-out data (world model, inverse dynamics).
        patience: Validations without improvement before the stage stops early; None never stops early.
        checkpoint_every_n_steps: Updates between two checkpoints.
        ckpt_path: Use this checkpoint instead of training the stage.
        callbacks: Lightning callbacks of this stage.
    """

    max_steps: int = 10_000
    log_every_n_steps: int = 100
    validate_every_n_steps: int = 1000
    patience: int | None = None
    checkpoint_every_n_steps: int = 2000
    ckpt_path: str | None = None
    callbacks: list[L.Callback] = field(default_factory=list)


@dataclass
class Stages:
    """The three stages.

    Args:
        world_model: Stage 1.
        inverse_dynamics: Stage 2.
        agent: Stage 3.
    """

    world_model: Stage = field(default_factory=Stage)
    inverse_dynamics: Stage = field(default_factory=Stage)
    agent: Stage = field(default_factory=Stage)

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("world_model", "inverse_dynamics", "agent"):
            for key in (*EVERY, "max_steps", "patience"):
                value = getattr(getattr(self, name), key)
                if not (value is None and key == "patience") and not 1 <= value < 2**63:
                    setting = f"stages.{name}.{key}"
                    raise UserError(f"{setting} is {value}, but must be at least 1; set --{setting}")
