"""Embedded data sets: real rollouts, built on this machine from behaviour policies inside the package.

No download is needed, and once built they are Minari data sets like any other
(``minari show embedded/hopper/medium-replay-v0``). `dawm.data.sources.behaviour` says what is in them.
"""

import contextlib

import gymnasium as gym

from dawm.data.progress import progress_bar
from dawm.data.sources.behaviour import MIXTURES, play
from dawm.data.sources.catalog import EMBEDDED, unknown_dataset
from dawm.data.sources.spaces import unbounded
from dawm.data.store.minari_writer import write_dataset
from dawm.data.store.staging import OutputExists, is_complete

__all__ = ["STEPS", "build"]

STEPS = 40_000  # of each data set; the last episode is played to its end

_ABOUT = {
    # means over 100 episodes of uniformly random actions and over 30 of the deterministic expert, in Hopper-v5
    "ref_min_score": 18.783593655902184,
    "ref_max_score": 3276.3575732459253,
    "num_episodes_average_score": 30,
    "requirements": ["gymnasium>=1.1", "mujoco>=3.1"],
}


def build(name: str, seed: int = 0, steps: int | None = None, overwrite: bool = False) -> str:
    """Build an embedded data set, unless it is there already; returns Minari's id.

    The name is one of `dawm.data.sources.catalog.EMBEDDED`, with or without the version ``-v0``. Another seed (of the
    starts and of the actions' noise) or least number of steps than the default becomes part of the id.
    """
    name = name.removesuffix("-v0")
    if name not in EMBEDDED:
        raise unknown_dataset(name)
    steps = STEPS if steps is None else steps
    variant = (f"-seed{seed}" if seed else "") + (f"-steps{steps}" if steps != STEPS else "")
    # Minari 0.5 demands a version: it fails on every data set of the machine if one of them has none.
    dataset_id = f"{name}{variant}-v0"
    if is_complete(dataset_id) and not overwrite:
        return dataset_id
    fractions = ", ".join(f"{policy} {fraction:.0%}" for policy, fraction in MIXTURES[name].items())
    with (
        contextlib.suppress(OutputExists),  # another process has built it in the meantime
        progress_bar(f"Building {name}", steps) as bar,
    ):
        write_dataset(
            dataset_id,
            play(name, seed, steps),
            env_spec=gym.spec("Hopper-v5"),
            observation_space=unbounded(11),
            action_space=gym.spaces.Box(-1.0, 1.0, (3,)),
            metadata=_ABOUT,
            description=f"Rollouts of the behaviour policies in dawm, actions sampled, seed {seed}: {fractions}.",
            algorithm_name="TQC expert" if "expert" in MIXTURES[name] else "SAC",
            overwrite=overwrite,
            report=lambda played: bar.update(bar.task_ids[0], completed=min(played, steps)),
        )
    return dataset_id
