"""Detects ranks that have died or stopped responding, and reports them by name on every other rank, so that no rank
waits for a time-out.

A rank that dies leaves the others in a collective, whose error (if it has one before its time-out) does not name the
rank. So every rank has a thread that sends a heartbeat to the rendezvous store once a second. When a rank fails, or
rank 0 misses the heartbeats of another, there is a roll call: threads answer even where their rank hangs, and a rank
that does not answer is lost. Every rank then ends with the same verdict.
"""

import json
import threading
import time
from types import TracebackType

from dora_dist.console.command import leave
from dora_dist.console.errors import PREEMPTED, ExpectedRunError, is_common
from dora_dist.console.phases import Phases
from dora_dist.distributed.rendezvous import POLL_SECONDS, Rendezvous, beat_key

SIGN_SECONDS = 1.0
"""Time between two heartbeats."""
ANSWER_SECONDS = 5.0
"""Time for the answers to a roll call."""
TAKING_SECONDS = 3.0
"""Time for a rank's main thread to report the verdict, if it does not hang."""
_ADVICE = "Start the same command again to resume from the newest complete checkpoint"


class RanksLostError(ExpectedRunError):
    """Another rank stopped responding, or failed outside of a collective. Raised on every other rank.

    Attributes:
        status: exit status: :data:`~dora_dist.console.errors.PREEMPTED` if a rank is lost, 1 if one has failed.
    """

    def __init__(self, message: str, gone: bool) -> None:
        super().__init__(message)
        self.status = PREEMPTED if gone else 1


