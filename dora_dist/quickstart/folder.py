"""The quickstart's folder: complete or absent, and rebuilt when its generator or settings change."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from dora_dist.console.files import digest_sources
from dora_dist.console.phases import Phases
from dora_dist.console.text import say
from dora_dist.quickstart.backbone import BackboneSettings, create_backbone
from dora_dist.quickstart.smollm2 import fetch
from dora_dist.quickstart.text import instruction_rows, pretraining_documents

STAMP_NAME = "quickstart.json"
TINY, SMOLLM2 = "tiny", "smollm2"
"""The models: one is generated, the other is downloaded."""
NUM_TRAIN_ROWS = 2000
NUM_HELD_OUT_ROWS = 200
NUM_PROMPTS_FOR_TOKENIZER = 400


def _fingerprint(seed: int, settings: BackboneSettings, model: str) -> str:
    """Hash of everything the content depends on: this package's source, the settings, the libraries' versions."""
    versions = {name: version(name) for name in ("torch", "transformers", "sentencepiece")}
    facts = [digest_sources(Path(__file__).parent), seed, asdict(settings), versions, model]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _is_current(output: Path, fingerprint: str) -> bool:
    stamp = output / STAMP_NAME
    return stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")).get("fingerprint") == fingerprint


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _as_prompt(row: dict[str, str]) -> str:
    """The row in alpaca's format, which makes the format's words pieces of the tokenizer."""
    return "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}".format(**row)


def _fill(folder: Path, seed: int, settings: BackboneSettings, model: str) -> None:
    """Write the data and the backbone into the existing, empty `folder`."""
    train = instruction_rows(seed, NUM_TRAIN_ROWS)
    _write_rows(folder / "train.jsonl", train)
    held_out = instruction_rows(seed, 2 * NUM_HELD_OUT_ROWS, held_out=True)
    _write_rows(folder / "heldout.jsonl", held_out[:NUM_HELD_OUT_ROWS])
    _write_rows(folder / "search.jsonl", held_out[NUM_HELD_OUT_ROWS:])
    if model == SMOLLM2:
        fetch(folder / "backbone")
        return
    documents = list(pretraining_documents(seed, settings.batch * settings.steps))
    prompts = [_as_prompt(row) for row in train[:NUM_PROMPTS_FOR_TOKENIZER]]
    create_backbone(documents, prompts, folder / "backbone", settings, seed)


def _replace(output: Path, finished: Path) -> None:
    """Move `finished` to `output`; an older quickstart there is removed afterwards."""
    if output.exists():
        retired = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
        os.rename(output, retired / "old")
        os.rename(finished, output)
        shutil.rmtree(retired)
    else:
        os.rename(finished, output)


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """A folder beside `output`, for what is being made. It is removed in the end, also after SIGTERM, which interrupts
    the block like Ctrl-C. What killed processes have left is removed first."""
    prefix = f".{output.name}.partial-"
    for left in output.parent.glob(f"{prefix}*"):
        _remove_if_left(left)
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=output.parent) as folder, _locked(Path(folder)):
            yield Path(folder)
    finally:
        signal.signal(signal.SIGTERM, former)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks a folder. The lock ends with this process, however that ends.

    Raises:
        BlockingIOError: another process has locked it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_if_left(folder: Path) -> None:
    """Remove a scratch folder that no process has locked. An empty one may be about to be locked, and stays."""
    try:
        with _locked(folder):
            if any(folder.iterdir()):
                say(f"quickstart: removing {folder}, which a start that was killed has left")
                shutil.rmtree(folder)
    except (BlockingIOError, FileNotFoundError):
        pass  # it is in use, or its process has just removed it


def ensure_quickstart(
    output: Path,
    seed: int = 0,
    settings: BackboneSettings | None = None,
    model: str = TINY,
    may_fetch: Callable[[], bool] = lambda: False,
) -> Path:
    """Make `output` hold backbone/, train.jsonl, heldout.jsonl and search.jsonl for this seed, and return it.

    Does nothing if the stamp file shows that they exist and are up to date. `settings` are those of the generated
    model, `TINY`; `may_fetch` is called before another model is downloaded.

    Raises:
        ValueError: `output` holds something that is not a quickstart, or the download is not permitted.
        ExpectedRunError: the download failed.
    """
    output = Path(output)
    settings = settings or BackboneSettings()
    fingerprint = _fingerprint(seed, settings, model)
    if _is_current(output, fingerprint):
        print(f"quickstart: {output} is up to date")
        return output
    is_empty_folder = output.is_dir() and not any(output.iterdir())
    if output.exists() and not is_empty_folder and not (output / STAMP_NAME).is_file():
        raise ValueError(
            f"output {output} exists and holds no {STAMP_NAME}, so it is not a quickstart and is not changed: "
            "choose another --output or remove it"
        )
    if model != TINY and not may_fetch():
        raise ValueError(f"the model {model} may not be downloaded. --model {TINY} generates one instead")
    output.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    if (output / STAMP_NAME).is_file():
        runs = len(list(output.glob("run-*")))
        lost = f" (the {runs} run{'s' * (runs > 1)} in it, of the old model, will be removed with it)" if runs else ""
        say(f"quickstart: {output} is from other settings: making it again{lost}")
    with _scratch(output) as scratch, Phases("making the model and the data"):
        finished = scratch / "finished"
        finished.mkdir()
        _fill(finished, seed, settings, model)
        stamp = {"fingerprint": fingerprint, "seed": seed, "model": model, "settings": asdict(settings)}
        (finished / STAMP_NAME).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
        _replace(output, finished)
    print(f"quickstart: {output} written in {time.monotonic() - started:.0f} s")
    return output
