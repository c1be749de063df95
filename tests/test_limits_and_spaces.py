"""Time limits and spaces of environments, compared with those of the data."""

import gymnasium as gym
import numpy as np
import pytest
from own_environments import DATA, Drift, line_of, register, still

from dawm.evaluation import environments
from dawm.evaluation.checks import check_environment
from dawm.evaluation.environments import time_limit
from dawm.evaluation.episodes import run_episodes

pytestmark = pytest.mark.usefixtures("fresh_registry")

# Time limits


def test_an_environment_that_never_ends_is_refused_with_the_setting_that_ends_it(monkeypatch):
    line = line_of(check_environment, register(limit=None), **DATA)
    assert line.startswith("--data.max_episode_steps: got None, expected a time limit, because 'Drift-v0' has none")
    assert "10000 steps; set it, such as to 20" in line
    check_environment(register(limit=None), **DATA, max_episode_steps=20)
    check_environment(lambda: Drift(), **DATA, max_episode_steps=20)
    check_environment(register(limit=None, ends=300), **DATA)  # ends by itself
    assert "must" not in line_of(check_environment, register(), **DATA, max_episode_steps=0)

    # played all the same, it is cut
    monkeypatch.setattr(environments, "ENDLESS", 50)
    with pytest.warns(UserWarning, match=r"--data.max_episode_steps: 'Drift-v0' .* did not end in 50 steps"):
        cut = run_episodes(still, register(limit=None), range(3))
    assert cut.tolist() == run_episodes(still, register(limit=50), range(3)).tolist()
    assert cut.tolist() == run_episodes(still, register(limit=60), range(3), max_episode_steps=50).tolist()


def test_a_time_limit_shorter_than_the_data_s_episodes_is_a_warning(recwarn):
    check_environment(register(), **DATA)
    check_environment(register(10), **DATA, max_episode_steps=20)
    assert not recwarn
    with pytest.warns(UserWarning, match=r"'Drift-v0' ends episodes after 10 steps, the data have one of 20"):
        check_environment(register(10), **DATA)


def test_the_innermost_and_the_outermost_time_limit_are_found():
    assert time_limit(Drift()) is None
    inner = gym.wrappers.TimeLimit(Drift(), 5)
    assert time_limit(gym.wrappers.TimeAwareObservation(inner)) == 5
    assert time_limit(gym.wrappers.TimeLimit(inner, 3)) == 3


# Spaces


def box(low, high, size=2):
    return gym.spaces.Box(low, high, (size,), np.float64)


@pytest.mark.parametrize(
    ("spaces", "parts"),
    [
        ({"action_space": box(-1, 1, 3)}, ["with actions of 3 numbers", "expected 2 as in the data"]),
        ({"action_space": box(1, 9)}, ["actions from 1 to 9 in entry 0", "expected some from -1 to 1 as in the data"]),
        ({"observation_space": box(-1, 1, 5)}, ["with observations of 5 numbers", "expected 2 as in the data"]),
    ],
)
def test_spaces_that_do_not_fit_the_data(spaces, parts):
    line = line_of(check_environment, register(spaces=spaces), **DATA)
    assert line.startswith("--data.env_id: got 'Drift-v0' with")
    assert all(part in line for part in parts), line


def test_other_bounds_are_warnings_that_name_both_sides(recwarn):
    wider = {"action_space": box(-3, 3), "observation_space": box(-9, 9)}
    check_environment(register(spaces=wider), **DATA)
    # the same bounds in another precision
    data = DATA | {"action_space": gym.spaces.Box(-0.1, 0.1, (2,), np.float32), "observation_space": box(-0.1, 0.1)}
    check_environment(register(spaces={"action_space": box(-0.1, 0.1)}), **data)
    assert not recwarn
    with pytest.warns(UserWarning, match=r"actions from -0.5 to 3 in entry 0, the data's go from -1 to 1; .* clipped"):
        check_environment(register(spaces={"action_space": box(-0.5, 3)}), **DATA)
    with pytest.warns(UserWarning, match=r"entry 0 of its observations from -9 to 9, the data from -0.1 to 0.1"):
        check_environment(register(spaces=wider), **data)
