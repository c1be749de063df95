"""``report.html``: all there is to know about a run, in one file that needs no network and no script."""

import base64
import datetime
import html
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import torch
import yaml

from dawm import __version__
from dawm.cli.curves import DRIFTS, Curve, imagined_figures, learning_figures, read_logs
from dawm.files import write_whole

__all__ = ["figures", "hardware", "page", "processor", "section", "table", "versions", "write_report"]

LIBRARIES = ("torch", "lightning", "gymnasium", "minari", "mujoco", "numpy")

NOTHING_IMAGINED = "The agent's logs show none: it learnt from real data alone, or was trained in another run."
REUSED = """<p class="soft">Complete stages in the run's folder are reused; another <code>--output_dir</code> trains
them all.</p>"""


def write_report(
    folder: Path, results: Mapping[str, Any], settings: Mapping[str, Any], command: str, rows: Iterable[Sequence[str]],
    fidelity: str = "",
) -> None:  # fmt: skip
    """Writes ``report.html`` into the run's folder; the rows are the final table's, label and value of each.

    ``fidelity`` is the section that `diagnose` adds.
    """
    title = html.escape(f"{results['agent']['class'].split('.')[-1]} on {results['data']['dataset']}")
    logs, limits = read_logs(Path(results["stages"]["agent"]["checkpoint"]).parent), _limits(settings)
    imagined = imagined_figures(logs, limits)
    about_imagined = (figures(imagined), _refills(logs, limits)) if imagined else (f"<p>{NOTHING_IMAGINED}</p>",)
    config = html.escape(yaml.safe_dump(dict(settings), sort_keys=False))
    body = [
        _cards(results),
        section("Results", table(rows), _seeds(results)),
        section("Learning curves", figures(learning_figures(results))),
        section("Imagined data", *about_imagined),
        *([fidelity] if fidelity else []),
        section("Repeat it", f'<pre class="wrap">{html.escape(command)}</pre>', REUSED,
                 f"<details><summary>All settings (config.yaml)</summary><pre>{config}</pre></details>"),
        section("Versions and hardware", table(versions()), f"<p>{html.escape(hardware())}</p>"),
    ]  # fmt: skip
    write_whole(folder / "report.html", page(title, f"Seed {results['seed']}", body))


def page(title: str, subtitle: str, body: Iterable[str]) -> str:
    """A whole page of sections; the title is HTML."""
    subtitle = f"{subtitle}, written {datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    template = Template(files("dawm.cli").joinpath("report_template.html").read_text())
    heading = title.replace("/", "/<wbr>")
    return template.substitute(title=title, heading=heading, subtitle=subtitle, body="\n".join(body))


def section(title: str, *parts: str) -> str:
    """A part of a page; its parts are HTML."""
    return f"<section>\n<h2>{title}</h2>\n" + "\n".join(parts) + "\n</section>"


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table whose first column names the rows; it scrolls in a box of its own where it is too wide."""
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)] if head else []
    for label, *cells in rows:
        values = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f"<th>{html.escape(label)}</th>{values}")
    return '<div class="scroll"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def figures(drawings: Mapping[str, str]) -> str:
    """SVG images with their descriptions; as images, since the ids inside two inlined drawings would meet."""
    parts = []
    for caption, svg in drawings.items():
        text, data = html.escape(caption), base64.b64encode(svg.encode()).decode()
        parts.append(
            f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{data}"><figcaption>{text}</figcaption></figure>'
        )
    return '<div class="figures">' + "\n".join(parts) + "</div>"


def _cards(results: Mapping[str, Any]) -> str:
    """The figures one looks for first."""
    scored = results["data"]["normalized_score"] is not None
    key, word = ("normalized_score", "score") if scored else ("return", "return")
    agent, seconds = results["agent"][key], sum(stage["seconds"] for stage in results["stages"].values())
    cards = [
        (f"{agent['mean']:.1f}", f"agent's {word}, 95 % interval {agent['low']:.1f} to {agent['high']:.1f}"),
        (f"{results['data'][key]:.1f}", f"data's mean {word}, {results['data']['episodes']:,} episodes"),
        (str(datetime.timedelta(seconds=round(seconds))), "training time of all stages"),
    ]
    return '<div class="cards">' + "".join(f"<div><b>{a}</b><span>{b}</span></div>" for a, b in cards) + "</div>"


def _seeds(results: Mapping[str, Any]) -> str:
    """The mean return of each of several seeds."""
    returns = results["agent"]["returns"]
    if not isinstance(returns[0], list):
        return ""
    figures = ((sum(each) / len(each), min(each), max(each)) for each in returns)
    rows = [(str(seed), *(f"{value:.1f}" for value in values)) for seed, values in enumerate(figures)]
    return table(rows, ("seed", "mean return", "lowest", "highest"))


def _limits(settings: Mapping[str, Any]) -> dict[str, float]:
    """The limits that the agent's callbacks warn of, such as ``max_reward_drift``."""
    given = [callback.get("init_args") or {} for callback in settings["stages"]["agent"]["callbacks"] or []]
    limits = {key: value for arguments in given for key, value in arguments.items() if key.startswith("max_")}
    return {key: value for key, value in limits.items() if isinstance(value, int | float) and math.isfinite(value)}


def _refills(logs: Mapping[str, Curve], limits: Mapping[str, float]) -> str:
    """What the first and the last refill were like."""
    limit_of = {name: limits.get(limit) for name, limit, _ in DRIFTS}
    rows = []
    for metric, (_, values) in logs.items():
        if metric.startswith("synthetic/"):
            name = metric.removeprefix("synthetic/")
            rows.append((name.replace("_", " "), *map(_figure, (values[0], values[-1], limit_of.get(name)))))
    note = '<p class="soft">The first and the last refill; beyond its limit a figure gives a warning.</p>'
    return table(rows, ("metric", "first", "last", "limit")) + note


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def versions() -> list[tuple[str, str]]:
    """Versions of all that a result may depend on."""
    libraries = [(library, metadata.version(library)) for library in LIBRARIES]
    return [("dawm", __version__), ("python", platform.python_version()), *libraries]


def processor() -> str:
    """This machine's processor."""
    try:
        names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return (*names, platform.processor() or platform.machine())[0]


def hardware() -> str:
    """Processor, cores and GPU of this machine, in one line."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join([f"{processor()}, {os.cpu_count()} cores", *(gpus or ["no GPU"]), platform.platform()])
