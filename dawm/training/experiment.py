"""Experiment: the three stages in order, in one process or one DDP group, and their results.

A stage is trained in ``<output_dir>/<stage>/<key>/``, where the key is a hash of all that its result depends on: data,
settings, seed, and the stages before it. So a stage that is complete is reused, an interrupted one goes on where it
was, and a changed setting starts anew beside the old result instead of over it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from dawm import __version__
from dawm.agents import OfflineAgent
from dawm.data.batches import derive_seed
from dawm.data.module import TransitionDataModule
from dawm.errors import UserError
from dawm.training.checkpoints import (
    LAYOUT,
    ORIGIN,
    AtomicCheckpointIO,
    SaveCheckpoint,
    previous_of,
    read_checkpoint,
    remove_requeue_checkpoints,
    write_whole,
)
from dawm.training.progress import StageProgress
from dawm.training.ranks import end_with_first_rank
from dawm.training.stage import Stage, Stages
from dawm.training.updates import UpdateModule

__all__ = ["Experiment", "StageResult"]

Build = Callable[[int, int], L.LightningModule]


@dataclass
class StageResult:
    """What a finished stage leaves behind.

    Args:
        checkpoint: Its last checkpoint.
        steps: Updates trained.
        seconds: Seconds of training, over all starts of the run.
        reused: Whether it was complete before this run.
        metrics: Its last validation metrics.
    """

    checkpoint: str
    steps: int
    seconds: float
    reused: bool
    metrics: dict[str, float]


class Experiment:
    """Trains the stages and keeps what they give.

    Args:
        data: The data, already set up.
        stages: What differs between the stages.
        trainer: Lightning Trainer settings that hold for all stages.
        settings: Per stage, the plain settings its result depends on besides the data and the stages before it.
        output_dir: Folder of the run.
        seed: Seed of everything.
        console: Where to draw progress.
        cuda_graphs: Run the updates of each training step as one CUDA graph, where that can be.
    """

    def __init__(
        self,
        data: TransitionDataModule,
        stages: Stages,
        trainer: Mapping[str, Any],
        settings: Mapping[str, Any],
        output_dir: Path,
        seed: int,
        console: Console,
        cuda_graphs: bool = False,
    ) -> None:
        self.data = data
        self.stages = stages
        self.trainer_settings = dict(trainer)
        self.settings = settings
        self.output_dir = output_dir
        self.seed = seed
        self.console = console
        self.cuda_graphs = cuda_graphs
        self.results: dict[str, StageResult] = {}
        self.rank = 0
        self._keys: list[str] = []

    def run_stage(self, name: str, build: Build) -> L.LightningModule:
        """Trains one stage, or takes it from where it is complete.

        Args:
            name: ``world_model``, ``inverse_dynamics`` or ``agent``.
            build: Makes the untrained module from observation size and action size.

        Returns:
            The trained module, in evaluation mode, on the CPU.
        """
        stage: Stage = getattr(self.stages, name)
        # a seed for each stage, so that a reused stage leaves the next one as it would have been
        L.seed_everything(derive_seed(self.seed, name) % 2**32, verbose=False)
        module = build(self.data.observation_size, self.data.action_size)
        if isinstance(module, UpdateModule):
            module.cuda_graphs = self.cuda_graphs
        if stage.ckpt_path is not None:
            checkpoint = self._load(module, Path(stage.ckpt_path), f"stages.{name}.ckpt_path")
            self._keys.append(hashlib.sha256(Path(stage.ckpt_path).read_bytes()).hexdigest())
            self.results[name] = StageResult(stage.ckpt_path, checkpoint["global_step"], 0.0, True, {})
            return module.eval()
        key = self._key(name, stage)
        self._keys.append(key)
        folder = self.output_dir.resolve() / name / key[:8]
        last, complete = folder / "last.ckpt", folder / "complete.json"
        if complete.exists():
            checkpoint = self._load(module, last, f"the reused {name}")
            done = json.loads(complete.read_text())
            self.results[name] = StageResult(
                str(last), checkpoint["global_step"], done["seconds"], True, done["metrics"]
            )
            self.console.print(f"{name}: reused from {folder}")
            return module.eval()
        self._fit_normalizers(name, module)
        self.results[name] = self._train(name, stage, module, folder)
        return module.cpu().eval()

    # One stage

    def _train(self, name: str, stage: Stage, module: L.LightningModule, folder: Path) -> StageResult:
        last = folder / "last.ckpt"
        save = SaveCheckpoint(last, stage.checkpoint_every_n_steps, self._origin(name))
        trainer = self._trainer(name, stage, module, folder, save)
        end_with_first_rank(trainer)
        self.rank, rank, world_size = trainer.global_rank, trainer.global_rank, trainer.world_size
        self.data.to(trainer.strategy.root_device)  # batches are drawn where they are used
        loaders: dict[str, Any] = {"datamodule": self.data}
        validation: Iterable[Any] | None = None
        if name == "world_model":
            validation = self.data.validation_segment_loader(rank, world_size)
            loaders = {"train_dataloaders": self.data.segment_loader(stage.max_steps, rank)}
        elif name == "inverse_dynamics":
            validation = self.data.validation_transition_loader(rank, world_size)
            loaders = {"train_dataloaders": self.data.transition_loader(stage.max_steps, rank)}
        if validation is not None:
            loaders["val_dataloaders"] = validation
        resume = self._resume_from(name, last)
        trainer.fit(module, **loaders, ckpt_path=resume, weights_only=True)
        metrics: dict[str, float] = {}
        if validation is not None:
            metrics = {k: v for k, v in trainer.validate(module, validation, verbose=False)[0].items() if k != "step"}
        result = StageResult(str(last), trainer.global_step, save.seconds, False, metrics)
        if trainer.is_global_zero:
            write_whole(folder / "complete.json", json.dumps(asdict(result), indent=2) + "\n")
        return result

    def _resume_from(self, name: str, last: Path) -> Path | None:
        """The last checkpoint of an interrupted stage, or the one before where the last is damaged."""
        remove_requeue_checkpoints(last.parent)
        # last again: the first rank may have put the one before in its place while another rank was reading
        for path in (last, previous_of(last), last):
            if path.exists():
                try:
                    read_checkpoint(path)
                except UserError as error:
                    self.console.print(f"{name}: {error}", style="yellow", markup=False)
                else:
                    self.console.print(f"{name}: going on from {path}")
                    if self.rank == 0:
                        os.replace(path, last)  # instead of a damaged one; all ranks wait for each other before loading
                    return last
        return None

    def _trainer(
        self, name: str, stage: Stage, module: L.LightningModule, folder: Path, save: SaveCheckpoint
    ) -> L.Trainer:
        chunk = self.data.updates_per_step
        callbacks: list[L.Callback] = [*stage.callbacks, StageProgress(name.replace("_", " "), self.console), save]
        if stage.patience is not None:
            monitor = f"{name}/validation_error"
            callbacks.append(EarlyStopping(monitor, patience=stage.patience, check_finite=True))
        settings = dict(
            **self.trainer_settings,
            max_steps=stage.max_steps,
            max_epochs=-1,
            callbacks=callbacks,
            logger=[CSVLogger(folder, name="logs"), TensorBoardLogger(folder, name="tensorboard")],
            default_root_dir=folder,
            plugins=[AtomicCheckpointIO()],
            log_every_n_steps=max(1, stage.log_every_n_steps // chunk),
            val_check_interval=max(1, min(stage.validate_every_n_steps, stage.max_steps) // chunk),
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            # Lightning shards only its own loaders' samplers; ours draw by rank themselves
            use_distributed_sampler=False,
        )
        try:
            return L.Trainer(**settings)
        except (MisconfigurationException, ValueError, RuntimeError, TypeError, OverflowError, MemoryError) as error:
            raise UserError(f"trainer: {str(error) or type(error).__name__} Change --trainer.*") from None

    def _fit_normalizers(self, name: str, module: L.LightningModule) -> None:
        data, episodes, real = self.data, self.data.episodes, self.data.episodes.transitions
        if name == "agent":
            if isinstance(module, OfflineAgent):
                module.fit_normalizers(real[episodes.sample_rows()], episodes.episode_returns)
            return
        rows = episodes.sample_rows(data.training_episodes)
        if name == "world_model":
            module.fit_normalizers(real[rows], data.returns_to_go[rows])  # type: ignore[operator]
        else:
            module.fit_normalizers(real[rows])  # type: ignore[operator]

    # Checkpoints and keys

    def _origin(self, name: str) -> dict[str, Any]:
        """What a checkpoint says of where it comes from; plain values only."""
        episodes = self.data.episodes
        return {
            "dawm": __version__,
            "layout": LAYOUT,
            "stage": name,
            "module": self.settings[name]["module"],
            "observation_size": self.data.observation_size,
            "action_size": self.data.action_size,
            "dataset": episodes.name,
            "fingerprint": episodes.fingerprint,
            "env_spec": None if episodes.env_spec is None else episodes.env_spec.to_json(),
            "reference": None if episodes.reference is None else asdict(episodes.reference),
        }

    def _load(self, module: L.LightningModule, path: Path, setting: str) -> dict[str, Any]:
        checkpoint = read_checkpoint(path)
        origin = checkpoint.get(ORIGIN, {})
        if origin.get("fingerprint") != self.data.episodes.fingerprint:
            trained_on = origin.get("dataset", "unknown data")
            raise UserError(
                f"{setting}: {path} was trained on {trained_on!r}, not on {self.data.dataset!r} as it is now; "
                "name a checkpoint of this data set, or leave it out to train anew"
            )
        try:
            module.load_state_dict(checkpoint["state_dict"])
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{setting}: {path} does not fit the networks in the settings ({reason})") from None
        return checkpoint

    def _key(self, name: str, stage: Stage) -> str:
        """Hash of all that the stage's result depends on."""
        common = {key: self.trainer_settings.get(key) for key in ("devices", "num_nodes", "precision")}
        parts = {
            "stage": name,
            "settings": self.settings[name],
            "max_steps": stage.max_steps,
            "patience": stage.patience,
            "validate_every_n_steps": stage.validate_every_n_steps,
            "fingerprint": self.data.episodes.fingerprint,
            "seed": self.seed,
            "trainer": common,
            "before": self._keys if name == "agent" else [],
            "version": __version__,
            "layout": LAYOUT,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
