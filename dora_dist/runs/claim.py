"""Ensures that only one run at a time writes to a folder: a second start is refused while the first one is alive.

Before anything else, the first rank writes ``claim-N.json`` into the folder: who it is, and a counter that a thread
increments every :data:`BEAT_SECONDS`. The claim with the highest number is valid. A process that takes over from a
claim without beats creates the next number; the file system gives it to only one of several (``O_EXCL``). A run removes
its claim as its very last act. A claim that a dead run left behind is taken over.
"""

import json
import os
import platform
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from dora_dist.console.command import leave
from dora_dist.console.errors import ExpectedRunError
from dora_dist.console.text import say
from dora_dist.distributed.agreement import Agreement

BEAT_SECONDS = 10.0
"""Time between two beats."""
MISSED_BEATS = 3
"""Consecutive beats that a new start must see missing before it takes over."""
_SINCE = "%Y-%m-%d %H:%M:%S %z"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def held(run: Path, agreement: Agreement) -> Iterator[None]:
    """Holds the claim on a run's folder while the ranks write to it.

    Args:
        run: the run's folder; created if missing.
        agreement: collectives over the ranks; the first rank holds the claim.

    Raises:
        ValueError: another run is writing there, or this one cannot.
    """
    claim = Claim(run)
    agreement.of_first(f"claiming {run}", claim.take)
    try:
        yield
    finally:
        claim.release()


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a claim.

    Attributes:
        host: name of its node.
        pid: its process number.
        born: its start time in ticks since boot, because process numbers are reused.
        boot: identifier of the node's boot.
        pids: namespace of the process number.
        job: its Slurm job.
        restart: number of times that Slurm has requeued the job.
        since: date and time of the claim.
    """

    host: str
    pid: int
    born: str | None
    boot: str | None
    pids: str | None
    job: str | None
    restart: int
    since: str

    @classmethod
    def here(cls, environment: Mapping[str, str]) -> "Holder":
        """This process, with the variables set by its launcher."""
        return cls(
            host=platform.node(),
            pid=os.getpid(),
            born=_birth(os.getpid()),
            boot=_BOOT.read_text(encoding="utf-8").strip() if _BOOT.exists() else None,
            pids=os.readlink("/proc/self/ns/pid") if os.path.lexists("/proc/self/ns/pid") else None,
            job=environment.get("SLURM_JOB_ID"),
            restart=int(environment.get("SLURM_RESTART_COUNT") or 0),
            since=time.strftime(_SINCE),
        )

    def __str__(self) -> str:
        job = "" if self.job is None else f", Slurm job {self.job}"
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    def end_seen_by(self, other: "Holder") -> str | None:
        """Proof, for another process, that this one has ended; None if there is none at the moment."""
        if self.job is not None and self.job == other.job and self.restart < other.restart:
            return f"Slurm has requeued job {self.job} since then"
        if self.host != other.host or self.boot is None or other.boot is None:
            return None
        if self.boot != other.boot:
            return f"{self.host} was booted since then"
        if self.pids == other.pids and _birth(self.pid) != self.born:
            return "it has ended"
        return None


def _birth(pid: int) -> str | None:
    """Start time of a process on this node; None if there is none, or only a zombie."""
    try:
        # The command's name, in parentheses, may itself contain spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class Claim:
    """A claim on a run's folder.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._path: Path | None = None
        self._descriptor = -1
        self._holder = Holder.here(os.environ)
        self._made_folder = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_up, name="claim", daemon=True)

    def take(self) -> None:
        """Claim the folder if it is free or if its last run ended without releasing it.

        Raises:
            ValueError: another run is alive there, or the folder is not writable.
        """
        try:
            while not self._make(self._take_over(_newest(self._run)) + 1):
                pass  # another newcomer was faster
        except OSError as error:
            raise ValueError(f"output_dir {self._run} cannot be written to: {error}") from None
        self._thread.start()

    def release(self) -> None:
        """Release the folder; does nothing if it is not claimed."""
        if self._path is None:
            return
        self._ended.set()
        self._thread.join(timeout=BEAT_SECONDS)
        with suppress(OSError):
            if self._is_there():
                self._path.unlink()
            if self._made_folder:
                self._run.rmdir()  # nothing was written
        self._path = None
        os.close(self._descriptor)

    def _make(self, number: int) -> bool:
        """Whether the claim with this number is now ours."""
        if not self._run.is_dir():
            self._run.mkdir(parents=True, exist_ok=True)
            self._made_folder = True
        path = self._run / f"claim-{number}.json"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except (FileExistsError, FileNotFoundError):
            return False
        os.write(descriptor, self._content(0))
        os.fsync(descriptor)
        if _newest(self._run) != number:  # our view of the folder was stale: there are newer claims
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return False
        for older in range(number):
            (self._run / f"claim-{older}.json").unlink(missing_ok=True)
        self._path, self._descriptor = path, descriptor
        return True

    def _take_over(self, number: int) -> int:
        """The number of the latest claim, once that claim is known to be invalid.

        Raises:
            ValueError: its run is alive.
        """
        path = self._run / f"claim-{number}.json"
        before = _read(path)
        if before is None:
            return number
        holder = _holder(before)
        who = "another run" if holder is None else str(holder)
        if holder is not None and (reason := holder.end_seen_by(self._holder)):
            say(f"taking {self._run} over from {who}: {reason}")
            return number
        say(f"{self._run} is claimed by {who}: waiting {MISSED_BEATS * BEAT_SECONDS:g} s for a sign of life")
        # Count observations, not only seconds: a slow file system also delays the other process's beats.
        for _ in range(MISSED_BEATS):
            time.sleep(BEAT_SECONDS)
            now = _read(path)
            if now is None:
                return number  # it has ended in the meantime
            if now != before:
                raise ValueError(
                    f"output_dir {self._run} is in use by another run: {_holder(now) or who}. Wait for its end, or set "
                    "output_dir to another folder"
                )
        say(f"taking {self._run} over from {who}: it has shown no sign of life for {MISSED_BEATS} beats")
        return number

    def _content(self, count: int) -> bytes:
        """The content of the claim's file, always of the same length, so that one write replaces it completely."""
        return json.dumps({**asdict(self._holder), "beat": f"{count:010d}"}).encode()

    def _is_there(self) -> bool:
        """Whether the claim's file is still the one we made. Raises OSError if it is gone."""
        assert self._path is not None
        return os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))

    def _keep_up(self) -> None:
        count = 0
        while not self._ended.wait(BEAT_SECONDS):
            count += 1
            try:
                # Write to the open file: if another run has made a file of this name, it is not touched.
                os.pwrite(self._descriptor, self._content(count), 0)
                os.fsync(self._descriptor)
                lost = not self._is_there()
            except FileNotFoundError:
                lost = True
            except OSError:
                lost = False  # a full disk, for example; the next beat may succeed
            if lost and not self._ended.is_set():
                leave(
                    ExpectedRunError(
                        f"{self._path} is gone: another start of this run has taken {self._run} over, while this "
                        "process was stopped or disconnected. It ends now, so that only one run writes there"
                    ),
                    status=1,
                    linger=False,
                )


