"""What an earlier start of a run has left in its folder, and how to go on from it, also with other ranks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dora_dist.config.run import RunConfig
from dora_dist.config.training import whole_number
from dora_dist.console.files import read_json
from dora_dist.runs import checkpoint, records, summary

BATCH = "per_device_train_batch_size"
ACCUMULATION = "gradient_accumulation_steps"
WRITTEN = ("adapter", records.CONFIG, records.METRICS, records.ALLOCATION, records.SUMMARY)
"""What a run writes into its folder, beside :data:`~dora_dist.runs.records.RUN` and checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """An earlier start of a run, as its folder shows it.

    Attributes:
        folder: what ``settings`` were found in.
        finished: the run has come to its end.
        checkpoint: to go on from, or None.
        processes: that wrote it.
        settings: that it was written with; empty where there is nothing.
        remarks: for the log, on checkpoints that were passed over.
    """

    folder: Path
    finished: bool = False
    checkpoint: Path | None = None
    processes: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def look(run: Path, resume: str) -> Earlier:
    """Look into a run's folder. For one rank: files may reach the other nodes later.

    Args:
        run: folder of the run.
        resume: ``checkpoint.resume`` of the configuration.

    Raises:
        ValueError: what is there cannot be used, or is not a run's.
    """
    _refuse_foreign_folder(run)
    if resume == "auto" and summary.is_finished(run):
        recorded = read_json(run / records.RUN)
        return Earlier(folder=run, finished=True, processes=recorded.get("processes"), settings=recorded["settings"])
    found, remarks = checkpoint.find_resumable(run, resume)
    if found is None:
        return Earlier(folder=run, remarks=remarks)
    state = checkpoint.read_method_state(found)
    if "processes" not in state:
        raise ValueError(
            f"{found} was written by an older version of this program, which this one cannot go on from: finish the "
            "run with that version, or choose another output_dir"
        )
    return Earlier(
        folder=found,
        checkpoint=found,
        processes=state["processes"],
        settings=state["fingerprint"],
        remarks=remarks,
    )


def _refuse_foreign_folder(run: Path) -> None:
    """A run deletes and overwrites what has the names of its own files: only where an earlier start wrote them."""
    strangers = [name for name in WRITTEN if (run / name).exists() or (run / name).is_symlink()]
    strangers += [folder.name for folder in checkpoint.checkpoints(run)]
    known = (run / records.RUN).is_file() or checkpoint.newest(run) is not None
    if strangers and not known:
        raise ValueError(
            f"output_dir {run} holds {', '.join(strangers)}, but neither {records.RUN} nor a complete checkpoint: no "
            "run of this program wrote them, and this one would overwrite them. Choose a new folder"
        )


def accumulation(earlier: Earlier, config: RunConfig, processes: int) -> int | None:
    """Gradient accumulation that gives the earlier start's global batch on another number of processes; None where the
    configuration's own is to be taken.

    Args:
        earlier: start of the run.
        config: of the run.
        processes: of this start.

    Raises:
        ValueError: there is none.
    """
    if earlier.processes in (None, processes):
        return None
    wanted = earlier.settings["global batch"]
    per_process = whole_number(config.training, BATCH)
    if wanted % (per_process * processes):
        fitting = [size for size in range(1, wanted + 1) if wanted % (size * processes) == 0]
        hint = (
            f"set training.{BATCH} to one of {', '.join(map(str, fitting))}"
            if fitting
            else "use a number of processes that divides it"
        )
        raise ValueError(
            f"{earlier.folder} was written by {earlier.processes} processes with a global batch of {wanted}, which "
            f"{processes} processes with training.{BATCH} {per_process} cannot have, whatever the accumulation: {hint}"
        )
    return int(wanted // (per_process * processes))


def check_settings(earlier: Earlier, settings: Mapping[str, Any]) -> None:
    """Refuse to go on under settings that mean another run.

    Raises:
        ValueError: lists every difference.
    """
    if earlier.settings:
        checkpoint.check_same_settings(earlier.folder, earlier.settings, settings)


def describe(earlier: Earlier, config: RunConfig, processes: int) -> list[str]:
    """What the log says of how this start goes on."""
    if earlier.checkpoint is None:
        return earlier.remarks
    remarks = [*earlier.remarks, f"resuming from {earlier.checkpoint}"]
    steps = accumulation(earlier, config, processes)
    if steps is not None:
        remarks.append(
            f"it was written by {earlier.processes} processes, and these are {processes}: training.{ACCUMULATION} is "
            f"{steps} from here on, which keeps the global batch of {earlier.settings['global batch']}"
        )
    return remarks
