"""A rank of ``dora_dist.train`` that prints every phase that it is in."""

import sys

from support.forked_run import train_rank

BEGINS = "phase: "


def telling_rank(rank: int, world_size: int, arguments: list[str], port: int, log: str, engine: str) -> None:
    """Run one rank; each of its phases is a line of its output, in their order."""
    from dora_dist.console.phases import Phases

    def note(watch: Phases, phase: str) -> None:
        print(f"{BEGINS}{phase}", file=sys.stderr)
        watch.__dict__["phase"] = phase

    Phases.phase = property(lambda watch: watch.__dict__["phase"], note)
    train_rank(rank, world_size, arguments, port, log, engine)
