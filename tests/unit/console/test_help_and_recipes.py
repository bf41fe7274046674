"""The one command: what its help says and does not import, and the recipes that come with it."""

import subprocess
import sys

import pytest
import yaml
from support.repository import REPOSITORY

from dora_dist import __main__ as console
from dora_dist.distributed.start_ranks import number_of_ranks
from dora_dist.setup import recipe

HEAVY = "{'torch', 'transformers', 'peft', 'datasets', 'deepspeed', 'matplotlib'}"


@pytest.mark.parametrize("command", ["", *console.COMMANDS])
def test_help_imports_nothing_heavy(command):
    program = (
        "import sys; from dora_dist.__main__ import main\n"
        f"try: main({[*command.split(), '--help']!r})\n"
        "except SystemExit as end: assert not end.code\n"
        f"assert not {HEAVY} & set(sys.modules), {HEAVY} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"usage: dora-dist {command or 'COMMAND'}" in done.stdout


def test_help_says_which_method_this_is_not(capsys):
    console.main(["--help"])
    assert "not Weight-Decomposed DoRA" in capsys.readouterr().out


def test_an_unknown_command_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"'trian' is not a command; did you mean train\?"):
        console.main(["trian"])


def test_every_recipe_is_listed_with_a_title_and_printed_as_it_is(capsys):
    recipe.main([])
    lines, _, note = capsys.readouterr().out.partition("\n\n")
    listed = dict(line.split(maxsplit=1) for line in lines.splitlines())
    files = {path.relative_to(REPOSITORY / "configs") for path in (REPOSITORY / "configs").rglob("*.yaml")}
    assert listed.keys() == {str(path.with_suffix("")) for path in files}
    assert "compare/NAME is for dora-dist compare" in note
    # A sentence that is longer than a line of the comment is there to its end; those of runs come first.
    assert listed["compare/sst2"].endswith("; budget in components")
    assert next(iter(listed)).startswith("llama3-")
    recipe.main(["llama3-8b_dynamic-lora_nf4"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["quantization"] == "nf4"


def test_an_unknown_recipe_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="'quickstrat' is no recipe; did you mean quickstart"):
        recipe.main(["quickstrat"])


def test_the_batch_scripts_are_written_into_a_new_folder_only(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ValueError, match=r"--slurm is .*full, which is not empty"):
        recipe.main(["--slurm", str(tmp_path / "full")])
    recipe.main(["--slurm", str(tmp_path / "new")])
    assert (tmp_path / "new" / "slurm" / "one_node.sbatch").is_file()
    assert (tmp_path / "new" / "launch" / "zero2.json").is_file()
    assert not (tmp_path / "new" / "slurm" / "site.sh").exists()


@pytest.mark.parametrize(("engine", "wanted", "message"), [("zero2", 0, "at least 1"), ("none", 2, "set it to zero2")])
def test_numbers_of_ranks_that_cannot_be_are_refused(engine, wanted, message):
    with pytest.raises(ValueError, match=f"--processes is {wanted}, but .*{message}"):
        number_of_ranks(engine, wanted)
