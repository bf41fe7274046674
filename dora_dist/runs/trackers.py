"""Weights & Biases, MLflow, Trackio and TensorBoard: what a run gives them beside the figures, which the Trainer's own
callbacks log.

A tracker starts before the model is loaded, so that one that cannot be used ends the run at once, and it ends when the
run does: the ranks leave by ``os._exit``, which runs no library's clean-up.
"""

import json
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from PIL import Image
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback

from dora_dist.config.given import flatten
from dora_dist.console.files import read_json, write_json
from dora_dist.console.text import say
from dora_dist.runs.pictures import draw_ranks

TRACKERS = "trackers.json"
"""File of a run: tracker -> the name by which it knows the run."""
CONFIG = "dora_dist"
"""Name of the run's configuration in a tracker, beside the Trainer's arguments."""
RANK_MAP = "ranks"
"""Name of the rank map in a tracker."""
STEP = "train/global_step"
"""The optimizer step in the history of Weights & Biases and Trackio, as the Trainer's callbacks name it."""


TENSORBOARD_VARIABLE = "TENSORBOARD_LOGGING_DIR"
"""Environment variable that transformers' own callback reads."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker needs to know of a run.

    Attributes:
        folder: the run's folder.
        config: the run's configuration; plain values, nested as in the YAML.
        arguments: the Trainer's arguments.
        step: number of optimizer steps taken so far.
        known_as: tracker -> its name for the run, from an earlier start that this one goes on from.
    """

    folder: Path
    config: Mapping[str, Any]
    arguments: TrainingArguments
    step: int = 0
    known_as: Mapping[str, str]


class Tracker(Protocol):
    """One tracker of a run, on the first rank.

    Attributes:
        known_as: the name by which a later start finds the run again.
    """

    known_as: str

    def attach(self, callbacks: list[TrainerCallback]) -> None:
        """Let the Trainer's callback log into this run."""

    def show(self, picture: Image.Image, step: int) -> None:
        """Add the rank map of an optimizer step."""

    def end(self, failed: bool) -> None:
        """Hand over everything that was logged."""


class WeightsAndBiases:
    """The Trainer's callback logs into the run that it finds."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        earlier = run.known_as.get("wandb")
        project = os.environ.get("WANDB_PROJECT", "huggingface")  # the Trainer's
        self._image = wandb.Image
        self._run = wandb.init(
            project=project, name=run.arguments.run_name, id=earlier, resume="allow" if earlier else None
        )
        self._run.config.update({CONFIG: dict(run.config)}, allow_val_change=True)
        self.known_as: str = self._run.id

    def attach(self, callbacks: list[TrainerCallback]) -> None:
        pass

    def show(self, picture: Image.Image, step: int) -> None:
        self._run.log({RANK_MAP: self._image(picture), STEP: step})

    def end(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """The Trainer's callback logs into the run that is active, and does not end one that it has not started."""

    def __init__(self, run: TrackedRun) -> None:
        import mlflow
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

        self._mlflow = mlflow
        started = mlflow.start_run(run_id=run.known_as.get("mlflow"), run_name=run.arguments.run_name)
        self.known_as: str = started.info.run_id
        mlflow.log_dict(dict(run.config), "config.yaml")
        # A parameter cannot be changed. What is too long for one is in the file.
        values = {name: str(value) for name, value in flatten(run.config, f"{CONFIG}.").items()}
        new = {name: value for name, value in values.items() if name not in started.data.params}
        mlflow.log_params({name: value for name, value in new.items() if len(value) <= MAX_PARAM_VAL_LENGTH})

    def attach(self, callbacks: list[TrainerCallback]) -> None:
        pass

    def show(self, picture: Image.Image, step: int) -> None:
        self._mlflow.log_image(picture, key=RANK_MAP, step=step)

    def end(self, failed: bool) -> None:
        self._mlflow.flush_async_logging()
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


class Trackio:
    """The Trainer's callback ends its run with training, and goes on with it by its name for what is logged after."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self._trackio = trackio
        self._config = dict(run.config)
        arguments = run.arguments
        started = trackio.init(
            project=arguments.project,
            name=run.known_as.get("trackio") or arguments.run_name,
            space_id=arguments.trackio_space_id,
            resume="allow",
            private=arguments.hub_private_repo,
            bucket_id=arguments.trackio_bucket_id,
        )
        self.known_as: str = started.name
        arguments.run_name = started.name

    def attach(self, callbacks: list[TrainerCallback]) -> None:
        (number,) = (number for number, each in enumerate(callbacks) if isinstance(each, TrackioCallback))
        callbacks[number] = _TrackioWithConfig(self._config)

    def show(self, picture: Image.Image, step: int) -> None:
        self._trackio.log({RANK_MAP: self._trackio.Image(picture), STEP: step})

    def end(self, failed: bool) -> None:
        if self._trackio.context_vars.current_run.get() is not None:
            self._trackio.finish()


class _TrackioWithConfig(TrackioCallback):
    """Each run that the callback opens replaces the configuration of the one before."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._config = config

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        super().setup(args, state, model, **kwargs)  # type: ignore[no-untyped-call]
        if state.is_world_process_zero:
            self._trackio.config.update({CONFIG: self._config})


