"""The wheel as a user installs it, in an environment of its own."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from support.repository import REPOSITORY


def build_wheel(folder: Path) -> tuple[Path, Path]:
    """The wheel, built from the sdist, and the sdist."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def install_wheel(wheel: Path, folder: Path) -> Path:
    """The folder of programs of an environment that has the wheel, and takes its requirements from this environment."""
    venv.create(folder, with_pip=False, symlinks=True)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-index", str(wheel)], check=True, timeout=120)
    (packages / "requirements.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder / "bin"


def run_installed(programs: Path, folder: Path, *arguments: object) -> str:
    """Run ``dora-dist`` of such an environment in a folder outside of the checkout; it must succeed. Returns its
    output."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DS_ACCELERATOR")}
    environment = {**inherited, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [str(programs / "dora-dist"), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
