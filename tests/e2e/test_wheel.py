"""What is installed from a wheel, outside of the checkout: the same program, with its launch files and recipes."""

import json
import subprocess
import tarfile
import zipfile

import pytest
from support.repository import REPOSITORY
from support.tiny_run import write_config
from support.wheel import build_wheel, install_wheel, run_installed

pytestmark = pytest.mark.full("install")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    return install_wheel(built[0], tmp_path_factory.mktemp("environment"))


def test_the_sdist_builds_the_same_wheel_with_all_that_is_shipped(built):
    wheel, sdist = built
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("launch", "configs", "slurm"):
        tracked = subprocess.run(["git", "ls-files", folder], cwd=REPOSITORY, capture_output=True, text=True)
        files = tracked.stdout.split() if tracked.returncode == 0 else []
        assert {f"dora_dist/shipped/{name}" for name in files} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {f"dora_dist/page/{name}" for name in ("page.js", "page.css")} <= names
    with tarfile.open(sdist) as archive:
        stored = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in names if name.startswith("dora_dist/") and "/shipped/" not in name} <= stored


def test_it_trains_outside_of_the_checkout(installed, tmp_path):
    config = write_config(tmp_path, training={"save_steps": 1000})
    run_installed(installed, tmp_path, "train", config)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["final_event"]


def test_recipes_and_batch_scripts_come_with_it(installed, tmp_path):
    assert "llama3-8b_dynamic-lora_nf4" in run_installed(installed, tmp_path, "recipe")
    run_installed(installed, tmp_path, "recipe", "--slurm", "jobs")
    assert (tmp_path / "jobs" / "slurm" / "rank.sh").is_file()
    assert (tmp_path / "jobs" / "launch" / "zero2.json").is_file()
