"""The rule of dependency (DESIGN.md section 5), read from the source: arrows only go down."""

import ast
import re
import sys
import tokenize
from pathlib import Path

import pytest
from repository import REPOSITORY

PACKAGE = REPOSITORY / "dora_dist"

# A module may import those below its own level only. A new module belongs here too: decide where it stands.
LEVELS = [
    {
        "adapter_config",
        "command",
        "launch",
        "loading",
        "quiet",
        "importance",
        "schedule",
        "training_section",
        "allocation",
        "chunked_loss",
        "data.squad_file",
        "regularizer",
        "engine",
        "events",
        "folding",
        "metrics",
        "model_shape",
        "planted",
        "planted.patterns",
        "planted.recovery",
        "table",
        "benchmark",
        "benchmark.clock",
        "compare",
        "compare.selection",
        "compare.statistics",
        "benchmark.paired",
        "benchmark.peak",
        "benchmark.shapes",
        "preview",
        "preview.tokens",
        "doctor",
        "doctor.facts",
        "doctor.node",
        "doctor.units",
    },
    {"meeting", "tasks"},
    {
        "watch",
        "activations",
        "head",
        "benchmark.options",
        "compare.launching",
        "compare.methods",
        "data_section",
        "preemption",
        "quantization",
        "data",
        "data.rows",
        "data.read",
        "data.mixture",
        "data.plan",
        "doctor.grouping",
        "planted.options",
        "quickstart",
        "quickstart.world",
        "quickstart.backbone",
    },
    {
        "adapted_linear",
        "agreement",
        "backbone",
        "budget",
        "rebasing",
        "benchmark.base",
        "benchmark.figure",
        "benchmark.record",
        "benchmark.scoring",
        "config",
        "data.chat",
        "data.shorten",
        "doctor.device",
        "memory",
        "merge",
        "quickstart.text",
        "targets",
        "verify",
    },
    {"criterion", "layer", "planted.teacher"},
    {"compare.settings", "gated_mlp", "shared_input"},
    {
        "controller",
        "compare.plan",
        "data.encode",
        "doctor.network",
        "doctor.storage",
        "model",
        "quickstart.folder",
        "skipping",
        "world",
    },
    {
        "benchmark.contestants",
        "data.batches",
        "objective",
        "data.answers",
        "data.labelled",
        "data.summaries",
        "doctor.examination",
        "planted.training",
        "quickstart.__main__",
        "records",
    },
    {"benchmark.comparison", "data.sources", "evaluation", "planted.experiment", "shards"},
    {
        "benchmark.point",
        "build_data",
        "checkpoint",
        "label_evaluation",
        "planted.figure",
        "question_evaluation",
        "summary_evaluation",
        "report",
    },
    {"planted.__main__", "preview.choice"},
    {"benchmark.process", "compare.figure", "compare.outcome", "preview.figures", "resume", "trained", "trainer"},
    {"benchmark.growth", "settle", "formats"},
    {"build", "preview.course"},
    {"export", "generate", "prepare", "estimate", "benchmark.__main__", "compare.peers", "preview.contents"},
    {
        "dry_run",
        "preview.page",
        "preview.terminal",
        "doctor.findings",
        "doctor.device_findings",
        "doctor.shared_findings",
    },
    {"preview.__main__", "train", "doctor.report"},
    {"compare.cell", "doctor.__main__"},
    {"compare.worker"},
    {"compare.results"},
    {"compare.__main__"},
]
PURE = ["importance", "schedule", "allocation", "regularizer"]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"}


def imports(name: str) -> set[str]:
    """Full names of all that a module imports, anywhere in it: ``torch``, ``dora_dist.adapter.layer``."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
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


def level(name: str) -> int:
    matches = [number for number, names in enumerate(LEVELS) if name in names]
    assert len(matches) == 1, f"give {name} one level in {Path(__file__).name}"
    return matches[0]


@pytest.mark.parametrize("name", SOURCES)
def test_no_module_imports_one_above_it(name):
    assert all(level(name) > level(other) for other in own_imports(name)), own_imports(name)


@pytest.mark.parametrize("name", PURE)
def test_the_method_imports_torch_and_the_standard_library_only(name):
    roots = {full.split(".")[0] for full in imports(name)}
    assert roots - set(sys.stdlib_module_names) <= {"torch"}
    assert "torch.distributed" not in imports(name)


def test_the_layer_knows_no_rank_no_schedule_and_no_configuration_of_a_run():
    assert own_imports("layer") <= {"adapted_linear", "adapter_config", "quantization"}
    assert own_imports("adapted_linear") <= {"quantization"}
    assert own_imports("gated_mlp") | own_imports("shared_input") <= {
        "adapted_linear",
        "layer",
        "model_shape",
        "quantization",
    }
    for name in ("layer", "adapted_linear", "gated_mlp", "shared_input"):
        assert not {full for full in imports(name) if full.startswith(("torch.distributed", "accelerate", "deepspeed"))}


def test_a_configuration_stops_at_the_builder():
    users = {name for name in SOURCES if "config" in own_imports(name)}
    assert not users & {"controller", "trainer", "agreement", "model", "evaluation", "checkpoint", "records"}


def test_only_agreement_uses_collectives():
    users = {name for name in SOURCES if any(full.startswith("torch.distributed") for full in imports(name))}
    users |= {name for name, path in SOURCES.items() if re.search(r"torch\.distributed\.|\bdist\.", path.read_text())}
    assert "agreement" in users
    assert users <= {"agreement", "world", "meeting"}
    # The meeting place is a key-value store beside the process group: ranks can use it while collectives hang.
    assert {full for full in imports("meeting") if full.startswith("torch")} == {"torch.distributed"}
    assert not re.search(r"init_process_group|\bdist\.", SOURCES["meeting"].read_text())
    if "world" in users:  # sets the process group up; whatever ranks tell each other goes through Agreement
        collectives = r"\b(all_reduce|all_gather\w*|broadcast\w*|reduce|scatter\w*|gather_object|barrier|send|recv)\("
        calls = re.findall(rf"(?:dist|torch\.distributed)\.{collectives}", SOURCES["world"].read_text())
        assert not calls


def test_only_the_engine_file_touches_deepspeeds_parameters():
    users = {
        name for name, path in SOURCES.items() if re.search(r"\bsafe_(set|get)_\w+|\b_hp_mapping", path.read_text())
    }
    assert users == {"engine"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_no_identifier_is_a_bare_dora(path):
    """Not Weight-Decomposed DoRA, which PEFT calls so."""
    with tokenize.open(path) as file:
        names = {token.string for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.NAME}
    words = {name: re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name) for name in names - {"dora_dist"}}
    assert not [name for name, parts in words.items() if "dora" in map(str.lower, parts) or name.lower() == "dora"]
