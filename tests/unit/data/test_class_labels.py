import json

import pytest
import torch
from support.byte_tokenizer import byte_tokenizer
from support.tiny_encoders import pair_tokenizer

from dora_dist.config.data import DataConfig
from dora_dist.data.batches import LabelledCollator, labelled
from dora_dist.data.encoding.classification import class_names
from dora_dist.data.encoding.encoder import EncodingRules, UnusableRowError
from dora_dist.data.row_formats import build_encoder
from dora_dist.setup.run_data import prepare_data

PAIR = {"sentence1": "w1 w2", "sentence2": "w3", "label": "yes"}
SINGLE = {"sentence1": "w4", "label": 1}


def encode(rows, tokenizer=None, **rules):
    encoder = build_encoder(
        tokenizer or pair_tokenizer(), EncodingRules(**{"format": "classification", "max_length": 10, **rules})
    )
    lines = [json.dumps(row) for row in rows]
    places = [f"row {number}" for number in range(1, len(rows) + 1)]
    return encoder({"place": places, "json": lines, "flaw": [""] * len(rows), "filled": [False] * len(rows)})


def prepare(folder, rows, held_out=(), tokenizer=None, **settings):
    paths = {}
    for name, part in (("train", rows), ("eval", held_out)):
        if part:
            paths[name] = str(folder / f"{name}.jsonl")
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    config = DataConfig(**paths, cache_dir=str(folder / "cache"), workers=1, **settings)
    return prepare_data(config, tokenizer or pair_tokenizer(), "sequence_classification")


def test_sentences_and_pairs_are_encoded_as_the_tokenizer_does_it():
    tokenizer = pair_tokenizer()
    columns = encode([SINGLE, PAIR, SINGLE])
    for ids, types, texts in zip(
        columns["input_ids"], columns["token_type_ids"], [("w4",), ("w1 w2", "w3"), ("w4",)], strict=True
    ):
        expected = tokenizer(*texts)
        assert ids == expected["input_ids"]
        assert types == expected["token_type_ids"]
    assert columns["token_type_ids"][1] == [0, 0, 0, 0, 1, 1]
    assert columns["label"] == ["1", "yes", "1"]


def test_a_tokenizer_that_knows_no_types_gives_none():
    tokenizer = byte_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert encode([{**PAIR, "label": "x"}], tokenizer, max_length=50)["token_type_ids"] == [[]]


def test_the_longer_sentence_is_truncated_first_and_what_is_lost_is_counted():
    row = {"sentence1": " ".join(["w1"] * 9), "sentence2": "w2 w3", "label": "yes"}
    columns = encode([row], overlong="truncate")
    assert pair_tokenizer().decode(columns["input_ids"][0]) == "<s> w1 w1 w1 w1 w1 </s> w2 w3 </s>"
    assert columns["removed"] == [4]
    assert len(columns["token_type_ids"][0]) == 10
    assert encode([row], overlong="drop")["note"] == ["14 tokens, more than data.max_length 10"]
    with pytest.raises(UnusableRowError, match=r"row 1 has 14 tokens, more than data\.max_length 10: raise it"):
        encode([row])


def test_a_length_without_room_for_a_sentence_is_refused():
    with pytest.raises(ValueError, match=r"data\.max_length is 3, but the tokenizer alone puts 3 tokens"):
        encode([PAIR], max_length=3)


def test_the_hash_of_an_example_depends_on_all_of_it():
    rows = [PAIR, {**PAIR, "label": "no"}, {**PAIR, "sentence1": "w1", "sentence2": "w2 w3"}, PAIR]
    first, relabelled, split, again = encode(rows)["key"]
    assert first == again
    assert len({first, relabelled, split}) == 3


