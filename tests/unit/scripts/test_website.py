"""The documents become a site without a warning: every link and heading is found, every page is in the navigation."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.repository import REPOSITORY

pytestmark = pytest.mark.full("docs")


def build(configuration: Path, folder: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(configuration), "--site-dir", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(autouse=True)
def builder():
    pytest.importorskip("mkdocs", reason='the package mkdocs is not installed: pip install "dora-dist[docs]"')


def test_the_site_builds_without_a_warning(tmp_path):
    result = build(REPOSITORY / "website" / "mkdocs.yml", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "WARNING  -" not in result.stderr
    assert "is not included" not in result.stderr, "a page is missing in the nav of website/mkdocs.yml"
    for document in (REPOSITORY / "docs").glob("*.md"):
        page = tmp_path / "docs" / document.stem / "index.html"
        assert "</html>" in page.read_text(encoding="utf-8"), document
    picture = "benchmarks/results/evidence/e2e-early/ranks.png"
    assert (tmp_path / picture).read_bytes() == (REPOSITORY / picture).read_bytes()


def test_a_link_that_leads_nowhere_would_be_noticed(tmp_path):
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.md").write_text("[away](nowhere.md)")
    (tmp_path / "mkdocs.yml").write_text("site_name: x\ndocs_dir: pages\n")
    assert build(tmp_path / "mkdocs.yml", tmp_path / "html").returncode != 0
