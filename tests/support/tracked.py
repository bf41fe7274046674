"""Runs with trackers, offline, and what the trackers have kept of them, read back by their own readers."""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.forked_run import train_rank

BLOCK = 32768
"""Size in bytes of a block of a ``.wandb`` file, in LevelDB's log format."""


OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def tracked_rank(rank: int, world_size: int, arguments: list[str], port: int, log: str, folder: str) -> None:
    """Run one rank of ``dora-dist train`` like :func:`train_rank`, in a folder where trackers put their files."""
    os.environ.update(OFFLINE, TRACKIO_DIR=f"{folder}/trackio")
    os.chdir(folder)
    train_rank(rank, world_size, arguments, port, log)


@dataclass
class Tracked:
    """One run in a tracker.

    Attributes:
        figures: (optimizer step, name as in metrics.jsonl) -> values, in their order.
        pictures: optimizer step -> bytes of the picture's file.
        config: the run's configuration, as the tracker has it.
        end: the run's end, as the tracker has it; None where the tracker has no such thing, or has not been told.
    """

    figures: dict[tuple[int, str], list[float]] = field(default_factory=dict)
    pictures: dict[int, bytes] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    end: Any = None

    def add(self, step: int, name: str, value: Any) -> None:
        if isinstance(value, int | float):
            self.figures.setdefault((step, name), []).append(float(value))


def plain(name: str) -> str:
    """``train/loss`` -> ``loss``, ``eval/loss`` -> ``eval_loss``: transformers' names for the lines of a log."""
    return name.removeprefix("train/").replace("eval/", "eval_", 1)


def in_wandb(folder: Path) -> dict[str, Tracked]:
    """Runs of the offline files in ``folder/wandb``, by their ids; those of one run follow each other."""
    from wandb.proto.wandb_internal_pb2 import Record

    runs: dict[str, Tracked] = {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        run = runs.setdefault(file.stem.removeprefix("run-"), Tracked())
        for data in _records(file.read_bytes()):
            record = Record.FromString(data)
            for item in (*record.config.update, *record.run.config.update):
                if "dora_dist" in (item.key, *item.nested_key):
                    run.config = json.loads(item.value_json)
            if record.HasField("exit"):
                run.end = record.exit.exit_code
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if row:
                _add_row(run, row, "ranks.path", lambda path, file=file: file.parent / "files" / path)
    return runs


def _records(data: bytes) -> list[bytes]:
    """Records of a file in LevelDB's log format, which follow a header of 7 bytes. An incomplete last record, which a
    killed writer has left, does not count."""
    position, records, begun = 7, [], b""
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        part = data[position + 7 : position + 7 + length]
        if kind == 0 or len(part) < length:
            break
        position += 7 + length
        begun = part if kind in (1, 2) else begun + part
        if kind in (1, 4):
            records.append(begun)
    return records


def _add_row(run: Tracked, row: dict[str, Any], picture: str, file_of: Callable[[Any], Path]) -> None:
    """Add a row of a history; ``picture`` is the key of the rank map in it, from whose value its file follows."""
    step = int(row["train/global_step"])
    for name, value in row.items():
        run.add(step, plain(name), value)
    if picture in row:
        run.pictures[step] = file_of(row[picture]).read_bytes()


def in_trackio(folder: Path) -> dict[str, Tracked]:
    """Runs of the database in ``folder/trackio``, by their names."""
    from trackio import sqlite_storage

    sqlite_storage.TRACKIO_DIR = folder / "trackio"  # read from the environment when it was imported
    storage, runs = sqlite_storage.SQLiteStorage, {}
    for name in storage.get_runs("huggingface"):
        run = runs[name] = Tracked(config=storage.get_run_config("huggingface", name)["dora_dist"])
        for row in storage.get_logs("huggingface", name):
            _add_row(run, row, "ranks", lambda value: folder / "trackio" / "media" / value["file_path"])
    return runs


def in_mlflow(folder: Path) -> dict[str, Tracked]:
    """Runs of the database ``folder/mlflow.db``, by their ids."""
    import yaml
    from mlflow import MlflowClient

    runs, client = {}, MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    for found in client.search_runs(["0"]):
        files = folder / "mlruns" / "0" / found.info.run_id / "artifacts"
        run = runs[found.info.run_id] = Tracked(end=found.info.status)
        run.config = yaml.safe_load((files / "config.yaml").read_text())
        assert found.data.params["dora_dist.pruning.interval"] == str(run.config["pruning"]["interval"])
        for name in found.data.metrics:
            for entry in client.get_metric_history(found.info.run_id, name):
                run.add(entry.step, name, entry.value)
        for picture in sorted(files.glob("images/*.png")):
            run.pictures[int(picture.name.split("+")[2])] = picture.read_bytes()
    return runs


def in_tensorboard(folder: Path) -> dict[str, Tracked]:
    """The one run of ``folder/run/tensorboard``."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run" / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    run = Tracked()
    (text,) = (entry.tensor_proto.string_val[0].decode() for entry in events.Tensors("dora_dist/text_summary")[-1:])
    run.config = json.loads(text)
    for name in events.Tags()["scalars"]:
        for entry in events.Scalars(name):
            run.add(entry.step, plain(name), entry.value)
    for entry in events.Images("ranks"):
        run.pictures[entry.step] = entry.encoded_image_string
    return {"tensorboard": run}


READERS = {"wandb": in_wandb, "mlflow": in_mlflow, "trackio": in_trackio, "tensorboard": in_tensorboard}
