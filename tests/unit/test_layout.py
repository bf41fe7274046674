"""The rooms of the package and the rule between them, read from the source: imports only go down."""

import ast
import importlib
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from support.repository import REPOSITORY

PACKAGE = REPOSITORY / "dora_dist"
FACES = {"importance", "schedule", "allocation", "regularizer"}
"""Public modules, whose code is in ``method/``."""
COMMANDS = {
    *("train", "prepare", "estimate", "generate", "report", "preview", "export", "doctor", "quickstart", "evaluate"),
    "quantize",
}
EXPERIMENTS = {"benchmark", "planted", "compare"}
"""Commands that use the rest, and that nothing uses."""
FLOORS = [
    {"config", "console", "method"},
    {"distributed", "base_model", "data"},
    {"adapter"},
    {"runs"},
    {"evaluation", "memory", "page", "routing"},
    {"training"},
    {"setup"},
    {"stock_trainer"},
    COMMANDS | (EXPERIMENTS - {"compare"}),
    {"compare", "__main__"},
]
"""A room imports rooms of lower floors only, never one of its own floor."""
LARGEST_ROOM = 15


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}


def room(name: str) -> str:
    """The first part of a module's name: ``adapter`` of ``adapter.layer``."""
    return name.split(".")[0]


def imports(name: str, at_import_only: bool = False) -> set[str]:
    """Full names of all that a module imports: ``torch``, ``dora_dist.adapter.layer``."""
    found = set()
    for node in TREES[name].body if at_import_only else ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full.removeprefix("dora_dist.") in SOURCES else node.module)
    return found


def own_imports(name: str) -> set[str]:
    """Modules of this package that a module imports."""
    return {full.removeprefix("dora_dist.") for full in imports(name) if full.startswith("dora_dist.")}


def floor(name: str) -> int:
    (number,) = [number for number, rooms in enumerate(FLOORS) if name in rooms]
    return number


def modules_of(*rooms: str) -> list[str]:
    return [name for name in SOURCES if room(name) in rooms]


def test_the_top_level_holds_commands_rooms_and_public_modules_only():
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert there - {"__init__"} == set.union(*FLOORS) | FACES
    assert all((folder / "__init__.py").is_file() for folder in {path.parent for path in SOURCES.values()})


def test_no_room_is_a_shelf():
    folders = {path.parent for path in SOURCES.values()} - {PACKAGE}
    sizes = {folder: len([entry for entry in folder.iterdir() if entry.name != "__pycache__"]) for folder in folders}
    assert max(sizes.values()) <= LARGEST_ROOM, sizes


@pytest.mark.parametrize("name", [name for name in SOURCES if room(name) not in FACES | {"__init__"}])
def test_imports_go_down(name):
    others = {room(other) for other in own_imports(name)} - {room(name), "__version__"}
    assert all(floor(other) < floor(room(name)) for other in others), own_imports(name)


def test_experiments_are_imported_by_nobody():
    for name in SOURCES:
        assert not {room(other) for other in own_imports(name)} & (EXPERIMENTS - {room(name)}), name


def test_the_init_of_a_room_holds_a_docstring_and_nothing_else():
    for name, path in SOURCES.items():
        if path.name == "__init__.py" and path.parent != PACKAGE:
            assert [type(node) for node in TREES[name].body] == [ast.Expr], name


@pytest.mark.parametrize("name", modules_of("method"))
def test_the_method_imports_torch_and_the_standard_library_only(name):
    roots = {full.split(".")[0] for full in imports(name)}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "dora_dist"}
    assert {room(other) for other in own_imports(name)} <= {"method"}
    assert "torch.distributed" not in imports(name)


def test_a_configuration_is_read_without_torch():
    code = "import sys; import dora_dist.config.parse; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)


@pytest.mark.parametrize("name", sorted(FACES))
def test_a_public_module_gives_what_the_method_defines(name):
    face, code = (importlib.import_module(f"dora_dist.{where}{name}") for where in ("", "method."))
    defined = {node.name for node in TREES[f"method.{name}"].body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert {public for public in defined if not public.startswith("_")} <= set(face.__all__)
    assert all(getattr(face, public) is getattr(code, public) for public in face.__all__)


def test_adapted_layers_know_no_rank_and_no_configuration_of_a_run():
    for name in modules_of("adapter"):
        roots = {full.split(".")[0] for full in imports(name)}
        assert not roots & {"accelerate", "deepspeed"}, name
        assert not {full for full in imports(name) if full.startswith("torch.distributed")}, name


def test_a_configuration_stops_where_the_parts_of_a_run_are_built():
    """Rooms below ``setup`` neither take a configuration nor read one from a file, but for ``runs``, which records that
    of a run and opens it again, and ``memory.estimate``, which reckons from one."""
    users = {name for name in SOURCES if {"config.run", "config.parse"} & own_imports(name)}
    allowed = {"config", "setup", "runs"} | COMMANDS | EXPERIMENTS
    assert {name for name in users if room(name) not in allowed} <= {"memory.estimate"}


def test_only_agreement_uses_collectives():
    users = {name for name in SOURCES if any(full.startswith("torch.distributed") for full in imports(name))}
    users |= {name for name, path in SOURCES.items() if re.search(r"torch\.distributed\.|\bdist\.", path.read_text())}
    assert "distributed.agreement" in users
    assert users <= {
        f"distributed.{name}"
        for name in ("agreement", "store_agreement", "world", "rendezvous", "start_ranks", "sharded_base")
    }
    # These two use a key-value store beside the process group: ranks can use it while collectives hang.
    for name in ("distributed.store_agreement", "distributed.rendezvous"):
        assert {full for full in imports(name) if full.startswith("torch")} <= {"torch", "torch.distributed"}
        assert not re.search(r"init_process_group", SOURCES[name].read_text())
    # World sets the process group up; whatever ranks tell each other goes through Agreement.
    collectives = r"\b(all_reduce|all_gather\w*|broadcast\w*|reduce|scatter\w*|gather_object|barrier|send|recv)\("
    for name in users - {"distributed.agreement"}:
        assert not re.findall(rf"(?:dist|torch\.distributed)\.{collectives}", SOURCES[name].read_text())


def test_only_the_engine_file_touches_deepspeeds_parameters():
    names = r"\b(safe_(set|get)_\w+|_hp_mapping|(get_)?[hl]p_fragment\w*|param_group_index|single_partition_of_\w+)\b"
    users = {name for name, path in SOURCES.items() if re.search(names, path.read_text())}
    assert users == {"distributed.engine"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_no_identifier_is_a_bare_dora(path):
    """Not Weight-Decomposed DoRA, which PEFT calls so."""
    with tokenize.open(path) as file:
        names = {token.string for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.NAME}
    words = {name: re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name) for name in names - {"dora_dist"}}
    assert not [name for name, parts in words.items() if "dora" in map(str.lower, parts) or name.lower() == "dora"]
