"""`evaluate` scores a finished run's agent, from its checkpoint alone."""

import json

import pytest

from dawm.cli.main import main


def test_evaluate_agrees_with_the_run_itself(smoke, tmp_path, capsys, monkeypatch):
    assert main(["fit", "--config", str(smoke)]) == 0
    agent = json.loads((tmp_path / "run" / "results.json").read_text())["agent"]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "empty"))  # the data are not needed
    (tmp_path / "run").rename(tmp_path / "moved")
    capsys.readouterr()
    assert main(["evaluate", "--run", str(tmp_path / "moved"), "--episodes", "2"]) == 0
    printed = capsys.readouterr().out
    assert f"return {agent['return']['mean']:.1f}" in printed
    assert f"score {agent['normalized_score']['mean']:.1f}" in printed
    assert main(["evaluate", "--run", str(tmp_path / "moved"), "--env_id", "Nope-v0"]) == 2
    assert "error: --env_id: got 'Nope-v0' (" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "not json"])
def test_a_folder_that_is_no_run(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert main(["evaluate", "--run", str(tmp_path)]) == 2
    assert "results.json" in capsys.readouterr().err
