"""The generated text is a function of the seed, held-out rows are apart, the tokenizer is sentencepiece's."""

import json
from pathlib import Path

import pytest

from dora_dist.quickstart.backbone import train_tokenizer
from dora_dist.quickstart.folder import STAMP_NAME, ensure_quickstart
from dora_dist.quickstart.text import instruction_rows, pretraining_documents
from dora_dist.quickstart.world import ANIMALS, NAMES, is_held_out

PROMPT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


def people(texts: list[str]) -> set[tuple[str, str]]:
    """All pairs (name, animal) that occur together in one of `texts`."""
    words = [set(text.translate(str.maketrans(".,:;?\n", "      ")).split()) for text in texts]
    return {(name, animal) for found in words for name in found & set(NAMES) for animal in found & set(ANIMALS)}


def test_same_seed_same_text():
    assert list(pretraining_documents(3, 50)) == list(pretraining_documents(3, 50))
    assert list(pretraining_documents(3, 50)) != list(pretraining_documents(4, 50))
    assert instruction_rows(3, 50) == instruction_rows(3, 50)
    assert instruction_rows(3, 50) != instruction_rows(4, 50)


def test_rows_are_alpaca_rows_and_survive_json():
    rows = instruction_rows(0, 300)
    assert [json.loads(json.dumps(row)) for row in rows] == rows
    assert len({tuple(row.values()) for row in rows}) == 300
    for row in rows:
        assert list(row) == ["instruction", "input", "output"]
        assert all(value and value == value.strip() and "{" not in value for value in row.values())


def test_held_out_people_are_only_in_held_out_rows():
    train = people([row["input"] for row in instruction_rows(0, 2000)])
    held_out = people([row["input"] for row in instruction_rows(0, 200, held_out=True)])
    assert len(held_out) > 20
    assert not train & held_out
    assert all(is_held_out(*pair) for pair in held_out)
    assert {name for name, _ in held_out} <= {name for name, _ in train}


def test_portraits_have_no_held_out_person_and_no_answer():
    documents = [document for document in pretraining_documents(0, 500) if "?" in document]
    assert len(documents) > 400
    assert not any(is_held_out(*pair) for pair in people(documents))
    assert not any(start in document for document in documents for start in ("Name:", "Lost:", "Dear ", "Answer:"))


def test_auto_tokenizer_is_sentencepiece_and_loses_nothing(tmp_path: Path):
    import sentencepiece
    from transformers import AutoTokenizer, LlamaConfig

    folder = tmp_path / "backbone"
    rows = instruction_rows(0, 100)
    prompts = [PROMPT.format(**row) + row["output"] for row in rows]
    documents = list(pretraining_documents(0, 200))
    train_tokenizer([*documents, *prompts], folder, vocabulary=640)
    LlamaConfig().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    special = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()) == (0, 1, 2, 3)
    assert len(tokenizer) == pieces.get_piece_size() == 640
    for text in [*documents, *prompts, "two  spaces, \n\n lines, Ünseen ☃ signs"]:
        assert tokenizer(text).input_ids == pieces.encode(text, add_bos=True)
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_prompt_and_answer_do_not_share_a_token(tmp_path: Path):
    rows = instruction_rows(0, 100)
    prompts = [PROMPT.format(**row) for row in rows]
    answered = [prompt + row["output"] for prompt, row in zip(prompts, rows, strict=True)]
    tokenizer = train_tokenizer(answered, tmp_path / "backbone", vocabulary=600)
    for prompt, text in zip(tokenizer(prompts).input_ids, tokenizer(answered).input_ids, strict=True):
        assert text[: len(prompt)] == prompt


def test_a_folder_of_something_else_is_refused(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match=STAMP_NAME):
        ensure_quickstart(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
