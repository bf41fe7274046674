"""``model.fuse``: the same numbers with it and without, and without it nothing of the base is replaced."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.base_layers import drop_the_same
from support.same_gradients import assert_same_gradients, relative_error
from support.tiny_encoders import tiny_classifier, tiny_reader, tiny_summarizer, write_classification
from support.tiny_models import adapt, load_base, loss_and_gradients, shake, tiny_model, tokens, trainable
from support.tiny_run import tiny_tokenizer, write_config
from torch import Tensor, nn
from transformers import PreTrainedModel

from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.adapter.targets import resolve_targets
from dora_dist.base_model.head import head_modules, task_of
from dora_dist.base_model.load import BaseModelSpec, load_skeleton
from dora_dist.config.parse import load_config
from dora_dist.setup.build import load_model, try_loss_without_logits
from dora_dist.setup.resolve import check_method

TOLERANCES = {"loss": 2e-6, "gradient": 1e-5}
"""Those of docs/numerics.md in float32, relative to the largest entry."""


def fused_and_not(base: PreTrainedModel, **changes: Any) -> list[DynamicLoraModel]:
    return [shake(adapt(copy.deepcopy(base), fuse, **changes)).train() for fuse in (True, False)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_loss_and_gradients_are_the_same(tmp_path: Path, quantization: str, dropout: float, checkpointing: bool):
    tiny_model().save_pretrained(tmp_path)
    results = []
    for model in fused_and_not(load_base(tmp_path, quantization), dropout=dropout):
        model.adapted_layers()["model.layers.0.self_attn.q_proj"].component_mask[1] = False
        assert (model.use_loss_without_logits() is None) is model.fused
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if not model.fused:
            for block in model.get_base_model().model.layers:
                attention, mlp = block.self_attn, block.mlp
                drop_the_same([attention.q_proj, attention.k_proj, attention.v_proj])
                drop_the_same([mlp.gate_proj, mlp.up_proj])
        torch.manual_seed(7)
        results.append(loss_and_gradients(model))
    (fused_loss, fused), (loss, gradients) = results
    assert relative_error(fused_loss, loss) <= TOLERANCES["loss"]
    masked = [name for name in gradients if "layers.0.self_attn.q_proj" in name]
    for name in masked:
        assert fused[name].count_nonzero() == gradients[name].count_nonzero() < gradients[name].numel()
    assert_same_gradients(fused, gradients, TOLERANCES["gradient"])


def test_logits_and_gradients_in_float64_are_the_same_to_its_rounding():
    """Of the loss from logits, as transformers' own is float32."""
    outputs, gradients = [], []
    for model in fused_and_not(tiny_model().double(), dtype="float64"):
        logits = model(input_ids=tokens()).logits
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        (logits * weights).sum().backward()
        outputs.append(logits.detach())
        gradients.append({name: parameter.grad for name, parameter in trainable(model).items()})
    assert relative_error(*outputs) <= 1e-12
    assert_same_gradients(*gradients, 1e-12)


def test_the_held_out_loss_is_the_same_and_without_the_switch_there_are_logits():
    losses = []
    for model in fused_and_not(tiny_model()):
        model.use_loss_without_logits()
        with torch.no_grad(), model.eval().loss_only():
            outputs = model(input_ids=tokens(), labels=tokens(), num_items_in_batch=1)
        assert (outputs.logits is None) is model.fused
        losses.append(outputs.loss)
    assert relative_error(*losses) <= TOLERANCES["loss"]


def traces(model: PeftModel) -> dict[str, Any]:
    """Of every module of the base: its class, what of its own replaces a method, and how many hooks it has."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if ".lora_" not in name:
            own = sorted({"forward", "_loss_function", "loss_function"} & vars(module).keys())
            hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
            kind = "adapted layer" if hasattr(module, "lora_A") else type(module).__name__
            found[name] = (kind, own, hooks)
    return found


def untouched(base: PreTrainedModel) -> dict[str, Any]:
    """The same of PEFT's LoRA on the same layers, with the same heads."""
    config = LoraConfig(
        target_modules=resolve_targets(base, "all-linear"),
        modules_to_save=head_modules(base) or None,
        task_type=task_of(base).peft_type,
    )
    return traces(get_peft_model(base, config, autocast_adapter_dtype=False))