class TensorBoard:
    """The Trainer's callback writes with the writer that it is given, and with one of its own when training has ended.

    Both write into the run's folder. What an earlier start has written of later steps is taken back.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._callback: TensorBoardCallback | None = None
        self.known_as = str(run.folder / "tensorboard")
        elsewhere = os.environ.get(TENSORBOARD_VARIABLE)
        if elsewhere is not None:
            say(f"{TENSORBOARD_VARIABLE} is {elsewhere}, which a run does not follow: it writes into {self.known_as}")

    def attach(self, callbacks: list[TrainerCallback]) -> None:
        # Not before: a run whose model cannot be loaded leaves no folder.
        from torch.utils.tensorboard import SummaryWriter

        step, config = self._run.step, json.dumps(self._run.config, indent=2)
        writer = SummaryWriter(self.known_as, purge_step=step + 1 if step else 0)
        writer.add_text(CONFIG, textwrap.indent(config, "    "), step)  # a block of code in Markdown
        (self._callback,) = (each for each in callbacks if isinstance(each, TensorBoardCallback))
        self._callback.tb_writer, self._callback.logging_dir = writer, self.known_as

    def show(self, picture: Image.Image, step: int) -> None:
        assert self._callback is not None
        assert self._callback.tb_writer is not None, "events take place while the Trainer trains"
        self._callback.tb_writer.add_image(RANK_MAP, np.asarray(picture), step, dataformats="HWC")

    def end(self, failed: bool) -> None:
        if self._callback is not None and self._callback.tb_writer is not None:
            self._callback.tb_writer.close()


TRACKER_CLASSES: Mapping[str, Callable[[TrackedRun], Tracker]] = {
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
    "tensorboard": TensorBoard,
}
ADVICE = {
    "wandb": "log in (wandb login), or set WANDB_MODE=offline in the environment",
    "mlflow": "set MLFLOW_TRACKING_URI in the environment to a server or database that is there",
    "trackio": "log in (hf auth login), or leave out training.trackio_space_id to keep the run on this machine",
    "tensorboard": "set output_dir to a folder that can be written",
}
"""Tracker -> what to do if it does not start."""


class Trackers:
    """The trackers of a run, which end with the block; none on ranks other than the first."""

    def __init__(self) -> None:
        self._trackers: dict[str, Tracker] = {}

    def start(self, names: Iterable[str], run: TrackedRun) -> None:
        """Start the trackers that this module knows; the others are left to the Trainer.

        Raises:
            ValueError: a tracker cannot be started.
        """
        for name in names:
            if name not in TRACKER_CLASSES:
                continue
            try:
                self._trackers[name] = TRACKER_CLASSES[name](run)
            except Exception as error:  # every library has its own
                self.end(failed=True)
                what = (str(error) or type(error).__name__).rstrip(".")
                raise ValueError(
                    f"training.report_to has {name}, which does not start: {what}. To go on, {ADVICE[name]}, or take "
                    "it out of training.report_to"
                ) from error

    def attach(self, callbacks: list[TrainerCallback]) -> None:
        """Let the Trainer's callbacks log into these runs; the list is changed in place."""
        for tracker in self._trackers.values():
            tracker.attach(callbacks)

    def record(self, folder: Path) -> None:
        """Write each tracker's name for the run into the run's folder, for a start that goes on from here."""
        if self._trackers:
            write_json(folder / TRACKERS, {name: tracker.known_as for name, tracker in self._trackers.items()})

    def show_ranks(self, ranks: Mapping[str, int], initial_rank: int, step: int) -> None:
        """Give all trackers the rank map of an optimizer step.

        Args:
            ranks: layer -> number of components kept.
            initial_rank: number of components of a layer at the start.
            step: number of optimizer steps taken so far.
        """
        if not self._trackers:
            return
        file = BytesIO()
        draw_ranks(ranks, initial_rank, file)
        picture = Image.open(file).convert("RGB")
        for tracker in self._trackers.values():
            tracker.show(picture, step)

    def end(self, failed: bool) -> None:
        """Hand over everything that was logged. If a tracker fails at that, the run has ended all the same: a warning
        is printed."""
        while self._trackers:
            name, tracker = self._trackers.popitem()
            try:
                tracker.end(failed)
            except Exception as error:
                say(f"warning: {name} may lack the last figures of this run, which metrics.jsonl has: {error}")

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(failed=kind is not None)


def known_as(folder: Path) -> dict[str, str]:
    """Tracker -> its name for the run, as an earlier start recorded it; empty where none did."""
    path = folder / TRACKERS
    return dict(read_json(path)) if path.is_file() else {}
