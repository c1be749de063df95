"""What each part of dawm-plus on AW brings: one part changed at a time, a panel for each part.

    python -m benchmarks.ablation --dataset dawm/halfcheetah/medium-v0 --output_dir runs/ablation-halfcheetah
    python -m benchmarks.ablation --dataset dawm/halfcheetah/medium-v0 --output_dir runs/ablation-halfcheetah --show

The arms are methods of one `compare` (an overlay each, written into the folder), which trains what is missing and may
be stopped at any moment. All of them take some five hours on one core; ``--parts`` selects. Panels are drawn of the
arms that are finished. What follows ``--`` are options of ``fit`` for every arm.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure

from dawm.callbacks import RegenerateRollouts
from dawm.cli.main import main as dawm
from dawm.data.module import TransitionDataModule
from dawm.evaluation.statistics import mean_interval
from dawm.synthesis.guards import DataStatistics
from dawm.synthesis.rollouts import Drawn, Rollouts, Synthesizer

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "lightning_configs" / "methods"
SHARED = ROOT / "lightning_configs" / "d4rl-locomotion.yaml", ROOT / "benchmarks" / "evidence" / "locomotion.yaml"
BASE = f"{METHODS}/aw.yaml+{METHODS}/dawm-plus.yaml"
Change = Mapping[str, Any]


class Endless(Synthesizer):
    """A `Synthesizer` without termination channel: no imagined step ends the task."""

    def judge(self, drawn: Drawn) -> Rollouts:
        """As of the class above, whatever the models say of ends."""
        never = torch.zeros_like(drawn.ends)
        return super().judge(drawn._replace(ends=never, imagined_ends=never))


class EndlessRollouts(RegenerateRollouts):
    """Imagines with `Endless`."""

    def synthesizer(self, data: TransitionDataModule, statistics: DataStatistics) -> Synthesizer:
        """As of the class above, with its settings."""
        return Endless(**vars(super().synthesizer(data, statistics)))


def rollouts(**settings: Any) -> Change:
    """Other settings of the callback that imagines."""
    return {"rollouts": settings}


def agent(**settings: Any) -> Change:
    """Other settings of TD3+BC."""
    return {"agent": {"class_path": "TD3BC", "init_args": settings}}


def target(name: str, **settings: Any) -> Change:
    """Another return-to-go to aim at."""
    return rollouts(target_return={"class_path": name, "init_args": settings})


PARTS: dict[str, dict[str, Change | None]] = {  # None is dawm-plus on AW as it is
    "labels": {"imagined": rollouts(labels="imagined"), "forward": None},
    "target return": {"own": rollouts(target_return=None), "quantile 0.9": target("QuantileReturn"), "feasible": None},
    "starts and real rows": {"uniform": {"data": {"real_weights": None}}, "AW": None},
    "first action": {"recorded": rollouts(first_action="recorded"), "policy": None},
    "filter": {
        "none": rollouts(max_inconsistency=None),
        "consistent 0.9": rollouts(max_inconsistency=0.9),
        "consistent 0.99": None,
        "certain 0.99": rollouts(max_inconsistency=None, max_forward_disagreement=0.99),
    },
    "termination channel": {"without": {"callback": f"benchmarks.ablation.{EndlessRollouts.__name__}"}, "with": None},
    "cloning": {"all rows": agent(clone_real_only=False), "real rows": None},
    "alpha": {"1": agent(alpha=1.0), "2.5": None, "10": agent(alpha=10.0), "40": agent(alpha=40.0)},
    "horizon": {str(h): None if h == 8 else {"horizon": h} for h in (1, 2, 4, 8, 16)},
    "synthetic fraction": {
        "0": {"data": {"synthetic_fraction": 0.0}, "rollouts": None},
        "0.25": {"data": {"synthetic_fraction": 0.25}},
        "0.5": {"data": {"synthetic_fraction": 0.5}},
        "0.75": None,
        "1, all cloned": {"data": {"synthetic_fraction": 1.0}, **agent(clone_real_only=False, scale_on_real=False)},
    },
    "guidance": {"1": None, "1.5": rollouts(guidance=1.5), "3": rollouts(guidance=3.0)},
    "pessimism": {"0": None, **{str(by): rollouts(pessimism=by, max_reward_drift=5.0) for by in (20, 50, 100)}},
    "updates between refills": {
        "1000": rollouts(every_n_steps=1000),
        "5000": None,
        "20000": rollouts(every_n_steps=20_000),
    },
}


def name_of(part: str, label: str) -> str:
    """Of an arm's overlay."""
    return f"{part}-{label}".replace(",", "").replace(" ", "-")


