"""MetaMathQA and GSM8K as they are published, in the size of a test, and a model that has one answer to everything."""

import json
from pathlib import Path

import torch

from support.byte_tokenizer import byte_tokenizer
from support.tiny_models import tiny_model


def write_mathematics(folder: Path, train: int, test: int) -> Path:
    """``MetaMathQA-395K.json`` and ``gsm8k/{train,test}.jsonl`` in ``folder``: last digits of 0, 1 and so on.

    MetaMathQA asks each question that GSM8K trains on in other words, once with a short answer and once with one that
    is too long.
    """
    questions = [f"What is the last digit of {n}?" for n in range(train + test)]
    solved = [
        {"question": question, "answer": f"It is <<{n}%10={n % 10}>>{n % 10}.\n#### {n % 10}"}
        for n, question in enumerate(questions)
    ]
    (folder / "gsm8k").mkdir(parents=True)
    for split, rows in (("train", solved[:train]), ("test", solved[train:])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"gsm8k/{split}.jsonl").write_text(lines, encoding="utf-8")
    published = [
        {
            "type": "GSM_Rephrased",
            "query": f"How does {n} end?",
            "original_question": question,
            "response": f"{steps}\nThe answer is: {n % 10}",
        }
        for n, question in enumerate(questions[:train])
        for steps in ("Look at it.", "Look again. " * 110)
    ]
    (folder / "MetaMathQA-395K.json").write_text(json.dumps(published), encoding="utf-8")
    return folder


@torch.no_grad()
def save_model_that_says(letter: str, folder: Path) -> Path:
    """A decoder that writes one letter after every text, whatever its attention does. Its tokens are bytes, and its
    layers have room for rank 64.
    """
    tokenizer = byte_tokenizer("llama3")
    model = tiny_model(vocab_size=len(tokenizer), hidden_size=128, head_dim=32, max_position_embeddings=1024)
    model.get_input_embeddings().weight[:, 0] = 10
    model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(letter), 0] = 5
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
