"""Models of many architectures: adapted as a whole, or refused by name before anything is loaded."""

import copy

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from support.architectures import ARCHITECTURES, save_model, skeleton_of
from support.tiny_models import adapt, load_base, loss_and_gradients, shake, tokens
from torch import Tensor

from dora_dist.adapter.targets import resolve_targets

REFUSED = {"falcon": "FalconLinear", "gpt2": "Conv1D"}
LEFT_OUT = {
    "deepseek_v2": {"gate_proj", "up_proj", "down_proj"},
    "deepseek_v3": {"gate_proj", "up_proj", "down_proj"},
    "ernie4_5_moe": {"gate_proj", "up_proj", "down_proj"},
    "falcon_h1": {"out_proj"},
    "glm4_moe": {"gate_proj", "up_proj", "down_proj"},
    "llama4": {"router"},
    "mamba2": {"out_proj"},
    "phimoe": {"router"},
    "qwen3_next": {"gate_proj", "up_proj", "down_proj"},
}
"""Last parts of the names of linear layers that ``all-linear`` does not take, beside the head."""
FAST = {
    ("deepseek_v3", "none"),
    ("falcon_h1", "none"),
    ("gemma3 with a tower", "nf4"),
    ("llama4", "none"),
    ("mixtral", "nf4"),
    ("phi3", "none"),
}
IDS = tokens().remainder(80) + 4  # without special tokens and those of images


def cases():
    for name in sorted(ARCHITECTURES.keys() - REFUSED):
        for quantization in ("none", "nf4"):
            marks = () if (name, quantization) in FAST else pytest.mark.full("models")
            yield pytest.param(name, quantization, id=f"{name}-{quantization}", marks=marks)


def outputs(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits


def close(found: Tensor, wanted: Tensor, relative: float) -> bool:
    return bool((found - wanted).detach().norm() <= relative * wanted.detach().norm() + 1e-6)


@pytest.mark.parametrize(("name", "quantization"), cases())
def test_it_starts_as_its_base_and_has_the_logits_and_gradients_of_stock_peft(tmp_path, name, quantization):
    folder = save_model(name, tmp_path / "base")
    base = load_base(folder, quantization)
    if Version(peft.__version__) < Version("0.21") and any("experts" in module for module, _ in base.named_modules()):
        pytest.skip("PEFT 0.19 cannot load an adapter of a model with experts under transformers 5.8")
    alone = outputs(base)
    model = adapt(base, initial_rank=4, alpha=8)
    assert torch.equal(outputs(model), alone)
    with torch.no_grad():
        for layer in shake(model).adapted_layers().values():
            layer.component_mask[0] = False
    model.save_pretrained(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(load_base(folder, quantization), tmp_path / "adapter", is_trainable=True)
    trained = outputs(model)
    assert close(outputs(stock), trained, 1e-4)
    assert not close(alone, trained, 1e-2)
    _, ours = loss_and_gradients(model, IDS)
    _, theirs = loss_and_gradients(stock, IDS)
    for layer_name, layer in model.adapted_layers().items():
        prefix, kept = f"base_model.model.{layer_name}", layer.component_mask
        a, b = (ours[f"{prefix}.lora_{part}.default.weight"] for part in "AB")
        of_a, of_b = (theirs[f"{prefix}.lora_{part}.default.weight"] for part in "AB")
        count = int(kept.sum())
        assert close(a[kept], of_a[:count], 1e-3), layer_name
        assert close(b[:, kept], of_b[:, :count] * (layer.scale * layer.gate[kept]), 1e-3), layer_name


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_what_all_linear_takes_is_known_without_weights(name):
    if name == "deepseek_v2" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("its router is a plain linear layer before transformers 5.23")
    skeleton = skeleton_of(name)
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            resolve_targets(skeleton, "all-linear")
        return
    head = skeleton.get_output_embeddings()
    taken = set(resolve_targets(skeleton, "all-linear"))
    text = [
        path
        for path, module in skeleton.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and not path.startswith("model.vision_tower")
    ]
    assert {path.rsplit(".", 1)[-1] for path in set(text) - taken} == LEFT_OUT.get(name, set())


@pytest.mark.parametrize(
    ("name", "ending", "reason"),
    [
        ("glm4_moe", "gate_proj", "PEFT takes for a part of the fused experts of a glm4_moe: leave gate_proj out"),
        ("falcon_h1", "out_proj", "PEFT does not adapt in a falcon_h1"),
        ("llama4", "router", "is a Llama4Router, a linear layer that computes in a way of its own"),
    ],
)
def test_a_layer_that_cannot_work_is_refused_where_it_is_named(name, ending, reason):
    with pytest.raises(ValueError, match=reason):
        resolve_targets(skeleton_of(name), ["q_proj", ending])


def test_peft_still_has_what_is_worked_around():
    """Where this fails, a reason to leave layers out is gone: see ``_obstacle_of_peft`` in ``adapter/targets.py``."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    names = ["model.layers.0.mlp.shared_experts.down_proj", "model.layers.0.self_attn.q_proj"]
    config = LoraConfig(target_modules=copy.copy(names))
    convert_peft_config_for_transformers(config, skeleton_of("glm4_moe"), None)
    assert config.target_modules == {names[1]}
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        _check_lora_target_modules_mamba(LoraConfig(), skeleton_of("mamba2"), "out_proj")
