"""Loggers given by class path, beside CSV and TensorBoard: the settings, the curves and the final scores reach them."""

import json
import logging

import pytest
import yaml

from dawm.cli.curves import read_logs
from dawm.cli.main import main

LOGGERS = "lightning.pytorch.loggers"


def fit(smoke, tmp_path, *loggers: dict) -> dict:
    """Runs the smallest experiment with loggers and gives its results."""
    config = yaml.safe_load(smoke.read_text()) | {"logger": list(loggers)}
    smoke.write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(smoke)]) == 0
    return json.loads((tmp_path / "run" / "results.json").read_text())


def test_any_logger_gets_settings_curves_and_summary(smoke, tmp_path):
    """Lightning's own CSV logger, given as a user gives any other."""
    given = {"class_path": f"{LOGGERS}.CSVLogger", "init_args": {"save_dir": str(tmp_path / "mine"), "name": "logs"}}
    results = fit(smoke, tmp_path, given)
    assert read_logs(tmp_path / "mine")["world_model/validation_error"][0] == [10, 20]
    assert read_logs(tmp_path / "mine")["eval/return"][0] == [20, 40]
    score = read_logs(tmp_path / "mine")["final/normalized_score"]
    assert score == ([40], [pytest.approx(results["agent"]["normalized_score"]["mean"])])
    hyperparameters = yaml.safe_load((tmp_path / "mine" / "logs" / "version_0" / "hparams.yaml").read_text())
    assert hyperparameters["stages"]["agent"]["max_steps"] == 40
    # where the experiment's own logs go is not changed, and the run can be given again
    assert read_logs(next((tmp_path / "run" / "agent").iterdir()))["eval/return"][0] == [20, 40]
    assert main(["fit", "--config", str(tmp_path / "run" / "config.yaml")]) == 0


def test_wandb_offline(smoke, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed; pip install 'dawm[loggers]'")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")  # the logger sets it too, for good
    arguments = {"offline": True, "project": "dawm", "save_dir": str(tmp_path)}
    results = fit(smoke, tmp_path, {"class_path": f"{LOGGERS}.WandbLogger", "init_args": arguments})
    run = wandb.run
    try:
        assert run.config["stages"]["agent"]["max_steps"] == 40
        summary = dict(run.summary)
    finally:
        wandb.finish()
    assert summary["final/normalized_score"] == pytest.approx(results["agent"]["normalized_score"]["mean"])
    assert {"world_model/validation_error", "agent/critic_loss", "synthetic/kept"} <= summary.keys()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_mlflow_in_a_local_folder(smoke, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed; pip install 'dawm[loggers]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 wants a data base for anything but a try
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    arguments = {"experiment_name": "dawm", "save_dir": str(tmp_path / "mlruns")}
    results = fit(smoke, tmp_path, {"class_path": f"{LOGGERS}.MLFlowLogger", "init_args": arguments})
    client = mlflow.tracking.MlflowClient(f"file:{tmp_path / 'mlruns'}")
    (run,) = client.search_runs([client.get_experiment_by_name("dawm").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["stages/agent/max_steps"] == "40"
    assert run.data.metrics["final/normalized_score"] == pytest.approx(results["agent"]["normalized_score"]["mean"])
    assert [m.step for m in client.get_metric_history(run.info.run_id, "eval/return")] == [20, 40]
    assert {
        "world_model/validation_error",
        "inverse_dynamics/validation_error",
        "agent/critic_loss",
    } <= run.data.metrics.keys()
