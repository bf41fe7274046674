"""One cluster for all tests of this folder, and jobs as a user submits them."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.cluster import Cluster, UnavailableError, check_available, remove_stale
from support.repository import REPOSITORY
from support.wheel import build_wheel, install_wheel, run_installed


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two compute nodes, ``node1`` and ``node2``; ``cluster.py`` says what can be done to them."""
    try:
        check_available()
    except UnavailableError as error:
        pytest.skip(f"no Slurm cluster: {error}")
    remove_stale()
    made = Cluster()
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """A site file instead of the user's own: this Python, and logs out of the repository."""
    folder = tmp_path_factory.mktemp("site")
    path = folder / "site.sh"
    path.write_text(f'export PATH={Path(sys.executable).parent}:$PATH\nexport DORA_LOGS="{folder}/logs"\n')
    return path


@pytest.fixture(scope="session")
def wheel_folder(site, tmp_path_factory) -> Path:
    """A folder that ``dora-dist recipe --slurm`` has made, outside of the checkout, whose site has the wheel only."""
    folder = tmp_path_factory.mktemp("wheel")
    programs = install_wheel(build_wheel(folder / "dist")[0], folder / "environment")
    run_installed(programs, folder, "recipe", "--slurm", "jobs")
    (folder / "site.sh").write_text(f'export PATH={programs}:$PATH\nexport DORA_LOGS="{site.parent}/logs"\n')
    return folder


@pytest.fixture(scope="session")
def submit(cluster, site) -> Callable[..., str]:
    """``submit(script, options, arguments, folder, **environment)``: the number of the job."""

    def submitted(
        script: str, options: list[str], arguments: list[str], folder: Path = REPOSITORY, **environment: str
    ) -> str:
        output = f"--output={site.parent}/job-%j.out"
        fixed = {"DORA_SITE": str(site), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
        return cluster.sbatch(
            *("--cpus-per-task=1", output, *options, f"slurm/{script}", *arguments),
            cwd=folder,
            **{**fixed, **environment},
        )

    return submitted


@pytest.fixture(scope="session")
def printed(cluster, site) -> Callable[[str], str]:
    """``printed(job)``: what the batch script and the ranks of a job have printed, for messages and comparisons."""

    def text(job: str) -> str:
        logs = [site.parent / f"job-{job}.out", *sorted(site.parent.glob(f"logs/*-{job}/*"))]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in logs if path.exists())

    return text


os.environ.pop("SLURM_CONF", None)  # of a cluster that the user is on
