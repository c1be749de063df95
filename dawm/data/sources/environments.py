"""Environments as plain values, for checkpoints and data sets, and what MuJoCo says of those it makes."""

import re
import warnings
from functools import cache

from gymnasium.envs.registration import EnvSpec

from dawm.errors import require

__all__ = ["describe_environment", "environment_from", "spec_as_json", "warn_once_by_mujoco"]


def spec_as_json(env_spec: EnvSpec | None) -> str | None:
    """A specification as JSON; None if it holds what JSON cannot: classes, functions, arrays or tuples."""
    try:
        text = None if env_spec is None else env_spec.to_json()
        return text if text is not None and EnvSpec.from_json(text) == env_spec else None
    except (TypeError, ValueError):
        return None


def describe_environment(env_spec: EnvSpec | None, env_id: str | None = None) -> str | None:
    """A specification as JSON, or where that cannot be an id, from which the registry makes the environment again.

    ``env_id`` is what the user typed, if anything: ``module:Name-v0`` says which module registers the environment.
    Otherwise it is taken to be the module of the environment's class.
    """
    if env_spec is None:
        return None
    entry_point = env_spec.entry_point
    of_class = entry_point.partition(":")[0] if isinstance(entry_point, str) else getattr(entry_point, "__module__", "")
    module = (env_id or "").rpartition(":")[0] or of_class
    return spec_as_json(env_spec) or (env_spec.id if module in ("", "__main__") else f"{module}:{env_spec.id}")


def environment_from(description: str | None, env_id: str | None = None, env_id_key: str = "env_id") -> str | EnvSpec:
    """The environment of what `describe_environment` gave, or the one that the setting ``env_id_key`` names instead."""
    if env_id is not None:
        return env_id
    expected = "an environment, because the data set names none"
    require(env_id_key, env_id, description is not None, expected, f"set --{env_id_key}")
    assert description is not None
    return EnvSpec.from_json(description) if description.startswith("{") else description


@cache
def warn_once_by_mujoco() -> None:
    """Makes each of MuJoCo's warnings a Python warning, once in a process; to be called before an environment is made.

    By itself it prints a warning whenever a model is loaded, which is once for every environment of an evaluation, and
    adds it to a file in the working folder.
    """
    try:
        import mujoco
    except ImportError:
        return
    said = set()

    def warn(text: str) -> None:
        kind = re.sub(r"[\d.]+", "", text)  # times and indices differ
        if kind not in said:
            said.add(kind)
            warnings.warn(f"MuJoCo: {text.strip()}", stacklevel=2)

    if mujoco.get_mju_user_warning() is None:  # the user's own handler stays
        mujoco.set_mju_user_warning(warn)
