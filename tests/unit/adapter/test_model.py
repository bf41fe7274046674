import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.tiny_models import (
    ARCHITECTURES,
    PROJECTIONS,
    adamw_losses,
    adapt,
    logits,
    loss_and_gradients,
    quantized_model,
    shake,
    tiny_model,
    trainable,
)
from torch import nn
from transformers import Trainer, TrainingArguments

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.adapter.model import DynamicLoraModel, add_dynamic_lora
from dora_dist.adapter.plain_lora import read_lora_adapter
from dora_dist.config.adapter import DynamicLoraConfig
from dora_dist.config.format_version import ADAPTER_WEIGHTS


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_model().save_pretrained(folder)
    return folder


def make_base(saved_model: Path, quantization: str) -> nn.Module:
    return tiny_model() if quantization == "none" else quantized_model(saved_model, quantization)


QUANTIZATIONS = pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])


@QUANTIZATIONS
@pytest.mark.parametrize("init", ["lora", "paper"])
def test_the_model_starts_exactly_as_its_base(saved_model, quantization, init):
    base = make_base(saved_model, quantization)
    base.eval()
    model = adapt(base, init=init)  # before any forward, as 4-bit weights need it
    with model.disable_adapter():
        expected = logits(model)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(shake(model)), expected)


@pytest.mark.parametrize(
    ("quantization", "dtype", "tolerance"),
    # Rounding differs in the last place only (the order of gate, scale and B); AdamW carries it along.
    [("none", "float64", 1e-10), ("nf4", "float32", 1e-5)],
)
def test_with_lora_init_and_frozen_gates_training_is_that_of_stock_lora(saved_model, quantization, dtype, tolerance):
    bases = [make_base(saved_model, quantization) for _ in range(2)]
    if dtype == "float64":
        bases = [base.double() for base in bases]
    ours = adapt(bases[0], target_rank=4, alpha=8.0, train_gates=False, dtype=dtype)
    config = LoraConfig(r=6, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    stock = get_peft_model(bases[1], config, autocast_adapter_dtype=False).to(getattr(torch, dtype))
    pairs = []
    for name, layer in ours.adapted_layers().items():
        other = stock.get_submodule(f"base_model.model.{name}")
        pairs += [(layer.lora_a, other.lora_A["default"].weight), (layer.lora_b, other.lora_B["default"].weight)]
    with torch.no_grad():
        for parameter, other in pairs:
            other.copy_(parameter)
    assert len(pairs) == len(trainable(ours)) == len(trainable(stock)) == 2 * 2 * len(PROJECTIONS)
    first = None
    for loss, stock_loss in zip(adamw_losses(ours, 10), adamw_losses(stock, 10), strict=True):
        first = first or loss
        torch.testing.assert_close(loss, stock_loss, rtol=tolerance, atol=0)
        for parameter, other in pairs:
            torch.testing.assert_close(parameter, other, rtol=tolerance, atol=tolerance)
    assert loss != first


@QUANTIZATIONS
def test_gradients_reach_every_adapter_parameter(saved_model, quantization):
    model = shake(adapt(make_base(saved_model, quantization))).train()
    _, gradients = loss_and_gradients(model)
    assert len(gradients) == 3 * 2 * len(PROJECTIONS)
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all(), name
        assert gradient.any(), name


def count_forwards(layer: nn.Module) -> list[int]:
    calls = [0]
    layer.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return calls


@pytest.mark.parametrize(
    ("architecture", "quantization"), [*((name, "none") for name in ARCHITECTURES), ("llama", "nf4"), ("llama", "int8")]
)
def test_gradient_checkpointing_changes_nothing(saved_model, architecture, quantization):
    base = tiny_model(architecture) if quantization == "none" else quantized_model(saved_model, quantization)
    model = shake(adapt(base, dropout=0.1)).train()
    calls = count_forwards(model.adapted_layers()["model.layers.0.mlp.up_proj"])
    torch.manual_seed(7)
    loss, gradients = loss_and_gradients(model)
    assert calls == [1]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(7)
    checkpointed_loss, checkpointed = loss_and_gradients(model)
    assert calls == [3], "the layer must have been computed again in the backward"
    assert torch.equal(checkpointed_loss, loss)
    for name, gradient in gradients.items():
        assert gradient.any(), name
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-6, atol=1e-9)


def test_dropout_is_active_in_training_and_off_in_evaluation():
    model = shake(adapt(tiny_model(), dropout=0.5))
    without = shake(adapt(tiny_model()))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(without))


def test_masked_components_do_not_touch_the_model_however_large():
    model, other = shake(adapt(tiny_model())), shake(adapt(tiny_model()))
    with torch.no_grad():
        for changed, layer in zip(model.adapted_layers().values(), other.adapted_layers().values(), strict=True):
            changed.component_mask[0] = False
            layer.gate[0] = 0
            for parameter in (changed.lora_a[0], changed.lora_b[:, 0], changed.gate[:1]):
                parameter.mul_(1e6)
    (loss, gradients), (other_loss, _) = loss_and_gradients(model), loss_and_gradients(other)
    assert torch.equal(loss, other_loss)
    for name, gradient in gradients.items():
        masked = gradient[:, 0] if ".lora_B." in name else gradient[0]
        assert not masked.any(), name


@pytest.mark.parametrize(("train_gates", "parts"), [(True, 3), (False, 2)])
def test_only_adapter_parameters_are_trainable(train_gates, parts):
    model = adapt(tiny_model(), train_gates=train_gates)
    layers = model.adapted_layers().values()
    expected = {id(p) for layer in layers for p in (layer.lora_a, layer.lora_b, layer.gate)[:parts]}
    assert {id(parameter) for parameter in trainable(model).values()} == expected
    assert len(expected) == parts * 2 * len(PROJECTIONS)


