"""A rank of ``dora_dist.train`` whose collectives in one step are recorded."""

from pathlib import Path

from step_collectives import watch_step

from support.forked_run import train_rank


def watched_rank(rank: int, world_size: int, arguments: list[str], port: int, log: str, engine: str) -> None:
    """Run one rank; its findings lie beside its log."""
    watch_step(Path(f"{log}-collectives-{rank}"))
    train_rank(rank, world_size, arguments, port, log, engine)
