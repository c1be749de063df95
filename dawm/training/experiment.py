"""Experiment: the three stages in order, in one process or one DDP group, and their results.

A stage is trained in ``<folder>/<stage>/<key>/``, where the key is a hash of all that its result depends on: data,
settings, seed, and the stages before it. So a complete stage is reused, an interrupted one is resumed, and a changed
setting trains beside the old result instead of over it.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger
from rich.console import Console

from dawm import __version__
from dawm.data.batches import derive_seed
from dawm.data.module import TransitionDataModule
from dawm.errors import UserError, require
from dawm.files import expanded, hash_of, write_whole
from dawm.training.build import build_module, sources_of
from dawm.training.checkpoints import LAYOUT, ORIGIN, previous_of, read_checkpoint
from dawm.training.ranks import end_with_first_rank, only_run_in
from dawm.training.save_checkpoint import SaveCheckpoint, remove_requeue_checkpoints
from dawm.training.stage import Stage
from dawm.training.trainer import make_trainer
from dawm.training.updates import UpdateModule

__all__ = ["Experiment", "StageResult"]

ANY_LENGTH = "any_length.txt"  # in a stage's folder: its key without ``max_steps``, which a longer training can follow


@dataclass
class StageResult:
    """What a finished stage leaves."""

    checkpoint: str  # the last
    steps: int
    seconds: float  # of training, over all starts of the run
    reused: bool  # complete before this run
    metrics: dict[str, float]  # of the last validation
    unit: str = "updates"  # what ``steps`` counts; of a plain LightningModule it is training steps


@dataclass
class Experiment:
    """Trains the stages and keeps their results."""

    data: TransitionDataModule  # already set up
    settings: Mapping[str, Any]  # all of the experiment, as plain values
    folder: Path  # of the stages
    environment: Any  # what checkpoints say of the evaluation environment, plain values
    loggers: Sequence[Logger]  # besides CSV and TensorBoard
    console: Console
    shared: bool = False  # whether other runs may train the same stages in the folder
    results: dict[str, StageResult] = field(default_factory=dict, init=False)
    rank: int = field(default=0, init=False)
    waited: float = field(default=0.0, init=False)  # seconds, while other runs trained stages that this one reuses
    _keys: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Takes the seed from the settings."""
        self.folder = self.folder.resolve()
        self.seed: int = self.settings["seed_everything"]

    def build(self, stage: Stage) -> L.LightningModule:
        """The stage's module, untrained."""
        # a seed for each stage, so that a reused stage leaves the next one as it would have been
        L.seed_everything(derive_seed(self.seed, stage.name) % 2**32, verbose=False)
        module = build_module(self.settings[stage.name], self.data.observation_size, self.data.action_size)
        if isinstance(module, UpdateModule):
            module.matmul_precision = self.settings["matmul_precision"]
        stage.check(module, self.data.updates_per_step)
        return module

    def run(self, stage: Stage, trained: Mapping[str, L.LightningModule]) -> L.LightningModule:
        """Trains one stage, or takes it from where it is complete: its module in evaluation mode, on the CPU."""
        module = self.build(stage)
        stage.connect(trained)
        if stage.ckpt_path is not None:
            path = expanded(stage.ckpt_path)
            checkpoint = read_checkpoint(path)
            self._load(module, checkpoint, path, f"stages.{stage.name}.ckpt_path")
            self._keys[stage.name] = hash_of(path)
            self.results[stage.name] = StageResult(str(path), checkpoint["global_step"], 0.0, True, {})
            return module.eval()
        if stage.init_from is not None:
            path = expanded(stage.init_from)
            self._load(module, read_checkpoint(path), path, f"stages.{stage.name}.init_from")
            if isinstance(module, UpdateModule):
                module.forget_best()
        self._keys[stage.name] = self.key(stage)
        folder = self.folder / stage.name / self._keys[stage.name][:8]
        waits = f"{stage.name}: waits for another run that trains it in {folder}"
        say = partial(self.console.print, waits, soft_wrap=True, markup=False)
        start = time.monotonic()
        with only_run_in(folder, wait=True, create=True, say=say) if self.shared else nullcontext():
            self.waited += time.monotonic() - start
            self._train_or_reuse(stage, module, folder)
        return module.cpu().eval()

    def _train_or_reuse(self, stage: Stage, module: L.LightningModule, folder: Path) -> None:
        complete, last = folder / "complete.json", folder / "last.ckpt"
        try:
            checkpoint = read_checkpoint(last) if complete.exists() else None
        except UserError:  # damaged or gone: training goes on from the one before, and says so
            complete.unlink(missing_ok=True)
            checkpoint = None
        if checkpoint is None:
            self.results[stage.name] = self._train(stage, module, folder)
            return
        self._load(module, checkpoint, last, f"stages.{stage.name}")
        done = json.loads(complete.read_text()) | {"checkpoint": str(last), "reused": True}
        self.results[stage.name] = StageResult(**done)
        self.console.print(f"{stage.name}: reused from {folder}", soft_wrap=True, markup=False)

    def key(self, stage: Stage, max_steps: int | None = None) -> str:
        """Hash of all that the stage's result depends on; ``max_steps`` 0 in place of its own leaves the length out."""
        parts = stage.hashed(self.settings)
        if max_steps is not None:
            parts["stage"] = parts["stage"] | {"max_steps": max_steps}
        parts |= {
            "fingerprint": self.data.episodes.fingerprint, "seed": self.seed, "version": __version__, "layout": LAYOUT,
            "before": [self._keys[name] for name in stage.after if name in self._keys],
            "init_from": None if stage.init_from is None else hash_of(expanded(stage.init_from)),
            "sources": sources_of(parts),
        }  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def _train(self, stage: Stage, module: L.LightningModule, folder: Path) -> StageResult:
        last = folder / "last.ckpt"
        save = SaveCheckpoint(last, stage.checkpoint_every_n_steps, self._origin(stage), stage.keep_every_n_steps)
        trainer = make_trainer(stage, module, folder, save, self.settings, self.loggers, self.console)
        alone, expected = trainer.world_size == 1 or not self.shared, "None where several devices train one run"
        require("stages_dir", str(self.folder), alone, expected, "leave it out")  # a rank would wait for the lock alone
        end_with_first_rank(trainer)
        self.rank = trainer.global_rank
        # the run's own loggers have all settings already, and some refuse a module's under the same names again
        module._log_hyperparams = False
        for logger in trainer.loggers[:2]:
            logger.log_hyperparams(self.settings[stage.name])
        resume = self._resume_from(stage, last) or self._extend(stage, module, last)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / ANY_LENGTH, self.key(stage, 0) + "\n")
        trainer.fit(module, datamodule=self.data, ckpt_path=resume, weights_only=True)
        metrics: dict[str, float] = {}
        if isinstance(module, UpdateModule) and trainer.enable_validation:
            validated = trainer.validate(module, datamodule=self.data, verbose=False)
            metrics = {key: value for found in validated for key, value in found.items() if key != "step"}
        unit = "updates" if isinstance(module, UpdateModule) else "training steps"
        result = StageResult(str(last), trainer.global_step, save.seconds, False, metrics, unit)
        if trainer.is_global_zero and last.exists():  # Lightning's fast_dev_run saves nothing
            write_whole(folder / "complete.json", json.dumps(asdict(result), indent=2) + "\n")
        return result

    def _resume_from(self, stage: Stage, last: Path) -> Path | None:
        """The last checkpoint of an interrupted stage, or the one before where the last is damaged."""
        remove_requeue_checkpoints(last.parent)
        refused = ""
        # last again: the first rank may have put the one before in its place while another rank was reading
        for path in (last, previous_of(last), last):
            if path.exists():
                try:
                    read_checkpoint(path)
                except UserError as error:
                    refused = str(error)
                    self.console.print(f"{stage.name}: {error}", style="yellow", markup=False, soft_wrap=True)
                else:
                    self.console.print(f"{stage.name}: resuming from {path}", soft_wrap=True, markup=False)
                    if self.rank == 0:
                        os.replace(path, last)  # instead of a damaged one; all ranks wait for each other before loading
                    return last
        if refused:
            raise UserError(
                f"--output_dir: got {last.parent}, where no checkpoint can be loaded, expected one to resume from; "
                f"delete that folder to train {stage.name} from the start ({refused.partition('; ')[0]})"
            )
        return None

    def _extend(self, stage: Stage, module: L.LightningModule, last: Path) -> Path | None:
        """The last checkpoint of the same stage with fewer updates, if there is one that more updates can follow."""
        wanted, notes = self.key(stage, 0), last.parent.parent.glob(f"*/{ANY_LENGTH}")
        same = [note.with_name(last.name) for note in notes if note.read_text().strip() == wanted]
        done = [(_steps_of(other), other) for other in same]
        steps, shorter = max((found for found in done if 0 < found[0] < stage.max_steps), default=(0, last))
        if not steps:
            return None
        if getattr(module, "schedule_follows_max_steps", False):
            self.console.print(
                f"{stage.name}: training from the start, not after {steps} updates of {shorter}, because the learning "
                "rate follows max_steps; to start from those weights set "
                f"--stages.{stage.name}.init_from {shorter}", soft_wrap=True, markup=False
            )  # fmt: skip
            return None
        self.console.print(
            f"{stage.name}: resuming from {shorter}, after {steps} updates", soft_wrap=True, markup=False
        )
        if self.rank == 0:
            last.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(shorter, last.with_name(".shorter"))
            os.replace(last.with_name(".shorter"), last)
        return shorter

    def _origin(self, stage: Stage) -> dict[str, Any]:
        """What a checkpoint says of where it comes from; plain values only."""
        episodes = self.data.episodes
        return {
            "dawm": __version__, "layout": LAYOUT,
            "stage": stage.name, "module": self.settings[stage.name],
            "observation_size": self.data.observation_size, "action_size": self.data.action_size,
            "dataset": episodes.name, "fingerprint": episodes.fingerprint,
            "environment": self.environment, "max_episode_steps": self.data.max_episode_steps,
            "action_space": [episodes.action_space.low.tolist(), episodes.action_space.high.tolist()],
            "reference": None if episodes.reference is None else asdict(episodes.reference),
        }  # fmt: skip

    def _load(self, module: L.LightningModule, checkpoint: Mapping[str, Any], path: Path, setting: str) -> None:
        origin = checkpoint.get(ORIGIN, {})
        if origin.get("fingerprint") != self.data.episodes.fingerprint and not setting.endswith("init_from"):
            trained_on = origin.get("dataset", "unknown data")
            raise UserError(
                f"--{setting}: got {path}, trained on {trained_on!r}, expected one of {self.data.dataset!r} as it is "
                "now; name another, or leave it out to train the stage"
            )
        try:
            module.load_state_dict(checkpoint["state_dict"])
        except (RuntimeError, KeyError) as error:
            expected = f"weights of the networks in the settings ({' '.join(str(error).split())[:150]})"
            raise UserError(f"--{setting}: got {path}, expected {expected}; name another") from None


def _steps_of(path: Path) -> int:
    """Updates after which a checkpoint was saved; 0 where there is none that can be read."""
    try:
        return int(read_checkpoint(path)["global_step"])
    except UserError:
        return 0