def claims(run: Path) -> list[Path]:
    """All claim files in a folder."""
    return [path for path in run.glob("claim-*.json") if re.fullmatch(r"claim-\d+\.json", path.name)]


def held_since(run: Path) -> float | None:
    """When the run that is writing to a folder claimed it, in whole seconds since the epoch; None if no run is, as far
    as one look can show: then its claim was not updated recently, or its process is known to have ended."""
    path = run / f"claim-{_newest(run)}.json"
    content = _read(path)
    holder = None if content is None else _holder(content)
    if holder is None or holder.end_seen_by(Holder.here(os.environ)) is not None:
        return None
    try:
        late = time.time() - path.stat().st_mtime >= MISSED_BEATS * BEAT_SECONDS
    except FileNotFoundError:
        return None  # it has ended in the meantime
    return None if late else datetime.strptime(holder.since, _SINCE).timestamp()


def _newest(run: Path) -> int:
    """The highest claim number; 0 if there is no claim."""
    return max((int(path.stem.removeprefix("claim-")) for path in claims(run)), default=0)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _holder(content: bytes) -> Holder | None:
    """The process that wrote a claim; None if the claim is incomplete or not written by a run."""
    try:
        values = json.loads(content)
        values.pop("beat")
        return Holder(**values)
    except (ValueError, TypeError, AttributeError, KeyError):
        return None