def write_arms(parts: Sequence[str], folder: Path) -> list[str]:
    """Writes the arms' overlays; the methods of `compare`, the unchanged one first."""
    dawm_plus = yaml.safe_load((METHODS / "dawm-plus.yaml").read_text())
    imagining, evaluating = dawm_plus["stages"]["agent"]["callbacks"]
    folder.mkdir(parents=True, exist_ok=True)
    methods = [BASE]
    for part in parts:
        for label, change in PARTS[part].items():
            if change is None:
                continue
            overlay = {key: value for key, value in change.items() if key not in ("rollouts", "callback")}
            if overlay.keys() != change.keys():  # a list of callbacks is given whole
                callbacks, settings = [evaluating], change.get("rollouts", {})
                if settings is not None:
                    kind, arguments = change.get("callback", imagining["class_path"]), imagining["init_args"]
                    callbacks = [{"class_path": kind, "init_args": arguments | settings}, evaluating]
                overlay["stages"] = {"agent": {"callbacks": callbacks}}
            path = folder / f"{name_of(part, label)}.yaml"
            path.write_text(yaml.safe_dump(overlay))
            methods.append(f"{BASE}+{path}")
    return methods


def scores(results: Path, part: str, label: str) -> list[float]:
    """An arm's scores, a seed each; none where it is not finished."""
    arm = "aw+dawm-plus" + ("" if PARTS[part][label] is None else f"+{name_of(part, label)}")
    return [score for file in results.glob(f"{arm}/*/0.json") for score in json.loads(file.read_text())["scores"]]


def draw(results: Path, path: Path, title: str) -> None:
    """A panel for each part of which an arm beside the unchanged one is finished."""
    found = {part: {label: scores(results, part, label) for label in PARTS[part]} for part in PARTS}
    shown = {part: arms for part, arms in found.items() if sum(map(bool, arms.values())) > 1}
    if not shown:
        return
    rows = -(-len(shown) // 4)
    figure = Figure(figsize=(14, 0.4 + 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, sharey=True, squeeze=False).ravel()
    for axis, (part, arms) in zip(axes, shown.items()):
        for place, (label, values) in enumerate(arms.items()):
            colour = "#cc6677" if PARTS[part][label] is None else "#4477aa"
            if values:
                interval = mean_interval(values)
                axis.plot([place, place], [interval.low, interval.high], color=colour, linewidth=2)
                axis.plot(place, interval.value, "o", color=colour)
                axis.plot([place + 0.15] * len(values), values, "_", color=colour)
        axis.set_xticks(range(len(arms)), [label.replace(" ", "\n") for label in arms], fontsize="small")
        axis.set_xlim(-0.5, len(arms) - 0.5)
        axis.set_title(part)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    figure.suptitle(title)
    figure.savefig(path, dpi=90)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--updates", type=int, default=20_000, help="of the agent")
    parser.add_argument("--show", action="store_true", help="draw what is finished")
    options, rest = parser.parse_known_args(argv)
    code = 0
    if not options.show:
        code = dawm([
            "compare", "--config", *map(str, SHARED),
            "--methods", *write_arms(options.parts, options.output_dir / "arms"), "--datasets", options.dataset,
            "--seeds", str(options.seeds), "--workers", str(options.workers), "--output_dir", str(options.output_dir),
            "--", "--stages.agent.max_steps", str(options.updates), "--final_episodes", "20",
            *(option for option in rest if option != "--"),
        ])  # fmt: skip
    title = f"{options.dataset}: dawm-plus on AW (red), one part changed; score, 95 % intervals, a dash for each seed"
    draw(options.output_dir / "results", options.output_dir / "ablation.png", title)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
