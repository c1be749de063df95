"""``report.html``: what is in it, that it needs nothing else, and how it looks in a browser."""

import csv
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from dawm.cli.curves import DRIFTS, FATES, imagined_figures, read_logs
from dawm.cli.main import main
from dawm.cli.report import log_summary, read_results, write_files

pytestmark = pytest.mark.pictures

REFILLS = {
    "kept": (70, 75), "after_end": (20, 15), "out_of_range": (10, 5), "uncertain": (0, 5), "non_finite": (0, 0),
    "rejected_fraction": (0.125, 0.1), "mean_reward": (1.5, 1.625), "reward_drift": (0.25, 0.375),
    "termination_rate": (0.02, 0.01), "termination_drift": (0.015, 0.005),
}  # fmt: skip
SETTINGS = {
    "seed_everything": 7,
    "stages": {
        "agent": {
            "callbacks": [
                {"class_path": "RegenerateRollouts", "init_args": {"max_rejected": 0.5, "max_reward_drift": None}},
                {"class_path": "Other"},
            ]
        }
    },
}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def write_log(folder: Path, rows: list[dict]) -> str:
    path = folder / "logs" / "version_0" / "metrics.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({key for row in rows for key in row}))
        writer.writeheader()
        writer.writerows(rows)
    return str(folder / "last.ckpt")


@pytest.fixture
def make_run(tmp_path):
    """Writes logs and results as a run leaves them, and the files made of them."""

    def make(
        stages=("world_model", "inverse_dynamics", "agent"), scored=True, seeds=1, refills=REFILLS, settings=SETTINGS,
        dataset="mujoco/hopper/medium-v0", command="python -m dawm fit --config mine.yaml",
    ) -> Path:  # fmt: skip
        run = tmp_path / "run"
        rows = {
            "world_model": [
                {
                    "step": step,
                    "world_model/loss": 2.0 / step,
                    "world_model/validation_observation_error/step_1": 1 / step,
                }
                for step in (10, 20)
            ],
            "inverse_dynamics": [{"step": step, "inverse_dynamics/validation_error": 1 / step} for step in (10, 20)],
            "agent": [
                {"step": 10 * index, **{f"synthetic/{key}": values[index] for key, values in refills.items()}}
                for index in (0, 1)
            ]
            + [{"step": step, "agent/critic_loss": 1 / step, "eval/return": step} for step in range(1, 1201)],
        }
        returns = [[1.0, 3.0]] * seeds if seeds > 1 else [1.0, 3.0]
        score = {"mean": 24.125, "low": 20.0, "high": 30.0} if scored else dict.fromkeys(("mean", "low", "high"))
        data = {"dataset": dataset, "episodes": 6, "transitions": 26, "return": 5.0, "normalized_score": None}
        if scored:
            reference = {"minimum": 0.0, "maximum": 10.0, "source": "made up"}
            data |= {"normalized_score": 50.0, "reference": reference}
        results = {
            "dawm": "0",
            "command": command,
            "seed": 7,
            "data": data,
            "agent": {
                "class": "dawm.agents.TD3BC", "returns": returns,
                "return": {"mean": 2.0, "low": 1.0, "high": 3.0}, "normalized_score": score,
            },
            "stages": {
                name: {"checkpoint": write_log(run / name / "0", rows[name]), "steps": 1200, "seconds": 61.0,
                       "reused": False, "metrics": {}}
                for name in stages
            },
        }  # fmt: skip
        write_files(run, results, settings)
        return run

    return make


def page_of(run: Path) -> str:
    return (run / "report.html").read_text()


