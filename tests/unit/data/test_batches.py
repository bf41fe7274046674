"""Batches as the model gets them; the examples of a packed row do not see each other."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.byte_tokenizer import byte_tokenizer
from support.tiny_models import ARCHITECTURES, VOCABULARY, tiny_model
from support.tiny_run import tiny_tokenizer

from dora_dist.data.batches import FlattenedCollator, PackedCollator, PaddedCollator, PlannedRows, PredictingCollator
from dora_dist.data.encoding.encoder import IGNORED
from dora_dist.data.plan import TrainingPlan
from dora_dist.evaluation.packing import check_packing


def rows_of(*lengths: int) -> Dataset:
    source = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, VOCABULARY, (n,), generator=source).tolist() for n in lengths]
    return Dataset.from_dict({"input_ids": ids, "spans": [[n // 2, n] for n in lengths]})


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    model = tiny_model(request.param)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(5)  # at transformers' initial size the output hardly depends on the input
    return model


def logits_alone(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_logits_of_a_packed_example_are_those_of_it_alone(model, tokenizer, attention):
    model.set_attn_implementation(attention)
    examples = rows_of(12, 5, 1, 7, 9, 3)
    plan = TrainingPlan(np.array([0, 5, 4, 3, 1, 2]), np.array([0, 2, 4, 6]))
    rows = PlannedRows(examples, plan)
    batch = PackedCollator(tokenizer)([rows[number] for number in range(len(rows))])
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    seen = 0
    for number in range(plan.num_rows):
        position = 0
        for index in plan.row(number):
            ids = examples[int(index)]["input_ids"]
            found = packed[number, position : position + len(ids)]
            torch.testing.assert_close(found, logits_alone(model, ids), rtol=1e-4, atol=1e-4)
            position += len(ids)
            seen += 1
    assert seen == 6


def test_the_loss_of_packed_rows_is_that_of_padded_ones(model, tokenizer):
    examples = rows_of(12, 5, 7, 9, 3)
    one = [
        [{"input_ids": e["input_ids"], "labels": [IGNORED] * e["spans"][0] + e["input_ids"][e["spans"][0] :]}]
        for e in examples
    ]
    padded = PaddedCollator(tokenizer)(one)
    packed = PackedCollator(tokenizer)([one[0] + one[1], one[2] + one[3] + one[4]])
    assert (padded["labels"] != IGNORED).sum() == (packed["labels"] != IGNORED).sum()
    losses = [model(**batch, num_items_in_batch=1).loss for batch in (padded, packed)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


def test_packing_is_proved_on_the_model_itself(model, tokenizer):
    check_packing(model, PackedCollator(tokenizer))

    def leaky(rows):
        batch = PackedCollator(tokenizer)(rows)
        return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}

    with pytest.raises(ValueError, match=r"the examples of a row see each other .*set data\.batching to by_length"):
        check_packing(model, leaky)


def test_padding_has_no_label_and_is_masked_even_if_it_is_the_end_token():
    tokenizer = byte_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    end = tokenizer.eos_token_id
    long, short = ({"input_ids": [1] * n + [end], "labels": [IGNORED] * n + [end]} for n in (4, 2))
    batch = PaddedCollator(tokenizer)([[long], [short]])
    assert batch["labels"].tolist() == [[IGNORED] * 4 + [end], [IGNORED] * 2 + [end] + [IGNORED] * 2]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


def test_for_flash_attention_all_examples_stand_in_one_row():
    rows = [[{"input_ids": [1, 2], "labels": [1, 2]}], [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 2]
    batch = FlattenedCollator()(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 3, 4, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2]]
    assert batch["labels"].tolist() == [[IGNORED, 2, IGNORED, 4, 5, IGNORED, 4, 5]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 5, 8]


def test_positions_that_have_a_target_are_found_with_the_batch():
    labels = torch.tensor([[IGNORED, IGNORED, 5, 6], [IGNORED, 7, IGNORED, 8]])
    batch = PredictingCollator(lambda _: {"labels": labels})([])
    assert batch["predicting"].tolist() == [1, 2, 4, 6]
    assert batch["labels"] is labels
