"""The environment as a judge: its state is set from an observation, an action is played, and what follows is the truth.

That works where an observation holds the simulator's state, as in Gymnasium's planar MuJoCo environments (Hopper,
HalfCheetah, Walker2d, Swimmer): positions, all but the first few, then velocities. Ant's and Humanoid's observations
hold forces of the step before, and their rewards lag behind the state, so they are refused.

Symbols: B starts, H horizon, O observation size, A action size.
"""

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from dawm.errors import UserError
from dawm.evaluation.environments import ENV_ID, Environment, Named, make_environment

__all__ = ["Outcome", "Simulator"]

TRIALS = 100  # steps played twice, to see that the state is all in the observation
FAST = 1e4  # a velocity that every limit clips
TOLERANCE = 1e-5  # the solver starts from another guess, and stops a little elsewhere
LARGEST = 1e5  # MuJoCo gives up far beyond this, and resets itself


class Outcome(NamedTuple):
    """What followed."""

    next_observations: NDArray[np.float64]  # shape (B, H, O)
    rewards: NDArray[np.float64]  # shape (B, H)
    terminations: NDArray[np.float64]  # 1 where the task ended, shape (B, H)
    played: NDArray[np.bool_]  # False where a start or an action was not finite or was absurdly large, shape (B, H)


class Simulator:
    """One environment whose state can be set from an observation.

    Args:
        environment: A Gymnasium id, a specification, or a function that makes the environment.
        env_id_key: The setting that names the environment, for messages.

    Raises:
        UserError: Its observations do not hold its state; found out by trying, rewards and terminations included.
    """

    def __init__(self, environment: Environment, env_id_key: str = ENV_ID) -> None:
        self.env = make_environment(environment, env_id_key=env_id_key)
        self.named = Named.of(self.env, env_id_key)
        self.skipped, self.velocity_limit = 0, np.inf
        self.env.reset(seed=0)
        self._mujoco: Any = self.env.unwrapped
        try:
            self._read_layout()
            self._try_out(make_environment(environment, env_id_key=env_id_key))
        except UserError:
            self.close()
            raise

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()

    def state_from_observation(self, observation: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Positions and velocities of an observation, shape (O,); positions that it leaves out are the start's."""
        seen = self._mujoco.model.nq - self.skipped
        hidden = self._mujoco.init_qpos[: self.skipped]
        return np.concatenate([hidden, observation[:seen]]).astype(np.float64), observation[seen:].astype(np.float64)

    def clipped(self, observations: NDArray) -> NDArray[np.bool_]:
        """Whether a velocity is at the limit, so that the state is unknown beyond it, (..., O) -> (...)."""
        velocities = observations[..., self._mujoco.model.nq - self.skipped :]
        return (np.abs(velocities) >= self.velocity_limit).any(axis=-1)

    def one_step(self, observations: NDArray, actions: NDArray) -> Outcome:
        """The truth of single steps, each from its own state, shapes (..., O) and (..., A) in the environment's units.

        Fields of the outcome have the leading dimensions of the observations.
        """
        lead, flat = observations.shape[:-1], actions.reshape(-1, 1, actions.shape[-1])
        found = self.open_loop(observations.reshape(-1, observations.shape[-1]), flat)
        rewards, terminations = found.rewards.reshape(lead), found.terminations.reshape(lead)
        following = found.next_observations.reshape(observations.shape)
        return Outcome(following, rewards, terminations, found.played.reshape(lead))

    def open_loop(self, observations: NDArray, actions: NDArray) -> Outcome:
        """The truth of action sequences: the state is set once, shape (B, O), then H actions are played, (B, H, A).

        Nothing is reset after a termination: the physics go on.
        """
        count, horizon = actions.shape[:2]
        following = np.full((count, horizon, observations.shape[-1]), np.nan)
        rewards, ends = np.full((count, horizon), np.nan), np.full((count, horizon), np.nan)
        usable = (np.abs(observations) < LARGEST).all(axis=-1, keepdims=True) & np.isfinite(actions).all(axis=-1)
        usable = np.logical_and.accumulate(usable, axis=1)
        with self.named.guard("step"):
            for index in np.flatnonzero(usable[:, 0]):
                self._set(observations[index])
                for step in range(int(usable[index].sum())):
                    following[index, step], rewards[index, step], ends[index, step], _, _ = self.env.step(
                        actions[index, step]
                    )
        return Outcome(following, rewards, ends, usable)

    def _set(self, observation: NDArray) -> None:
        self._mujoco.data.qacc_warmstart[:] = 0  # the solver's first guess, left by the step before
        self._mujoco.set_state(*self.state_from_observation(observation))

    def _read_layout(self) -> None:
        """Finds how many positions an observation leaves out, and where velocities are clipped."""
        if not (hasattr(self._mujoco, "set_state") and hasattr(self._mujoco, "init_qpos")):
            raise self._refused("which is no MuJoCo environment of Gymnasium")
        assert self.env.observation_space.shape is not None
        size, model = self.env.observation_space.shape[0], self._mujoco.model
        self.skipped = model.nq + model.nv - size
        if not 0 <= self.skipped <= min(2, model.nq - 1):
            state = f"{model.nq} positions and {model.nv} velocities"
            raise self._refused(f"with {size} numbers in an observation of {state}")
        self._mujoco.set_state(self._mujoco.init_qpos, np.full(model.nv, FAST))
        fastest = np.abs(self._mujoco._get_obs()[-model.nv :]).max()
        self.velocity_limit = float(fastest) if fastest < FAST else np.inf

    def _try_out(self, other: gym.Env) -> None:
        """Plays random actions in another copy, and each step again from its observation alone."""
        observation, _ = other.reset(seed=0)
        other.action_space.seed(0)
        try:
            for _ in range(TRIALS):
                action = other.action_space.sample()
                following, reward, terminated, truncated, _ = other.step(action)
                if not self.clipped(observation):
                    again = (part[0] for part in self.one_step(observation[None], action[None])[:3])
                    if not all(
                        np.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)
                        for a, b in zip(again, (following, float(reward), float(terminated)))
                    ):
                        raise self._refused("whose observations do not hold its state")
                observation = other.reset()[0] if terminated or truncated else following
        finally:
            other.close()

    def _refused(self, has: str) -> UserError:
        expected = "one whose state can be set from an observation (Hopper, HalfCheetah, Walker2d)"
        return self.named.error(has, expected, "name another environment")