BASES: dict[str, Callable[[], PreTrainedModel]] = {
    "causal language model": tiny_model,
    "classifier": tiny_classifier,
    "classifier of Llama": lambda: tiny_classifier("llama"),
    "reader": tiny_reader,
    "summarizer": lambda: tiny_summarizer("bart"),
}


@pytest.mark.parametrize("kind", BASES)
def test_without_it_nothing_is_replaced_hooked_or_shared(kind: str):
    base = BASES[kind]()
    touched, left = (adapt(copy.deepcopy(base), fuse) for fuse in (True, False))
    assert all(layer.shared is None for layer in left.adapted_layers().values())
    assert traces(left) == untouched(base)
    assert traces(left) != traces(touched), "the switch leaves nothing alone here: the test proves nothing"


def test_without_it_nothing_is_replaced_for_the_time_of_a_forward_either(tmp_path: Path, capfd: pytest.CaptureFixture):
    """As a run loads the model: the head and the loss are the base's own within training and evaluation."""
    config = load_config(write_config(tmp_path), ["--distributed.engine", "none", "--model.fuse", "false"])
    model = load_model(config, torch.device("cpu"), tiny_tokenizer())
    try_loss_without_logits(model)
    assert "takes the logits of all positions at once, and their memory: fuse is false" in capfd.readouterr().err
    base = model.get_base_model()
    head = base.get_output_embeddings()
    seen = []
    head.register_forward_hook(
        lambda module, inputs, output: seen.append(
            (type(module), type(output), "forward" in vars(module), "_loss_function" in vars(base))
        )
    )
    batch = {"input_ids": tokens(), "labels": tokens()}
    assert model.train()(**batch).logits is not None
    with model.eval().loss_only():
        assert model(**batch).logits is not None
    assert seen == [(nn.Linear, Tensor, False, False)] * 2


@pytest.mark.parametrize("architecture", ["bert", "roberta", "llama"])
def test_a_float32_head_over_bfloat16_is_the_same_under_autocast(architecture: str):
    """As accelerate wraps the forward where the compute dtype is bfloat16 without DeepSpeed."""
    results = []
    for model in fused_and_not(tiny_classifier(architecture).bfloat16()):
        assert {parameter.dtype for parameter in model.head_parameters().values()} == {torch.float32}
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens() % 40 + 5, labels=torch.tensor([0, 2])).loss
        loss.backward()
        results.append(
            (loss.detach(), {name: p.grad for name, p in trainable(model).items() if "modules_to_save" in name})
        )
    (fused_loss, fused), (loss, gradients) = results
    if architecture != "llama":  # its decoder layers are fused, which rounds otherwise
        assert torch.equal(fused_loss, loss)
        assert all(torch.equal(fused[name], gradient) for name, gradient in gradients.items())
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("compute", "adapter", "fuse", "works"),
    [
        ("float32", "auto", "false", True),
        ("float32", "float32", "false", True),
        ("float32", "float64", "false", False),
        ("float32", "float64", "true", True),
        ("bfloat16", "auto", "false", True),
        ("bfloat16", "float32", "false", True),  # under autocast
        ("bfloat16", "float64", "false", False),
        ("bfloat16", "float64", "true", True),
    ],
)
def test_a_head_that_cannot_read_what_the_base_computes_is_refused(
    tmp_path: Path, compute: str, adapter: str, fuse: str, works: bool
):
    overrides = f"""--distributed.engine ddp --model.compute_dtype {compute} --adapter.dtype {adapter}
        --model.fuse {fuse}"""
    config = load_config(write_classification(tmp_path), overrides.split())
    skeleton = load_skeleton(BaseModelSpec.of(config.model, config.task))
    if works:
        check_method(config, skeleton, 12)
    else:
        message = (
            f"adapter.dtype is {adapter}, but model.fuse is false.*compute dtype {compute}.*set adapter.dtype to auto"
        )
        with pytest.raises(ValueError, match=message):
            check_method(config, skeleton, 12)
