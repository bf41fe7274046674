"""What an earlier start of a run has left in its folder, and how to go on from it, also with other ranks."""

from dataclasses import dataclass, field
from pathlib import Path

from dora_dist.config.format_version import FORMAT_VERSION, METHOD_STATE
from dora_dist.config.run import RunConfig
from dora_dist.config.training import whole_number
from dora_dist.console.files import read_json
from dora_dist.runs import checkpoint, records, summary
from dora_dist.runs.claim import claims
from dora_dist.runs.fingerprint import Fingerprint

BATCH = "per_device_train_batch_size"
ACCUMULATION = "gradient_accumulation_steps"
NAMED = 3
"""Largest number of files of a foreign folder that a message names."""


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """An earlier start of a run, as its folder shows it.

    Attributes:
        folder: the folder in which ``fingerprint`` was found.
        finished: whether the run has come to its end.
        checkpoint: the checkpoint to go on from, or None.
        world_size: number of ranks that wrote the checkpoint.
        fingerprint: the settings of the earlier start; None where there was none.
        version: format of the files that the earlier start wrote.
        remarks: remarks for the log, on checkpoints that were passed over.
    """

    folder: Path
    finished: bool = False
    checkpoint: Path | None = None
    world_size: int | None = None
    fingerprint: Fingerprint | None = None
    version: int = FORMAT_VERSION
    remarks: list[str] = field(default_factory=list)

    @property
    def started_from(self) -> str | None:
        """Identity of the adapter of ``adapter.start_from``; None without one, and where there was no earlier start."""
        return None if self.fingerprint is None else self.fingerprint.adapter.get("start_from")


def look(run: Path, resume: str) -> Earlier:
    """Look into a run's folder. Called on one rank only, because files may reach the other nodes later.

    Args:
        run: the run's folder.
        resume: the value of ``checkpoint.resume`` in the configuration.

    Raises:
        ValueError: the folder's content cannot be used, or is not a run's.
    """
    refuse_foreign_folder(run)
    if resume == "auto" and summary.is_finished(run) and (run / records.RUN).is_file():
        recorded = read_json(run / records.RUN)
        return Earlier(
            folder=run,
            finished=True,
            world_size=recorded.get("processes"),
            fingerprint=records.read_fingerprint(run),
            version=recorded.get("format", 1),
        )
    found, remarks = checkpoint.find_resumable(run, resume)
    if found is None:
        return Earlier(folder=run, remarks=remarks)
    state = checkpoint.read_method_state(found)
    return Earlier(
        folder=found,
        checkpoint=found,
        world_size=state.get("processes"),
        fingerprint=Fingerprint.from_dict(state["fingerprint"], found / METHOD_STATE),
        version=state.get("format", 1),
        remarks=remarks,
    )


def refuse_foreign_folder(run: Path) -> None:
    """Refuse a folder that is not new, empty or a run's, because a run writes, overwrites and deletes in its folder.
    Hidden files, such as ``.gitignore``, do not count.

    Raises:
        ValueError: the folder holds something else.
    """
    if run.exists() and not run.is_dir():
        raise ValueError(f"output_dir is {run}, which is a file: set output_dir to a folder")
    if not run.is_dir() or (run / records.RUN).is_file() or checkpoint.newest(run) is not None:
        return
    # Left by a run that ended in its first moments, or written by a comparison beside its run.
    ours = {f"{records.RUN}.tmp", *records.OF_CELL, *(path.name for path in claims(run))}
    strangers = sorted(path.name for path in run.iterdir() if path.name not in ours and not path.name.startswith("."))
    if strangers:
        more = f" and {len(strangers) - NAMED} more" if len(strangers) > NAMED else ""
        raise ValueError(
            f"output_dir {run} holds {', '.join(strangers[:NAMED])}{more}, but neither {records.RUN} nor a complete "
            "checkpoint: no run of this program wrote them. Set output_dir to a new folder, or an empty one"
        )