@pytest.mark.parametrize("init", ["lora", "paper"])
def test_the_same_seed_gives_bitwise_the_same_adapter(init):
    base = tiny_model()

    def start(global_seed: int, **changes: object) -> dict[str, torch.Tensor]:
        torch.manual_seed(global_seed)
        return adapt(copy.deepcopy(base), init=init, **changes).state_dict()

    first = start(1)
    again = start(2)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    # A layer's values do not depend on which others there are.
    alone = start(3, target_modules=["down_proj"])
    assert 0 < len(alone) < len(first)
    assert all(torch.equal(alone[name], first[name]) for name in alone)
    other = start(1, seed=6)
    assert all(torch.equal(first[name], other[name]) != (".lora_A." in name) for name in first if ".lora_A." in name)


@pytest.mark.parametrize(
    ("dtype", "base_dtype", "expected"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float32, torch.float32),
        ("float32", torch.bfloat16, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
    ],
)
def test_the_adapter_has_the_dtype_asked_for(dtype, base_dtype, expected):
    model = adapt(tiny_model().to(base_dtype), dtype=dtype)
    assert {parameter.dtype for parameter in trainable(model).values()} == {expected}
    assert logits(shake(model)).dtype == base_dtype


def test_the_ranks_are_those_of_the_configuration():
    model = adapt(tiny_model(), target_rank=3, alpha=10.0, target_modules=["q_proj"])
    assert list(model.adapted_layers()) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    for layer in model.adapted_layers().values():
        assert layer.gate.shape == (5,)
        assert layer.scale == 2.0
        assert layer.component_mask.all()


def test_the_trainer_accepts_the_model_on_a_4_bit_base(saved_model, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="quantized"):
        Trainer(model=quantized_model(saved_model, "nf4"), args=arguments)
    model = adapt(quantized_model(saved_model, "nf4"))
    assert isinstance(model, PeftModel)
    assert Trainer(model=model, args=arguments).model is model


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_state_dict_holds_the_adapter_only_and_can_be_loaded(saved_model, quantization):
    model = shake(adapt(make_base(saved_model, quantization)))
    with torch.no_grad():
        next(iter(model.adapted_layers().values())).component_mask[1] = False
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert len(state) == 4 * 2 * len(PROJECTIONS)
    assert all(".lora_" in name or name.endswith(".component_mask") for name in state)
    fresh = adapt(make_base(saved_model, quantization))
    result = fresh.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert torch.equal(logits(fresh.eval()), logits(model.eval()))


def prune_unevenly(model: DynamicLoraModel) -> dict[str, int]:
    """Ranks from 0 to 3 by layer; some components are out by their mask, some by a gate of 0."""
    ranks = {}
    with torch.no_grad():
        for number, (name, layer) in enumerate(model.adapted_layers().items()):
            ranks[name] = rank = number % 4 if number != 1 else 0
            layer.component_mask[rank:] = False
            if rank == 3:
                layer.component_mask[2] = True
                layer.gate[2] = 0
                ranks[name] = 2
    return ranks


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_stock_peft_loads_what_is_saved_with_equal_logits(tmp_path, architecture):
    base = tiny_model(architecture)
    untouched = logits(base)
    model = shake(adapt(copy.deepcopy(base), alpha=3.0)).eval()
    ranks = prune_unevenly(model)
    assert 0 in ranks.values()
    assert len(set(ranks.values())) >= 3
    model.save_pretrained(tmp_path / "adapter")
    assert not any("gate" in name.rsplit("lora_")[-1] for name in load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS))
    stock = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert not any(isinstance(module, DynamicLoraLinear) for module in stock.modules())
    loaded = {name: module.r["default"] for name, module in stock.named_modules() if hasattr(module, "lora_A")}
    assert loaded == {f"base_model.model.{name}": 8 for name, rank in ranks.items() if rank}
    found = {name: len(lora_a) for name, (lora_a, _) in read_lora_adapter(tmp_path / "adapter").items()}
    assert found == {name: rank for name, rank in ranks.items() if rank}
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(model) - untouched).abs().max() > 0.1


def test_only_the_main_process_writes_an_adapter(tmp_path):
    shake(adapt(tiny_model())).save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_with_all_gates_at_0_is_saved_as_zeros_and_is_no_result(tmp_path):
    """As a checkpoint has it when the learning rate has been 0 so far."""
    base = tiny_model()
    untouched, model = logits(base), adapt(tiny_model(), init="paper")
    model.save_pretrained(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    loaded = {name for name, module in stock.named_modules() if hasattr(module, "lora_A")}
    assert loaded == {f"base_model.model.{name}" for name in model.adapted_layers()}
    assert torch.equal(logits(stock), untouched)
    with pytest.raises(ValueError, match=r"has no effect: set training\.learning_rate above 0"):
        model.check_alive()
    shake(model).check_alive()


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match="'query' matches no linear layer"):
        adapt(tiny_model(), target_modules=["query"])


def test_what_another_adapter_would_do_is_refused_with_what_to_do_instead():
    model = adapt(tiny_model())
    with pytest.raises(ValueError, match=r"merge_and_unload\(\) does not merge gated components\. .*save_pretrained"):
        model.merge_and_unload()
    for adapted in (model, model.get_base_model(), get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))):
        with pytest.raises(
            ValueError, match="the model has an adapter already: give add_dynamic_lora the model as tra"
        ):
            add_dynamic_lora(adapted, DynamicLoraConfig(target_rank=2))
    with pytest.raises(ValueError, match="config is a LoraConfig, but must be a DynamicLoraConfig: "):
        add_dynamic_lora(tiny_model(), LoraConfig(r=8))
