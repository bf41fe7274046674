"""The program of a spawned process, one rank of a small world on this machine. Its imports are light: heavy libraries
print when they are imported, and must be silenced before."""

import json
import os
from pathlib import Path

from dora_dist.benchmark.options import Options
from dora_dist.benchmark.shapes import Shape
from dora_dist.console.library_warnings import quiet_libraries

POINT = "point.json"


def run_rank(rank: int, size: int, threads: int, folder: Path, shape: Shape, options: Options) -> None:
    """Measure together with the other ranks; the first rank writes the figures to the file :data:`POINT` in
    ``folder``."""
    os.environ["RANK"] = str(rank)  # only the first rank prints
    quiet_libraries()
    import torch

    from dora_dist.benchmark.growth.point import measure_point
    from dora_dist.distributed.world import join_at_file

    torch.set_num_threads(threads)
    device = torch.device("cpu")
    agreement = join_at_file(folder / "meeting", rank, size, device)
    point = measure_point(size, shape, options, agreement, average=True)
    if rank == 0:
        (folder / POINT).write_text(json.dumps(point))
    agreement.close()
