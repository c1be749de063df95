"""Reference returns, which turn an episode's return into a score.

score = 100 (return - minimum) / (maximum - minimum)        (D4RL, arXiv 2004.07219, appendix)

The return is the undiscounted sum of rewards. Two families of numbers exist and must never be mixed: D4RL's were
measured in the environments of its day (Hopper-v2 with mujoco-py), the others in Gymnasium's v5 environments.
"""

import re
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

__all__ = ["LOCOMOTION", "ReferenceScores", "d4rl_scores", "is_d4rl_name", "reference_scores"]

Returns = TypeVar("Returns", float, np.ndarray)

# Farama-Foundation/D4RL, d4rl/infos.py: (random, expert). The versions of a data set (v0, v1, v2) share their values.
_D4RL = {
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "halfcheetah": (-280.178953, 12135.0),
    "ant": (-325.6, 3879.7),
    "maze2d-open": (0.01, 20.66),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "maze2d-open-dense": (11.17817, 27.166538620695782),
    "maze2d-umaze-dense": (68.537689, 193.66285642381482),
    "maze2d-medium-dense": (44.264742, 297.4552547777125),
    "maze2d-large-dense": (30.569041, 303.4857382709002),
    "antmaze": (0.0, 1.0),
    "pen": (96.262799, 3076.8331017826877),
    "door": (-56.512833, 2880.5693087298737),
    "hammer": (-274.856578, 12794.134825156867),
    "relocate": (-6.425911, 4233.877797728884),
    "kitchen": (0.0, 4.0),
    "minigrid-fourrooms": (0.01442, 2.89685),
}

# Random policy and deterministic expert (public TQC agents of DLR-RM/rl-trained-agents), measured in Gymnasium v5.
_GYMNASIUM_V5 = {"Hopper-v5": (18.8, 3276.0), "Walker2d-v5": (1.8, 4401.0), "HalfCheetah-v5": (-297.0, 12051.0)}

# Gymnasium's v2 to v4 keep the dynamics, rewards and endings that D4RL's values were measured with.
_EARLIER_GYMNASIUM = re.compile(r"(Hopper|Walker2d|HalfCheetah|Ant)-v[234]")

_KINDS = "(random|medium|expert|mixed|medium-replay|full-replay|medium-expert)"
LOCOMOTION = re.compile(rf"(?P<family>hopper|walker2d|halfcheetah)-{_KINDS}-v\d+")
_OTHERS = re.compile(
    rf"ant-{_KINDS}-v\d+"
    r"|(maze2d|antmaze|kitchen|minigrid)-[a-z0-9-]+-v\d+"
    r"|(pen|door|hammer|relocate)-(human|cloned|expert)(-longhorizon)?-v\d+"
)


def is_d4rl_name(name: str) -> bool:
    """Whether a name is that of one of D4RL's data sets, such as ``hopper-medium-v2``."""
    return LOCOMOTION.fullmatch(name) is not None or _OTHERS.fullmatch(name) is not None


@dataclass(frozen=True)
class ReferenceScores:
    """The two returns between which a score runs from 0 to 100."""

    minimum: float  # return of a random policy
    maximum: float  # return of an expert
    source: str  # where the two numbers come from, for people to read

    def __str__(self) -> str:
        return f"{self.minimum:g} to {self.maximum:g}, {self.source}"

    def normalize(self, returns: Returns) -> Returns:
        """Scores of undiscounted returns, a number or an array of any shape."""
        return 100.0 * (returns - self.minimum) / (self.maximum - self.minimum)

    def agrees_with(self, other: "ReferenceScores") -> bool:
        """Whether both give the same score to within 0.1, which lets a rounded copy of the same numbers pass."""
        difference = max(abs(self.minimum - other.minimum), abs(self.maximum - other.maximum))
        return difference <= 1e-3 * abs(self.maximum - self.minimum)


def d4rl_scores(name: str) -> ReferenceScores | None:
    """D4RL's values for one of its data sets, such as ``hopper-medium-v2`` or ``hopper_medium-v2``."""
    family = re.sub(r"-v\d+$", "", name.lower().replace("_", "-"))
    while family and family not in _D4RL:
        family = family.rpartition("-")[0]
    return ReferenceScores(*_D4RL[family], source="D4RL v2 table") if family else None


def reference_scores(env_id: str) -> ReferenceScores | None:
    """Built-in reference scores of an environment (``Hopper-v5``) or of a D4RL data set (``hopper-medium-v2``).

    They are never borrowed from another version, but Gymnasium's versions 2 to 4 have D4RL's values.
    """
    if env_id in _GYMNASIUM_V5:
        return ReferenceScores(*_GYMNASIUM_V5[env_id], source="Gymnasium v5 table")
    return d4rl_scores(env_id) if is_d4rl_name(env_id) or _EARLIER_GYMNASIUM.fullmatch(env_id) else None
