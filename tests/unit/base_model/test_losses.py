from types import SimpleNamespace

import pytest
import torch
from support.tiny_encoders import tiny_classifier, tiny_reader, tiny_summarizer

from dora_dist.base_model.losses import class_losses, mean_over_tokens, span_losses, squared_errors, token_losses
from dora_dist.data.encoding.encoder import IGNORED


@pytest.mark.parametrize("architecture", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_their_mean_is_the_models_own_loss(architecture, dtype):
    ids = torch.arange(24).reshape(3, 8) + 5
    for num_labels, losses, labels in (
        (3, class_losses, torch.tensor([2, 0, 1])),
        (1, squared_errors, torch.tensor([0.5, -2.0, 3.25], dtype=dtype)),
    ):
        model = tiny_classifier(architecture, num_labels=num_labels).to(dtype)
        own = model(input_ids=ids, labels=labels).loss
        found = losses(model(input_ids=ids), {"labels": labels})
        assert found.shape == (3,)
        assert found.dtype == dtype
        torch.testing.assert_close(found.mean(), own)


def test_low_precision_logits_are_not_summed_in_low_precision():
    logits = torch.tensor([[3.0, 1.0]], dtype=torch.bfloat16)
    found = class_losses(SimpleNamespace(logits=logits), {"labels": torch.tensor([0])})
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.log1p(torch.exp(torch.tensor([-2.0]))))


def test_the_loss_of_spans_is_the_models_own_where_nothing_is_padded():
    model, ids = tiny_reader().double(), torch.arange(24).reshape(3, 8) + 5
    labels = torch.tensor([[2, 4], [0, 0], [7, 7]])
    own = model(input_ids=ids, start_positions=labels[:, 0], end_positions=labels[:, 1]).loss
    found = span_losses(model(input_ids=ids), {"labels": labels, "attention_mask": torch.ones_like(ids)})
    torch.testing.assert_close(found.mean(), own)


def test_the_loss_of_a_span_does_not_depend_on_padding():
    model, ids, labels = tiny_reader().double(), torch.arange(8)[None] + 5, torch.tensor([[2, 4]])
    losses = []
    for padding in (0, 5):
        row = torch.nn.functional.pad(ids, (0, padding))
        batch = {"labels": labels, "attention_mask": (row != 0).long()}
        losses.append(span_losses(model(input_ids=row, attention_mask=batch["attention_mask"]), batch))
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_the_loss_of_a_summary_is_the_models_own_over_the_tokens_of_the_batch(architecture):
    model, ids = tiny_summarizer(architecture).double(), torch.arange(16).reshape(2, 8) + 5
    labels = torch.tensor([[6, 7, 2], [8, 2, IGNORED]])
    own = model(input_ids=ids, labels=labels).loss
    inputs = model.prepare_decoder_input_ids_from_labels(labels)
    outputs = model(input_ids=ids, decoder_input_ids=inputs)
    torch.testing.assert_close(mean_over_tokens(outputs, labels, 5), own)
    torch.testing.assert_close(mean_over_tokens(outputs, labels, torch.tensor(10)), own / 2)
    assert token_losses(outputs, labels)[1, 2] == 0
