"""What the documents say of keys, files, exit statuses and modules, against the code; their links lead somewhere."""

import dataclasses
import json
import re
from functools import cache
from typing import Any, get_type_hints

import pytest
from support.documents import DOCS, table_names
from support.repository import REPOSITORY
from transformers import TrainingArguments

from dora_dist.config.checks import ELSEWHERE
from dora_dist.config.parse import load_config
from dora_dist.config.run import RunConfig
from dora_dist.config.training import DEFAULT_TRAINING_ARGUMENTS
from dora_dist.runs import summary
from dora_dist.runs.records import RecordedEvent

DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
OLD_RUN = REPOSITORY / "tests" / "earlier_versions" / "73e868c" / "run"
LINK = re.compile(r"\]\(([^)\s]+)\)")


@cache
def keys() -> set[str]:
    """All keys of a configuration, sections included."""
    hints = get_type_hints(RunConfig)
    found = {"training"} | {f"training.{field.name}" for field in dataclasses.fields(TrainingArguments)}
    found |= {f"training.{name}" for name in DEFAULT_TRAINING_ARGUMENTS}
    for section in dataclasses.fields(RunConfig):
        found.add(section.name)
        if dataclasses.is_dataclass(hints[section.name]):
            found |= {f"{section.name}.{key.name}" for key in dataclasses.fields(hints[section.name])}
    return found


def anchors(path) -> set[str]:
    """Anchors of the headings of a document, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document):
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", ["coming_from.md", "choosing.md", "tutorial.md", "errors.md", "glossary.md"])
def test_keys_that_a_document_names_exist(name):
    sections = "|".join(sorted(key for key in keys() if "." not in key))
    text = (DOCS / name).read_text(encoding="utf-8")
    named = set(re.findall(rf"`((?:{sections})\.\w+)", text)) - {f"training.{other}" for other in ("X",)}
    assert named
    assert named <= keys(), named - keys()


def test_every_name_that_an_error_knows_from_other_trainers_is_in_the_table():
    text = (DOCS / "coming_from.md").read_text(encoding="utf-8")
    assert all(f"| `{key}" in text for key in ELSEWHERE)


def names_of_other_trainers() -> list[tuple[str, str]]:
    """Key here and a name of it elsewhere that is no key here, for every such name of the first table."""
    found = []
    for row in re.findall(r"^\| `.*$", (DOCS / "coming_from.md").read_text(encoding="utf-8"), re.MULTILINE):
        here, *others = row.strip("| ").split(" | ")
        names = dict.fromkeys(re.findall(r"`(\w+)(?:: [^`]*)?`", " ".join(others)))
        found += [(re.findall(r"[\w.]+", here)[0], name) for name in names if name not in keys()]
    return found


@pytest.mark.parametrize(("here", "name"), names_of_other_trainers())
def test_a_name_of_another_trainer_is_answered_with_the_key_of_its_row(tmp_path, here, name):
    file = tmp_path / "run.yaml"
    file.write_text(f"output_dir: x\nmodel: {{path: m}}\ndata: {{train: t}}\n{name}: 1\n")
    with pytest.raises(ValueError, match=rf"^unknown key {name}\b.*\b{re.escape(here)}\b"):
        load_config(file)


def test_the_table_of_names_is_read_to_its_end():
    assert {("data.eval", "val_size"), ("model.path", "base_model"), ("evaluation.before", "eval_on_start")} <= set(
        names_of_other_trainers()
    )


def test_the_fields_of_an_event_and_of_a_summary_are_documented():
    assert table_names("files.md", "allocation.jsonl") == {field.name for field in dataclasses.fields(RecordedEvent)}
    assert table_names("files.md", "summary.json") == set(summary.summarize(OLD_RUN))


def results(path: str) -> Any:
    """A file of results."""
    return json.loads((REPOSITORY / "benchmarks" / "results" / path).read_text(encoding="utf-8"))


def test_the_numbers_of_the_readme_are_those_of_the_files():
    text = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    rows = results("evidence/planted/planted.json")["rows"]
    half = {row["method"]: row["divergence"]["mean"] for row in rows if row["pattern"] == "half"}
    assert f"falls from {half['uniform']:.3f} (uniform LoRA) to {half['gate_sensitivity']:.3f} by" in text
    assert f"the score of the paper reaches {half['frobenius']:.3f}" in text
    (record,) = [
        record
        for record in results("benchmark.json")["records"]
        if record["shape"] == "512x8" and not record["checkpointing"]
    ]
    step, work = record["contestants"]["dynamic"], results("operations.json")["records"][0]["contestants"]["dynamic"]
    assert f"takes {step['time_ratio']['median']:.2f} of the time and {step['memory_ratio']:.2f} of the peak" in text
    assert f"dispatches {work['ratio']:.2f} of its operations" in text
    groups = results("evidence/default-again/results.json")["groups"]
    differences = [group["difference"] for group in groups if group["method"] == "default"]
    ahead = sorted(-difference["mean"] for difference in differences if difference["p_holm"] < 0.001)
    assert (len(ahead), len(differences)) == (3, 5)
    assert f"by {ahead[0]:.3f} to {ahead[-1]:.3f} of held-out loss (ten" in text
    undecided = sorted((d for d in differences if d["p_holm"] >= 0.001), key=lambda d: d["mean"])
    assert [f"{difference['p_holm']:.2f}" for difference in undecided] == ["0.08", "0.08"]
    (_, repeated) = results("evidence/default-e2e/results.json")["groups"]
    assert repeated["difference"]["p_holm"] < 0.001
    assert f"on E2E by {-repeated['difference']['mean']:.3f} (twenty more seeds" in text
    assert f"after {-undecided[0]['mean']:.3f} with an adjusted p of 0.08 on the first ten" in text
    assert f"it is behind by {undecided[1]['mean']:.2f}, also with 0.08" in text
    (_, default) = results("evidence/smollm2-default/results.json")["groups"]
    assert f"the default is ahead by {-default['difference']['mean']:.3f} on E2E" in text
    (_, default) = results("evidence/smollm2-gsm8k/results.json")["groups"]
    assert f"by {-default['difference']['mean']:.3f} on GSM8K" in text
    assert f"{results('soak.json')[1]['killed']['kills']} kills in half an hour" in text


def test_every_module_with_a_workaround_is_there():
    text = (DOCS / "upstream.md").read_text(encoding="utf-8")
    modules = re.findall(r"`([a-z_]+(?:/[a-z_]+)+(?:\.py|\.sh|/))", text)
    assert len(modules) > 20
    for module in modules:
        assert (
            (REPOSITORY / module).exists()
            or (REPOSITORY / "dora_dist" / module).exists()
            or module.startswith(("unit/", "e2e/", "distributed/test_"))
        ), module
