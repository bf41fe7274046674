"""The loss without logits, against the loss from logits."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from support import tiny_models
from support.tiny_models import VOCABULARY, adapt, load_base, shake, tiny_model, tokens, trainable
from support.tiny_run import tiny_tokenizer
from torch import nn
from torch.nn import functional
from transformers import CohereConfig, Gemma2Config, GraniteConfig, MixtralConfig, PhiConfig

from dora_dist.base_model import chunked_loss
from dora_dist.base_model.chunked_loss import (
    CHUNK_BYTES,
    IGNORED,
    DeferredLogits,
    chunk_length,
    chunked_cross_entropy,
    obstacle,
)
from dora_dist.benchmark.operations import Operations
from dora_dist.benchmark.peak import rise_of_allocator
from dora_dist.config.parse import load_config
from dora_dist.data.batches import predicting
from dora_dist.setup.build import load_model, try_loss_without_logits

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}
"""Of a loss and of gradients, relative to the largest."""


@pytest.fixture
def small_chunks(monkeypatch):
    """Five positions of the tiny models at a time, so that the last chunk is not full."""
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 5 * 4 * VOCABULARY)


@pytest.fixture(autouse=True)
def architectures(monkeypatch):
    more = {"gemma2": Gemma2Config, "granite": GraniteConfig, "cohere": CohereConfig}
    more |= {"mixtral": MixtralConfig, "phi": PhiConfig}
    monkeypatch.setattr(tiny_models, "ARCHITECTURES", {**tiny_models.ARCHITECTURES, **more})


def assert_close(found, expected, tolerance):
    found, expected = found.detach().double(), expected.detach().double()
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def problem(dtype, bias):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 9, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, 16, generator=generator, dtype=torch.float64).to(dtype)
    offset = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    targets = torch.randint(0, VOCABULARY, (4, 9), generator=generator)
    targets[0, 2:7] = targets[2] = IGNORED
    return hidden, weight, offset, targets


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_sum_and_gradient_are_those_of_the_cross_entropy(small_chunks, dtype, bias):
    hidden, weight, offset, targets = problem(dtype, bias)
    logits = functional.linear(hidden, weight, offset)
    expected = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    found = chunked_cross_entropy(hidden, weight, offset, targets)
    assert found.dtype is dtype
    assert_close(found, expected, TOLERANCES[dtype])
    (gradient,) = torch.autograd.grad(found / 7, hidden, retain_graph=True)
    assert_close(gradient, torch.autograd.grad(expected / 7, hidden)[0], TOLERANCES[dtype])
    assert gradient[2].count_nonzero() == 0
    again = torch.autograd.grad(found / 7, hidden)[0]
    assert torch.equal(gradient, again)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_has_a_float32_softmax_and_loss(small_chunks, autocast):
    """torch's own function would give the loss in bfloat16, whose steps are 1 in 256."""
    hidden, weight, _, targets = problem(torch.float32 if autocast else torch.bfloat16, False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = functional.linear(hidden, weight)
        assert logits.dtype is torch.bfloat16
        expected = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        found = chunked_cross_entropy(hidden, weight, None, targets)
    assert found.dtype is torch.float32
    assert_close(found, expected, 1e-6)
    (gradient,), (wanted,) = torch.autograd.grad(found, hidden), torch.autograd.grad(expected, hidden)
    assert gradient.dtype is hidden.dtype
    assert_close(gradient, wanted, 1e-2)


@pytest.mark.parametrize("items", [517, 773, 12345])
@pytest.mark.parametrize("factor", [1.0, 0.37])
def test_bfloat16_does_not_round_a_factor_of_all_gradients(items, factor):
    """A count of tokens rounded to bfloat16 would change every gradient by up to 0.4 %, and always the same way."""
    hidden, weight, _, targets = problem(torch.bfloat16, False)
    loss = chunked_cross_entropy(hidden, weight, None, targets, torch.tensor(items))
    found = torch.autograd.grad(factor * loss, hidden)[0].double()
    exact = hidden.detach().double().requires_grad_()
    logits = functional.linear(exact, weight.double())
    sum_ = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    wanted = torch.autograd.grad(factor * sum_ / items, exact)[0]
    assert float((found * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=2e-3)


def test_memory_that_runs_out_is_no_reason_for_the_path_that_needs_more(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(chunked_loss, "_loss_and_gradient", fail)
    with pytest.raises(torch.OutOfMemoryError):
        chunked_loss.proved(tiny_model().requires_grad_(False))


def test_large_logits_do_not_overflow():
    hidden = torch.tensor([[1000.0, -1000.0]], requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.eye(2), None, torch.tensor([1]))
    assert float(loss.detach()) == 2000
    assert torch.autograd.grad(loss, hidden)[0].tolist() == [[1, -1]]


def test_a_loss_that_is_not_finite_stays_so():
    hidden = torch.tensor([[torch.nan, 1.0], [0.0, 1.0]], requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.eye(2), None, torch.tensor([1, 0]))
    assert not torch.isfinite(loss)
    assert not torch.isfinite(torch.autograd.grad(loss, hidden)[0][0]).any()


def test_a_chunk_is_bounded_by_its_bytes():
    assert chunk_length(131072) == 256
    assert chunk_length(512) * 512 * 4 == CHUNK_BYTES
    assert chunk_length(10**9) == 1


def micro_batch(kind="padded", rows=3, length=12, seed=2):
    """Inputs of a forward: rows that differ in length, or hold two examples each; prompts have no labels."""
    ids = tokens(rows, length, seed)
    labels = ids.clone()
    labels[:, :4] = IGNORED
    if kind == "packed":
        labels[:, length // 2 : length // 2 + 2] = IGNORED
        return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(length // 2).repeat(rows, 2)}
    mask = torch.ones_like(ids)
    mask[1, -3:] = mask[2, -1:] = 0
    labels[mask == 0] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in trainable(model).values()])


@pytest.mark.parametrize("items", [None, 11, torch.tensor(11)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_of_a_model_in_float64(small_chunks, tied, kind, items):
    model = shake(adapt(tiny_model(tie_word_embeddings=tied))).double().train()
    batch = micro_batch(kind)
    labels = batch["labels"]
    logits = model(**{**batch, "labels": None}).logits
    total = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    expected = total / ((labels[:, 1:] != IGNORED).sum() if items is None else items)
    wanted = gradients_of(model, expected)
    assert model.use_loss_without_logits() is None
    outputs = model(**batch, num_items_in_batch=items)
    assert outputs.logits is None
    assert_close(outputs.loss, expected, 1e-12)
    assert_close(gradients_of(model, outputs.loss), wanted, 1e-12)


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize(("architecture", "quantization"), [("llama", "nf4"), ("llama", "int8"), ("qwen3", "none")])
def test_loss_and_gradients_of_a_quantized_model(tmp_path, small_chunks, architecture, quantization, kind):
    tiny_model(architecture).save_pretrained(tmp_path)
    model = shake(adapt(load_base(tmp_path, quantization))).train()
    batch, items = micro_batch(kind), torch.tensor(20)
    expected = model(**batch, num_items_in_batch=items).loss
    wanted = gradients_of(model, expected)
    assert model.use_loss_without_logits() is None
    found = model(**batch, num_items_in_batch=items).loss
    assert_close(found, expected, 2e-6)
    assert_close(gradients_of(model, found), wanted, 1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_add_up_to_the_batch(small_chunks, checkpointing):
    model = shake(adapt(tiny_model())).double().train()
    batch, items = micro_batch(rows=4), torch.tensor(25)
    expected = gradients_of(model, model(**batch, num_items_in_batch=items).loss)
    assert model.use_loss_without_logits() is None
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.zero_grad()
    for row in range(4):
        part = {name: value[row : row + 1] for name, value in batch.items()}
        model(**part, num_items_in_batch=items).loss.backward()
    found = torch.cat([parameter.grad.flatten() for parameter in trainable(model).values()])
    # The model's own loss is float32, whatever the logits are.
    assert_close(found, expected, 1e-6)


def test_positions_found_with_the_batch_give_the_same_and_nobody_waits_for_them(small_chunks):
    model = shake(adapt(tiny_model())).train()
    assert model.use_loss_without_logits() is None
    labels = tokens().clone()
    labels[:, :3] = IGNORED
    results = []
    for batch in ({}, {"predicting": predicting(labels)}):
        model.zero_grad()
        with Operations() as found:
            loss = model(input_ids=tokens(), labels=labels, num_items_in_batch=torch.tensor(9), **batch).loss
            loss.backward()
        results.append([loss, *(parameter.grad for parameter in trainable(model).values())])
        assert found.counts["aten::nonzero"] == (not batch)
    assert all(map(torch.equal, *results))


def test_a_trajectory_on_nf4_is_that_with_logits(tmp_path, small_chunks):
    tiny_model().save_pretrained(tmp_path)
    losses = []
    for without in (False, True):
        model = shake(adapt(load_base(tmp_path))).train()
        if without:
            assert model.use_loss_without_logits() is None
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, eps=1e-5)
        losses.append([])
        for step in range(8):
            optimizer.zero_grad()
            loss = model(**micro_batch(seed=100 + step), num_items_in_batch=torch.tensor(21)).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(set(losses[0])) == 8


def test_a_micro_batch_without_labels_adds_nothing():
    model = shake(adapt(tiny_model())).train()
    batch = micro_batch()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    assert model.use_loss_without_logits() is None
    loss = model(**batch, num_items_in_batch=torch.tensor(5)).loss
    assert float(loss) == 0
    assert gradients_of(model, loss).count_nonzero() == 0
    assert torch.isnan(model(**batch).loss)  # as the model's own


def test_logits_are_there_wherever_they_can_be_wanted():
    model = shake(adapt(tiny_model())).train()
    batch = micro_batch()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    expected = model(**batch)
    ids = model.eval().generate(input_ids=batch["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert model.use_loss_without_logits() is None
    for training, given in ((True, inputs), (False, batch), (False, inputs)):
        assert torch.equal(model.train(training)(**given).logits, expected.logits)
    assert torch.equal(model.eval()(**batch).loss, expected.loss)
    assert torch.equal(
        model.generate(input_ids=batch["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0), ids
    )
    with model.loss_only(), torch.no_grad():
        outputs = model(**batch)
    assert outputs.logits is None
    assert_close(outputs.loss, expected.loss, 2e-6)
    assert model(**batch).logits is not None


def test_an_error_in_a_forward_leaves_the_model_as_it_was():
    model = adapt(tiny_model()).train()
    assert model.use_loss_without_logits() is None
    base, head = model.get_base_model(), model.get_base_model().get_output_embeddings()
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[VOCABULARY]]), labels=torch.tensor([[0]]))
    assert "forward" not in vars(head)
    assert "_loss_function" not in vars(base)
    assert torch.is_tensor(head(torch.zeros(1, 64)))


def test_the_proof_leaves_nothing_behind():
    model = adapt(tiny_model(), dropout=0.5).train()
    before = torch.get_rng_state()
    assert model.use_loss_without_logits() is None
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_base_model().get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize(("architecture", "changes"), [("mixtral", {"output_router_logits": True}), ("phi", {})])
def test_losses_beside_the_cross_entropy_and_biased_heads_are_kept(small_chunks, architecture, changes):
    """Experts' balance is part of Mixtral's loss; Phi's head has a bias."""
    base = tiny_model(architecture, **changes)
    if architecture == "phi":
        nn.init.normal_(base.lm_head.bias)
    model = shake(adapt(base, target_modules=["q_proj", "v_proj"])).train()
    expected = model(**micro_batch()).loss
    wanted = gradients_of(model, expected)
    assert model.use_loss_without_logits() is None
    found = model(**micro_batch())
    assert found.logits is None
    assert_close(found.loss, expected, 2e-6)
    assert_close(gradients_of(model, found.loss), wanted, 1e-5)


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0}, "final_logit_softcapping changes its logits before the loss"),
        ("granite", {"logits_scaling": 8.0}, "logits_scaling changes"),
        ("cohere", {"logit_scale": 0.5}, "logit_scale changes"),
        # Divides by 1, which the configuration does not tell.
        ("granite", {}, "does not compute a loss without them (TypeError: unsupported operand"),
    ],
)
def test_a_model_that_changes_its_logits_keeps_them(architecture, changes, reason):
    model = shake(adapt(tiny_model(architecture, **changes))).train()
    expected = model(**micro_batch())
    assert reason in model.use_loss_without_logits()
    found = model(**micro_batch())
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.logits, expected.logits)


def test_a_quantized_or_trained_head_keeps_its_logits():
    base = tiny_model()
    assert obstacle(base) == "its head is trained"
    base.lm_head = Linear4bit(64, VOCABULARY, bias=False)
    assert obstacle(base.requires_grad_(False)) == "its head is a Linear4bit, not a plain linear layer"


def test_a_loss_of_its_own_is_kept():
    base = tiny_model().requires_grad_(False)
    base.loss_function = lambda logits, labels, vocab_size, **_: logits.float().pow(2).mean()
    assert adapt(base).use_loss_without_logits() == "its loss is <lambda>"


@pytest.mark.parametrize(("wrong", "what"), [("loss", "loss"), ("gradient", "gradient")])
def test_other_numbers_are_found_by_the_proof(monkeypatch, wrong, what):
    right = chunked_cross_entropy

    def one_percent_off(hidden, *arguments):
        if wrong == "loss":
            return 1.01 * right(hidden, *arguments)
        return right(1.01 * hidden - 0.01 * hidden.detach(), *arguments)

    monkeypatch.setattr(chunked_loss, "chunked_cross_entropy", one_percent_off)
    model = adapt(tiny_model()).train()
    assert f"without them its {what} differs by 0.01" in model.use_loss_without_logits()
    assert model(**micro_batch()).logits is not None


def test_placeholders_are_no_tensors():
    """Whatever a model does to logits between its head and its loss must fail."""
    placeholder = DeferredLogits(torch.zeros(1, 2, 3), nn.Linear(3, 4))
    for operation in (
        lambda: placeholder * 2,
        lambda: placeholder.float(),
        lambda: placeholder[:, -1:],
        lambda: torch.tanh(placeholder),
        lambda: functional.softmax(placeholder, -1),
    ):
        with pytest.raises((TypeError, AttributeError)):
            operation()


def test_peak_memory_of_a_step_with_128k_words():
    """By the allocator. With logits there are three float32 tensors of them; without, one of a chunk."""
    words, rows, length = 131072, 4, 128
    all_logits = 4 * rows * length * words
    model = adapt(tiny_model(vocab_size=words, hidden_size=32, max_position_embeddings=length)).train()
    ids = tokens(rows, length)

    def step():
        model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(ids.numel())).loss.backward()

    peaks = []
    for leave_out in (False, True):
        if leave_out:
            assert model.use_loss_without_logits() is None
        step()
        with rise_of_allocator() as found:
            step()
        peaks.append(found.peak)
    print(f"before {peaks[0] / 2**20:.0f} MiB, after {peaks[1] / 2**20:.0f} MiB")
    assert peaks[0] > 3 * all_logits
    assert peaks[1] < CHUNK_BYTES + 0.02 * all_logits
    assert 0.51 * all_logits > CHUNK_BYTES


