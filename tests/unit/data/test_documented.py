"""The examples of docs/data.md are of the format that they stand under, and encode."""

import json
import re

import pytest
from support.byte_tokenizer import byte_tokenizer
from support.repository import REPOSITORY
from support.tiny_tokenizer import word_pair_tokenizer

from dora_dist.config.parse import load_config
from dora_dist.config.tasks import CAUSAL_LM, TASKS
from dora_dist.data.encoding.chat import choose_template
from dora_dist.data.encoding.encoder import EncodingRules
from dora_dist.data.row_formats import FORMATS, build_encoder, tell_format

TEXT = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^### (\w+)\n.*?```jsonl\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE))


def test_every_format_has_an_example():
    assert EXAMPLES.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_an_example_is_what_it_is_said_to_be(name):
    lines = EXAMPLES[name].splitlines()
    formats = next((task.formats for task in TASKS.values() if name in task.formats), [name])
    assert tell_format([json.loads(line) for line in lines], "docs", {}, formats) == name
    if name in TASKS[CAUSAL_LM].formats:
        tokenizer = byte_tokenizer("chatml")
        rules = EncodingRules(format=name, template=choose_template(tokenizer).text)
    else:
        tokenizer = word_pair_tokenizer(EXAMPLES[name])
        rules = EncodingRules(format=name)
    encoder = build_encoder(tokenizer, rules)
    columns = encoder({"place": lines, "json": lines, "flaw": [""] * len(lines), "filled": [False] * len(lines)})
    assert all(columns["input_ids"])


def test_the_example_of_a_mixture_loads(tmp_path):
    (mixture,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: x\nmodel: {{path: y}}\n{mixture}")
    config = load_config(path)
    assert [source.name for source in config.data.train_sources] == ["en", "finnish", "name"]
    assert [source.name for source in config.data.eval_sources] == ["en", "finnish"]
