"""Callbacks of the agent's stage: when to imagine anew, when to evaluate."""

from dawm.callbacks.evaluate import EvaluateInEnvironment
from dawm.callbacks.regenerate import RegenerateRollouts

__all__ = ["EvaluateInEnvironment", "RegenerateRollouts"]