class HeartbeatMonitor:
    """Context in which this rank sends heartbeats, and learns which other ranks are lost.

    An exception that leaves the context is reported to the other ranks. One that is the consequence of another rank's
    end becomes a :class:`RanksLostError` that names that rank.

    Args:
        rendezvous: the rendezvous of the ranks; None for a single rank, which nobody watches.
        silent_seconds: seconds without a heartbeat after which a rank counts as lost.
        phases: the phases of this rank, for messages.
    """

    def __init__(self, rendezvous: Rendezvous | None, silent_seconds: float, phases: Phases) -> None:
        self._phases = phases
        self._rendezvous = rendezvous
        self._silent_seconds = silent_seconds
        self._wake = threading.Event()
        self._stopped = False
        self._failure: str | None = None
        self._verdict = ""
        self._is_cause = False
        self._gone = False
        self._done = threading.Event()
        self._taken = False
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        self._signs: dict[int, tuple[bytes, float]] = {}
        self._thread: threading.Thread | None = None

    def note(self, phase: str) -> None:
        """Record what this rank is doing from now on."""
        self._phases.phase = phase

    def __enter__(self) -> "HeartbeatMonitor":
        if self._rendezvous is not None:
            self._store = self._rendezvous.connect()  # the same store that join_rendezvous() has just used
            self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is None or self._stopped:
            return
        if not isinstance(error, Exception) or is_common(error):
            self.stop(None if error is None else f"{type(error).__name__}: {error}")
            return
        self._failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        self._wake.set()
        self._done.wait(ANSWER_SECONDS + 2 * SIGN_SECONDS + TAKING_SECONDS)
        if not self._take():
            self._thread.join()  # it is ending this process
        if self._verdict and not self._is_cause:
            raise RanksLostError(self._verdict, self._gone) from None

    def stop(self, last_words: str | None = None) -> None:
        """Stop sending and watching heartbeats, when all ranks are leaving.

        Args:
            last_words: the reason for leaving, if it is not the end of the run.
        """
        if self._thread is None or self._stopped:
            return
        self._stopped = True
        self._wake.set()
        self._thread.join(timeout=2 * SIGN_SECONDS)
        try:
            if self._rendezvous is not None and not self._thread.is_alive():
                self._store.set(f"left/{self._rendezvous.rank}", last_words or "the run is over")
        except RuntimeError:
            pass  # the store is gone with rank 0, which has left before

    # The thread. ``self._store`` belongs to it until it has ended.

    def _run(self) -> None:
        assert self._rendezvous is not None
        count = 0
        try:
            while not self._stopped:
                self._wake.wait(SIGN_SECONDS)
                if self._stopped:
                    return
                count += 1
                self._sign(count)
                reason = self._failure or self._missed()
                if reason is not None:
                    self._store.set("alarm", reason)
                if reason is not None or self._store.check(["alarm"]):
                    self._verdict = self._roll_call()
                    break
        except RuntimeError:
            if self._stopped:
                return
            host, port = self._rendezvous.place
            self._gone = True
            self._verdict = (
                f"rank 0, or the launcher that keeps the rendezvous at {host}:{port}, is not responding (killed or "
                f"disconnected); this rank was in: {self._phases.phase}. {_ADVICE}"
            )
        self._done.set()
        end = time.monotonic() + TAKING_SECONDS
        while not self._taken and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        if not self._stopped and self._take():
            lost = RanksLostError(self._verdict, self._gone)
            leave(lost, lost.status)

    def _take(self) -> bool:
        """Whether the calling thread is the first to ask, and therefore reports the verdict."""
        with self._lock:
            first, self._taken = not self._taken, True
        return first

    def _sign(self, count: int) -> None:
        assert self._rendezvous is not None
        self._store.set(beat_key(self._rendezvous.rank), f"{count} {self._phases.phase}")

    def _missed(self) -> str | None:
        """A message about the first rank that has sent no heartbeat for too long, or None. Rank 0 watches all ranks;
        the others watch rank 0, whose store a launcher may keep."""
        assert self._rendezvous is not None
        watched = range(self._rendezvous.size) if self._rendezvous.is_first else [0]
        now = time.monotonic()
        if now - self._looked > 5 * SIGN_SECONDS:  # this rank was suspended: the others may have been too
            self._signs.clear()
        self._looked = now
        for rank, sign in zip(watched, self._store.multi_get([beat_key(rank) for rank in watched]), strict=True):
            seen, since = self._signs.get(rank, (b"", now))
            if sign != seen:
                self._signs[rank] = (sign, now)
            elif now - since > self._silent_seconds:
                return f"rank {rank} sent no heartbeat for {self._silent_seconds:g} s"
        return None

    def _roll_call(self) -> str:
        """Answer, wait for the others' answers, and return what has happened. Rank 0 writes the verdict, so that all
        say the same; if it does not, another rank writes it."""
        assert self._rendezvous is not None
        mine = {"order": self._store.add("answers", 1), "phase": self._phases.phase, "failure": self._failure}
        self._store.set(f"answer/{self._rendezvous.rank}", json.dumps(mine))
        end = time.monotonic() + ANSWER_SECONDS
        missing = list(range(self._rendezvous.size))
        while missing and time.monotonic() < end:
            if self._rendezvous.is_first:
                missing = [rank for rank in missing if not self._store.check([f"answer/{rank}"])]
            elif self._store.check(["verdict"]):
                break
            if missing:
                time.sleep(POLL_SECONDS)
        if not self._rendezvous.is_first:
            time.sleep(POLL_SECONDS)
        if not self._store.check(["verdict"]):
            missing = [rank for rank in range(self._rendezvous.size) if not self._store.check([f"answer/{rank}"])]
            self._store.set("verdict", json.dumps(self._judge(missing)))
        cause, self._gone, text = json.loads(self._store.get("verdict"))
        self._is_cause = cause == self._rendezvous.rank
        return f"{text}; this rank was in: {self._phases.phase}. {_ADVICE}"

    def _judge(self, missing: list[int]) -> tuple[int | None, bool, str]:
        """The rank whose failure was the cause, if it is still there; whether ranks are lost; and what has happened."""
        assert self._rendezvous is not None
        if missing:
            return None, True, "; ".join(self._last_of(rank) for rank in missing)
        answers = {rank: json.loads(self._store.get(f"answer/{rank}")) for rank in range(self._rendezvous.size)}
        failed = {rank: answer for rank, answer in answers.items() if answer["failure"]}
        if not failed:
            return None, True, self._store.get("alarm").decode()
        late = [rank for rank in answers if rank not in failed]
        if late and all("timed out" in answer["failure"].lower() for answer in failed.values()):
            where = "; ".join(f"{self._name(rank)} was in: {answers[rank]['phase']}" for rank in late)
            return None, False, f"a time-out ({next(iter(failed.values()))['failure']}), while {where}"
        first = min(failed, key=lambda rank: failed[rank]["order"])
        return first, False, f"{self._name(first)} failed in: {failed[first]['phase']}: {failed[first]['failure']}"

    def _last_of(self, rank: int) -> str:
        if self._store.check([f"left/{rank}"]):
            return f"{self._name(rank)} has ended: {self._store.get(f'left/{rank}').decode()}"
        _, _, phase = self._store.get(beat_key(rank)).decode().partition(" ")
        return f"{self._name(rank)} is not responding (killed or disconnected); its last reported phase: {phase}"

    def _name(self, rank: int) -> str:
        assert self._rendezvous is not None
        return f"rank {rank} ({self._rendezvous.node_of(self._store, rank)})"