def text_of(run: Path) -> str:
    """What a reader sees, in one line."""
    body = re.sub(r"<style>.*?</style>", "", page_of(run), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_fit_names_its_report(smoke, tmp_path, capsys):
    assert main(["fit", "--config", str(smoke)]) == 0
    assert f"report: {tmp_path / 'run' / 'report.html'}" in capsys.readouterr().out.splitlines()[-1]
    text = text_of(tmp_path / "run")
    assert "TD3BC on embedded/ hopper/ medium-replay" in text
    assert "Mean reward of the imagined steps that were kept." in text
    assert read_results(tmp_path / "run")["agent"]["class"] == "dawm.agents.TD3BC"


def test_it_holds_all_there_is_to_know(make_run):
    run = make_run()
    text = text_of(run)
    for part in (
        "TD3BC on mujoco/ hopper/ medium-v0", "Seed 7", "agent's score 24.1 (95 % interval 20.0 to 30.0",
        "data's mean score 50.0 (6 episodes)", "0:03:03 training time", "61.0 s for 1200 updates",
        "Kept at the last one: 75.0 %", "rejected fraction 0.125 0.1 0.5", "reward drift 0.25 0.375 termination",
        "python -m dawm fit --config mine.yaml", "seed_everything: 7", "class_path: RegenerateRollouts",
        "python 3.", "lightning 2.", "numpy", "mujoco", "cores",
    ):  # fmt: skip
        assert part in text, part
    assert page_of(run).count("<img ") == 3 + 2 + 6  # of stages, losses and imagined data
    assert yaml.safe_load((run / "config.yaml").read_text()) == SETTINGS


def test_it_needs_no_network_and_no_script(make_run):
    page = page_of(make_run())
    assert "<script" not in page
    assert not re.findall(r"(?:src|href|url)\s*[=(]\s*(?![\"']?data:)", page)
    assert "default-src 'none'" in page


@pytest.mark.parametrize("scored", [True, False])
def test_agent_alone_without_refills(make_run, scored):
    run = make_run(stages=("agent",), refills={}, scored=scored)
    text = text_of(run)
    assert "it learnt from real data alone" in text
    assert page_of(run).count("<img ") == 2
    assert ("agent's score" in text) == scored
    assert "agent's return 2.0 (95 % interval 1.0 to 3.0)" in text
    assert (run / "curves.png").stat().st_size > 0


def test_each_seed_has_its_row(make_run):
    assert "seed mean return lowest highest 0 2.0 1.0 3.0 1 2.0 1.0 3.0 2 2.0" in text_of(make_run(seeds=3))


def test_names_are_text_and_not_markup(make_run, capsys):
    page = page_of(make_run(dataset="<i>[red]&", command="fit '<script>'"))
    assert "<i>" not in page
    assert "<script" not in page
    assert "&lt;i&gt;[red]&amp;" in page


def test_limits_that_are_no_numbers_draw_no_line(make_run):
    callback = {"class_path": "Mine", "init_args": {"max_rejected": float("inf"), "max_reward_drift": "much"}}
    text = text_of(make_run(settings={"stages": {"agent": {"callbacks": [callback]}}}))
    assert "rejected fraction 0.125 0.1 reward drift" in text


def test_each_reason_to_drop_a_step_has_a_colour_of_its_own():
    logged = {f"synthetic/{name}": ([0, 10], [1.0, 2.0]) for name in (*FATES, *(drift for drift, *_ in DRIFTS))}
    stacked = next(iter(imagined_figures(logged, {}).values()))
    assert len(set(re.findall(r"fill: (#\w+)", stacked)) - {"#ffffff"}) == len(FATES) - 1


def test_half_a_row_of_a_killed_run_is_left_out(tmp_path):
    write_log(tmp_path, [{"step": 10, "a/loss": 1.0, "z/loss": 2.0}])
    path = tmp_path / "logs" / "version_0" / "metrics.csv"
    path.write_text(path.read_text() + "3.0,2")
    assert read_logs(tmp_path)["a/loss"] == ([2, 10], [3.0, 1.0])
    path.write_text(path.read_text() + "0,1e-")
    assert read_logs(tmp_path)["z/loss"] == ([10], [2.0])


def test_summary_holds_the_final_scores(make_run):
    run = make_run(scored=False)

    class Kept:
        def log_metrics(self, metrics, step):
            self.metrics, self.step = metrics, step

        def save(self):
            self.saved = True

        def finalize(self, status):
            self.status = status

    logger = Kept()
    log_summary([logger], json.loads((run / "results.json").read_text()))
    assert logger.metrics == {"final/return": 2.0, "final/return_low": 1.0, "final/return_high": 3.0}
    assert (logger.step, logger.saved, logger.status) == (1200, True, "success")


PROBE = """<body><iframe width="{width}" height="900" style="border: 0" srcdoc="{page}"></iframe><script>
addEventListener("load", () => {{
  const shown = document.querySelector("iframe").contentDocument;
  document.title = JSON.stringify({{width: shown.documentElement.clientWidth,
    content: shown.documentElement.scrollWidth, images: [...shown.images].map(image => image.naturalWidth)}});
}})</script></body>"""  # a window of Chromium's is never narrower than 500 pixels, a frame is


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; on Debian: apt-get install chromium")
def test_a_browser_shows_all_images_and_nothing_sticks_out(make_run, tmp_path):
    page = page_of(make_run(seeds=3, dataset="a/data_set_of_a_long_name_that_has_no_place_to_break-v0"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    for width in (390, 1280):
        probed = tmp_path / "probed.html"
        probed.write_text(PROBE.format(width=width, page=html.escape(page)))
        shown = subprocess.run(
            [BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900", "--dump-dom",
             probed.as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        found = json.loads(html.unescape(re.findall("<title>(.*?)</title>", shown.stdout)[0]))
        assert width - 20 <= found["width"] <= width  # a scroll bar takes the rest
        assert found["content"] <= found["width"]
        assert len(found["images"]) == 11
        assert all(natural > 0 for natural in found["images"])