@pytest.mark.parametrize(
    ("row", "labels", "message"),
    [
        ({"sentence1": " ", "label": 1}, "classes", "'sentence1' is empty"),
        ({"sentence1": "w1", "sentence2": 3, "label": 1}, "classes", "'sentence2' must be text, got 3"),
        ({"sentence1": "w1"}, "classes", "'label' is missing"),
        ({"sentence1": "w1", "label": None}, "classes", "'label' must be text or a number, got null"),
        ({"sentence1": "w1", "label": " "}, "classes", "'label' is empty"),
        ({"sentence1": "w1", "label": 0.5}, "classes", "must name a class.*got 0.5; for numbers set data.labels"),
        (
            {"sentence1": "w1", "label": "high"},
            "regression",
            "must be a number, got 'high'; for classes set data.labels",
        ),
        ({"sentence1": "w1", "label": "nan"}, "regression", "must be a number, got 'nan'"),
        ({"sentence1": "w1", "label": True}, "regression", "must be a number, got True"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_field(row, labels, message):
    with pytest.raises(UnusableRowError, match=f"^row 2: field .*{message}"):
        encode([SINGLE, row], labels=labels)
    assert encode([SINGLE, row], labels=labels, bad_rows="skip")["status"] == [0, 1]


def test_numbers_are_read_from_text():
    rows = [{**SINGLE, "label": label} for label in ("3.800", 2, -0.5)]
    columns = encode(rows, labels="regression")
    read = labelled(None).read
    examples = [read({"input_ids": [1], "token_type_ids": [], "label": label}) for label in columns["label"]]
    assert [example["labels"] for example in examples] == [3.8, 2.0, -0.5]


def test_classes_have_a_fixed_order():
    assert class_names(["10", "9", "-1", "9"]) == ["-1", "9", "10"]
    assert class_names(["not_entailment", "entailment", "2"]) == ["2", "entailment", "not_entailment"]


def test_labels_are_numbered_over_all_sources_and_recorded(tmp_path):
    data = prepare(tmp_path, [PAIR, {**PAIR, "label": "no"}, {**PAIR, "label": "maybe"}], [{**PAIR, "label": "no"}])
    assert data.labels == ["maybe", "no", "yes"]
    assert data.train[0].format == "classification"
    assert prepare(tmp_path, [{**PAIR, "label": "4"}, {**PAIR, "label": 4.5}], labels="regression").labels is None


def test_a_held_out_label_that_training_never_saw_is_refused(tmp_path):
    rows = [PAIR, {**PAIR, "label": "no"}]
    with pytest.raises(
        ValueError, match=r"eval\.jsonl, line 2: the label 'No' of held-out data is not in .* whose labels are no, yes"
    ):
        prepare(tmp_path, rows, [PAIR, {**PAIR, "label": "No"}])


def test_a_single_class_is_refused(tmp_path):
    with pytest.raises(ValueError, match="all labels of the training data are 'yes'"):
        prepare(tmp_path, [PAIR, PAIR])


def test_rows_of_another_task_are_told_to_be_so(tmp_path):
    with pytest.raises(ValueError, match=r"classification needs sentence1, label.*would be text, which is for another"):
        prepare(tmp_path, [{"text": "w1"}])


def test_a_batch_is_padded_on_the_right_and_has_a_label_a_row():
    columns = encode([PAIR, SINGLE])
    read = labelled(["1", "yes"]).read
    rows = [
        [read({name: columns[name][number] for name in ("input_ids", "token_type_ids", "label")})]
        for number in range(2)
    ]
    batch = LabelledCollator(pair_tokenizer(), with_types=True)(rows)
    assert batch["input_ids"].tolist() == [columns["input_ids"][0], [*columns["input_ids"][1], 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6]
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [1, 0]
    assert "token_type_ids" not in LabelledCollator(pair_tokenizer(), with_types=False)(rows)


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has neither a padding nor an end-of-sequence token, and task sequence_class"):
        prepare(tmp_path, [PAIR, {**PAIR, "label": "no"}], tokenizer=pair_tokenizer(pad_token=None))
