"""What is installed from a wheel, outside of the checkout: the same program, with its launch files and recipes."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest
from support.repository import REPOSITORY
from support.tiny_run import write_config


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel that was built from the sdist, and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The folder of programs of an environment that has the wheel, and this one's packages for what it requires."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-index", str(built[0])], check=True, timeout=120)
    (packages / "requirements.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder / "bin"


def run(installed, folder, *arguments):
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DS_ACCELERATOR")}
    environment = {**inherited, "PATH": f"{installed}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "-1"}
    command = ["dora-dist", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_sdist_builds_the_same_wheel_with_all_that_is_shipped(built):
    wheel, sdist = built
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("launch", "configs", "slurm"):
        tracked = subprocess.run(["git", "ls-files", folder], cwd=REPOSITORY, capture_output=True, text=True)
        files = tracked.stdout.split() if tracked.returncode == 0 else []
        assert {f"dora_dist/shipped/{name}" for name in files} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    with tarfile.open(sdist) as archive:
        stored = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in names if name.startswith("dora_dist/") and "/shipped/" not in name} <= stored


def test_it_trains_outside_of_the_checkout(installed, tmp_path):
    config = write_config(tmp_path, training={"save_steps": 1000})
    run(installed, tmp_path, "train", config)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["final_event"]


def test_recipes_and_batch_scripts_come_with_it(installed, tmp_path):
    assert "llama3-8b_dynamic-lora_nf4" in run(installed, tmp_path, "recipe")
    run(installed, tmp_path, "recipe", "--slurm", "jobs")
    assert (tmp_path / "jobs" / "slurm" / "rank.sh").is_file()
    assert (tmp_path / "jobs" / "launch" / "zero2.json").is_file()
