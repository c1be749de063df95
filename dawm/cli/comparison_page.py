"""A comparison of methods in the terminal, as tables, as a picture, and as a page of both, ``page.html``."""

import csv
import html
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from dawm.cli.comparison import NUMBERS, Comparison
from dawm.cli.curves import picture, svg
from dawm.cli.html import figures, page, section, table
from dawm.evaluation.statistics import mean_interval
from dawm.files import write_whole

__all__ = ["markdown", "show_comparison", "write_comparison"]


def show_comparison(console: Console, folder: Path, comparison: Comparison) -> None:
    """Prints the tables, and where the page is."""
    for title, head, rows in comparison.tables()[:-1]:
        printed = Table(*(Column(escape(name), overflow="fold") for name in head), title=title, title_style="bold")
        for row, following in zip(rows, [*rows[1:], rows[-1]]):
            printed.add_row(*map(escape, row), end_section=head[0] == "data set" and row[0] != following[0])
        console.print(printed)
    files = f"page: {folder}/page.html (beside it table.md, table.csv, scores.png, results/)"
    console.print(f"{comparison.finished()}; {files}", soft_wrap=True, markup=False, highlight=False)


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Writes ``table.md``, ``table.csv``, ``scores.png`` and ``page.html``."""
    tables = comparison.tables()
    write_whole(folder / "table.md", "\n".join(markdown(*entry) for entry in tables))
    text = io.StringIO()
    blank = [["" if number != number else number for number in row] for row in comparison.numbers()]  # of NaN
    csv.writer(text).writerows([NUMBERS, *blank])
    write_whole(folder / "table.csv", text.getvalue())
    picture(
        folder / "scores.png", [partial(_bars, comparison=comparison, dataset=name) for name in comparison.datasets]
    )
    body = [section(title, table(rows, head)) for title, head, rows in tables]
    note = [section("Note", f"<p>{html.escape(comparison.note)}</p>")] if comparison.note else []
    reading = section("How to read it", f"<p>{html.escape(comparison.explanation())}</p>")
    pictures = section("Pictures", figures(_drawings(comparison)))
    parts = [*note, body[0], reading, pictures, *body[1:], _repeat(comparison)]
    write_whole(folder / "page.html", page("Comparison of methods", comparison.finished(), parts))


def _drawings(comparison: Comparison) -> dict[str, str]:
    """Pictures of each data set, as SVG by description."""
    drawings = {}
    for dataset in comparison.datasets:
        caption = "scores at the end, a tick for each seed, with 95 % intervals of their mean; dashed: the data's mean."
        drawings[f"{dataset}: {caption}"] = svg(partial(_bars, comparison=comparison, dataset=dataset))
        if any(comparison.curve(method, dataset)[0] for method in comparison.methods):
            caption = "scores while training, with 95 % intervals of their mean."
            drawings[f"{dataset}: {caption}"] = svg(partial(_curves, comparison=comparison, dataset=dataset))
    return drawings


def _repeat(comparison: Comparison) -> str:
    """Command, settings by method, versions and hardware."""
    parts = [f'<pre class="wrap">{html.escape(comparison.command)}</pre>']
    for method in comparison.methods:
        settings = next(result for result in comparison.results if result["method"] == method)["settings"]
        text = html.escape(yaml.safe_dump(settings, sort_keys=False))
        parts.append(f"<details><summary>Settings of {html.escape(method)}</summary><pre>{text}</pre></details>")
    for kind, found in (("Versions", "versions"), ("Hardware", "hardware")):
        lines = Counter(_line(result[found]) for result in comparison.results)
        parts += [f"<p>{kind} of {count} cells: {html.escape(line)}</p>" for line, count in lines.items()]
    return section("Repeat it", *parts)


def _line(found: str | Mapping[str, str]) -> str:
    return found if isinstance(found, str) else ", ".join(f"{name} {version}" for name, version in found.items())


def markdown(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A titled table."""
    lines = [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _bars(axis: Any, comparison: Comparison, dataset: str) -> None:
    """One bar for each method, with its seeds."""
    methods = [method for method in reversed(comparison.methods) if comparison.of(method, dataset)]
    for height, method in enumerate(methods):
        interval, scores = comparison.mean(method, dataset), comparison.scores(method, dataset)
        axis.barh(height, interval.value, height=0.6, color="#4477aa", alpha=0.5)
        axis.plot(scores, np.full(len(scores), height - 0.18), "|", color="#4477aa")
        axis.plot([interval.low, interval.high], [height, height], color="#1d2733", linewidth=2)
    axis.set_yticks(range(len(methods)), methods)
    unit, data = comparison.unit(dataset), comparison.of(methods[0], dataset)[0]["data"]
    axis.axvline(data["normalized_score" if unit == "score" else "return"], color="grey", linestyle="--")
    axis.set(title=dataset.replace("+", "\n+ "), xlabel=unit)


def _curves(axis: Any, comparison: Comparison, dataset: str) -> None:
    """One curve for each method, with its band."""
    for method in comparison.methods:
        steps, scores = comparison.curve(method, dataset)
        if steps:
            bands = [mean_interval(row) for row in comparison.independent(method, dataset, scores)]
            (line,) = axis.plot(steps, [band.value for band in bands], marker=".", label=method)
            low, high = [band.low for band in bands], [band.high for band in bands]
            axis.fill_between(steps, low, high, alpha=0.15, color=line.get_color())
    axis.set(title="while training", xlabel="updates", ylabel=comparison.unit(dataset))
    axis.legend(fontsize="small")
