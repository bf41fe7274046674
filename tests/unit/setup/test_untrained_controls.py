"""Control tokens of a chat template for which the base has no trained rows, as in a base that was not trained on
conversations: they are named before the training."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from support.tiny_models import tiny_model
from support.trained_run import character_tokenizer

from dora_dist.config.parse import load_config
from dora_dist.data.encoding.chat import choose_template
from dora_dist.setup.build import load_base, untrained_controls

START, END, OTHER = "<|im_start|>", "<|im_end|>", "<|other|>"


@pytest.fixture(scope="module")
def tokenizer():
    made = character_tokenizer()
    made.add_special_tokens({"additional_special_tokens": [START, END, OTHER]})
    made.chat_template = choose_template(made, "chatml").text
    return made


@pytest.fixture(scope="module")
def data(tokenizer):
    talk = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    ids = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"]
    source = SimpleNamespace(dataset=Dataset.from_dict({"input_ids": [ids] * 3}))
    return SimpleNamespace(template=tokenizer.chat_template, train=[source])


def base_of(tokenizer, tied=False, **rows):
    """A random base; of tokens, rows of the embedding or of the head that are set."""
    model = tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=tied)
    with torch.no_grad():
        for module, values in rows.items():
            weight = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}[module].weight
            for token, value in values.items():
                weight[tokenizer.convert_tokens_to_ids(token)] = value
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_nothing_is_said_of_random_rows_nor_of_tokens_that_the_data_do_not_have(tokenizer, data, tied):
    model = base_of(tokenizer, tied, embedding={OTHER: 0.0, "<pad>": 0.0})
    assert untrained_controls(model, tokenizer, data, []) is None


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ({"embedding": {START: 0.0, END: 0.0}}, f"{START}, {END}"),
        ({"embedding": {END: 1e-22}}, END),
        ({"embedding": {START: 0.02, OTHER: 0.02}}, START),
        ({"head": {END: 0.0}}, END),
    ],
)
def test_rows_of_nothing_and_equal_rows_are_named_with_what_to_do(tokenizer, data, rows, named):
    warning = untrained_controls(base_of(tokenizer, **rows), tokenizer, data, [])
    assert warning.startswith(f"warning: the chat template writes {named}, of which the base has rows that were never")
    assert "set model.path to" in warning
    assert "data.chat_template to plain" in warning


def test_what_the_model_never_writes_may_have_no_row_in_the_head(tokenizer, data):
    """So it is with the token that begins a text."""
    assert untrained_controls(base_of(tokenizer, head={START: 0.0}), tokenizer, data, []) is None


def test_new_tokens_and_plain_texts_are_not_concerned(tokenizer, data):
    model = base_of(tokenizer, embedding={START: 0.0})
    assert untrained_controls(model, tokenizer, data, [START]) is None
    assert untrained_controls(model, tokenizer, SimpleNamespace(template=None, train=data.train), []) is None


def test_the_base_of_a_run_is_looked_at(tokenizer, data, tmp_path, capsys):
    base_of(tokenizer, embedding={END: 0.0}).save_pretrained(tmp_path / "base")
    (tmp_path / "run.yaml").write_text(
        f"output_dir: {tmp_path}/run\ndata: {{train: nowhere.jsonl}}\nmodel: {{path: {tmp_path}/base}}\n"
    )
    config = load_config(tmp_path / "run.yaml")
    load_base(config, torch.device("cpu"), tokenizer, data=data)
    assert f"warning: the chat template writes {END}, of which" in capsys.readouterr().err
