"""Callbacks of the agent's stage: when to imagine again, when to evaluate, and the base for callbacks of your own."""

from dawm.callbacks.evaluate import EvaluateInEnvironment
from dawm.callbacks.every_n_updates import EveryNUpdates
from dawm.callbacks.regenerate import RegenerateRollouts

__all__ = ["EvaluateInEnvironment", "EveryNUpdates", "RegenerateRollouts"]