def test_peak_memory_of_an_evaluation_with_128k_words():
    words = 131072
    model = adapt(tiny_model(vocab_size=words, hidden_size=32, max_position_embeddings=128)).eval()
    assert model.use_loss_without_logits() is None
    ids = tokens(4, 128)
    with torch.no_grad(), model.loss_only(), rise_of_allocator() as found:
        model(input_ids=ids, labels=ids)
    assert found.peak < CHUNK_BYTES + 0.02 * 4 * ids.numel() * words


@pytest.mark.parametrize(("architecture", "said"), [("llama", False), ("gemma2", True)])
def test_a_run_says_why_it_takes_the_memory_of_logits(tmp_path, capfd, architecture, said):
    tiny_model(architecture).save_pretrained(tmp_path / "model")
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: run\nmodel: {{path: {tmp_path}/model}}\ndata: {{train: x, max_length: 8}}\n")
    config = load_config(path, ["--distributed.engine", "none"])
    model = load_model(config, torch.device("cpu"), tiny_tokenizer())
    try_loss_without_logits(model)
    assert (model.train()(**micro_batch()).logits is None) is not said
    text = "the loss of Gemma2ForCausalLM takes the logits of all positions at once, and their memory: final_logit_soft"
    assert (text in capfd.readouterr().err) is said