def accumulation(earlier: Earlier, config: RunConfig, world_size: int) -> int | None:
    """Gradient accumulation that gives the earlier start's global batch on another number of processes; None where the
    configuration's own applies.

    Args:
        earlier: the earlier start of the run.
        config: the run's configuration.
        world_size: number of ranks of this start.

    Raises:
        ValueError: no accumulation gives that batch.
    """
    if earlier.fingerprint is None or earlier.world_size in (None, world_size):
        return None
    wanted = earlier.fingerprint.global_batch
    per_process = whole_number(config.training, BATCH)
    if wanted % (per_process * world_size):
        fitting = [size for size in range(1, wanted + 1) if wanted % (size * world_size) == 0]
        hint = (
            f"set training.{BATCH} to one of {', '.join(map(str, fitting))}"
            if fitting
            else "use a number of processes that divides it"
        )
        raise ValueError(
            f"{earlier.folder} was written by {earlier.world_size} processes with a global batch of {wanted}, which "
            f"{world_size} processes with training.{BATCH} {per_process} cannot have, whatever the accumulation: {hint}"
        )
    return int(wanted // (per_process * world_size))


def check_settings(earlier: Earlier, fingerprint: Fingerprint) -> None:
    """Refuse to resume files of an earlier version, or under settings that mean another run.

    Raises:
        ValueError: the settings differ; the message lists every difference.
    """
    if earlier.fingerprint is None:
        return
    differences = earlier.fingerprint.differences(fingerprint)
    if earlier.version > FORMAT_VERSION:
        raise ValueError(
            f"{earlier.folder} was written by a later version of dora-dist (format {earlier.version}; this version "
            f"resumes format {FORMAT_VERSION} only): update dora-dist, or choose another output_dir"
        )
    if earlier.version < FORMAT_VERSION:
        raise ValueError(
            f"{earlier.folder} was written by an earlier version of dora-dist (format {earlier.version}; this version "
            f"resumes format {FORMAT_VERSION} only). Settings that changed: {'; '.join(differences) or 'none'}. Finish "
            "the run with that version, or choose another output_dir to start a new one; report, generate and export "
            "still open the old one"
        )
    if differences:
        raise ValueError(
            f"{earlier.folder} was written by a run with other settings: {'; '.join(differences)}. Restore them to "
            "continue that run, or choose another output_dir, with checkpoint.resume auto or never, to start a new one"
        )


def check_best(earlier: Earlier, config: RunConfig) -> None:
    """Refuse to resume from a checkpoint whose best checkpoint is not in the run's folder, from which it would be taken
    in the end.

    Raises:
        ValueError: the best checkpoint is not there, or not complete.
    """
    if earlier.checkpoint is None or config.evaluation.keep_best is None:
        return
    best = checkpoint.best_of(earlier.checkpoint)
    if best is None:
        return
    own = Path(config.output_dir) / best.name
    if flaw := checkpoint.flaw_of(own):
        raise ValueError(
            f"{earlier.checkpoint} names {best.name} as the best one so far, but {own} cannot be used: {flaw}. Copy it "
            "there, or set evaluation.keep_best to null to end with the last adapter"
        )


def describe(earlier: Earlier, config: RunConfig, world_size: int) -> list[str]:
    """What the log says of how this start goes on."""
    if earlier.checkpoint is None:
        return earlier.remarks
    remarks = [*earlier.remarks, f"resuming from {earlier.checkpoint}"]
    engine = config.distributed.engine
    if earlier.fingerprint is not None and earlier.fingerprint.engine != engine:
        remarks.append(f"it was written under the engine {earlier.fingerprint.engine}, and this is {engine}")
    steps = accumulation(earlier, config, world_size)
    if earlier.fingerprint is not None and steps is not None:
        remarks.append(
            f"it was written by {earlier.world_size} processes, and these are {world_size}: training.{ACCUMULATION} is "
            f"{steps} from here on, which keeps the global batch of {earlier.fingerprint.global_batch}"
        )
    return remarks
