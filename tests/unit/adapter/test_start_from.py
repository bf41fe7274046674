"""Going on from an adapter that exists: the model starts as stock PEFT has it, and nothing of it is lost in silence."""

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.tiny_models import adapt, load_base, logits, shake, tiny_model

from dora_dist import DynamicLoraConfig
from dora_dist.adapter.from_folder import find_start, read_adapter
from dora_dist.adapter.ranks import resolve_ranks, write_plan
from dora_dist.config.format_version import ADAPTER_CONFIG, ADAPTER_WEIGHTS

FIRST = "model.layers.0.self_attn.q_proj"
PLAIN = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]}
KINDS = {
    "uniform": {},
    "rsLoRA": {"use_rslora": True},
    "ranks and alphas of their own": {
        "rank_pattern": {"v_proj": 1, r"layers\.0\.self_attn\.q_proj": 4},
        "alpha_pattern": {"v_proj": 9, "q_proj": 2},
    },
    "rsLoRA with ranks of their own": {"use_rslora": True, "rank_pattern": {"v_proj": 1}},
}


def write_peft(folder, base, **changes):
    """An adapter of PEFT with random values for both factors, in ``folder``; what it computes."""
    model = get_peft_model(base, LoraConfig(**{**PLAIN, "task_type": "CAUSAL_LM", **changes}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return logits(model.eval())


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_forward_is_that_of_stock_peft(kind, quantization, saved_base, tmp_path):
    wanted = write_peft(tmp_path, load_base(saved_base, quantization), **KINDS[kind])
    model = adapt(load_base(saved_base, quantization), target_rank=4, start_from=str(tmp_path)).eval()
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert (logits(model) - wanted).abs().max() > 0.01, "the adapter does nothing, and the test proves nothing"


@pytest.mark.parametrize(
    "changes",
    [
        {"init": "paper"},
        {"init": "adalora", "scale": "sqrt_rank", "alpha": 3.0},
        {"train_gates": False, "initial_rank": 9},
        {"slots": 12},
    ],
)
def test_components_that_the_adapter_does_not_have_contribute_nothing_at_the_start(changes, saved_base, tmp_path):
    wanted = write_peft(tmp_path, load_base(saved_base, "none"))
    model = adapt(load_base(saved_base, "none"), target_rank=4, start_from=str(tmp_path), **changes).eval()
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)


def test_what_a_run_has_written_goes_on_as_it_was_with_the_ranks_of_its_plan(saved_base, tmp_path):
    model = shake(adapt(load_base(saved_base, "none"), target_rank=4)).eval()
    for number, layer in enumerate(model.adapted_layers().values()):
        layer.component_mask[: number % 5] = False
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    ranks = {name: int(layer.component_mask.sum()) for name, layer in model.adapted_layers().items()}
    write_plan(tmp_path / "plan.json", ranks, {})
    start = {"start_from": str(tmp_path / "adapter"), "ranks": str(tmp_path / "plan.json")}
    again = adapt(load_base(saved_base, "none"), target_rank=4, **start).eval()
    assert {name: len(layer.gate) for name, layer in again.adapted_layers().items()} == ranks, "without the padding"
    torch.testing.assert_close(logits(again), wanted, rtol=1e-5, atol=1e-5)
    again.save_pretrained(tmp_path / "again")
    stock = PeftModel.from_pretrained(load_base(saved_base, "none"), tmp_path / "again").eval()
    torch.testing.assert_close(logits(stock), wanted, rtol=1e-5, atol=1e-5)


def test_the_digest_is_of_the_content_wherever_it_lies(saved_base, tmp_path):
    write_peft(tmp_path / "one", load_base(saved_base, "none"))
    write_peft(tmp_path / "two", load_base(saved_base, "none"))
    write_peft(tmp_path / "three", load_base(saved_base, "none"), lora_alpha=6)
    one, two, three = (read_adapter(str(tmp_path / name)).identity() for name in ("one", "two", "three"))
    assert one == two != three


def change_config(folder, **changes):
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder, change):
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


KEY = f"base_model.model.{FIRST}.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: change_config(f, use_dora=True), "which has use_dora: True: only plain LoRA can be taken from it"),
        (lambda f: change_config(f, modules_to_save=["lm_head"]), r"which has modules_to_save: \['lm_head'\]"),
        (lambda f: change_config(f, bias="all"), r"which has trained biases \(bias: all\)"),
        (
            lambda f: change_config(f, init_lora_weights="pissa"),
            "has init_lora_weights: pissa, which has changed the base",
        ),
        (lambda f: change_config(f, peft_type="ADALORA"), "which is of PEFT's type ADALORA"),
        (
            lambda f: change_tensors(f, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)})),
            r"which has the tensor base_model\.model\.lm_head\.weight",
        ),
        (lambda f: change_tensors(f, lambda t: t.pop(KEY)), f"has base_model.model.{FIRST} with one factor only"),
        (lambda f: change_tensors(f, lambda t: t[KEY].fill_(torch.nan)), f"factors of {FIRST} that are not finite"),
        (
            lambda f: (f / ADAPTER_WEIGHTS).unlink(),
            "which has no adapter_model.safetensors: give the folder of a plain",
        ),
        (lambda f: (f / ADAPTER_WEIGHTS).write_bytes(b"x"), "which cannot be read"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(spoil, message, saved_base, tmp_path):
    write_peft(tmp_path, load_base(saved_base, "none"))
    spoil(tmp_path)
    with pytest.raises(ValueError, match=f"adapter.start_from is {re.escape(str(tmp_path))}, .*{message}"):
        read_adapter(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_rank": 2, "initial_rank": 2},
            "with 3 components in .* starts with 2 there, .*rank to 3 or",
        ),
        (
            {"target_rank": 4, "initial_rank": 2, "slots": 8},
            "with 3 components in .*, but this run starts with 2 there",
        ),
        (
            {"target_rank": 4, "target_modules": ["q_proj"]},
            "adapts .*, but adapter.target_modules takes no such",
        ),
    ],
)
def test_an_adapter_of_which_a_part_would_be_lost_is_refused(changes, message, saved_base, tmp_path):
    write_peft(tmp_path, load_base(saved_base, "none"))
    model, config = load_base(saved_base, "none"), DynamicLoraConfig(start_from=str(tmp_path), **changes)
    with pytest.raises(ValueError, match=message):
        find_start(model, config, resolve_ranks(model, config))


def test_an_adapter_of_another_model_is_refused(saved_base, tmp_path):
    write_peft(tmp_path, load_base(saved_base, "none"))
    model, config = tiny_model(intermediate_size=24), DynamicLoraConfig(start_from=str(tmp_path))
    with pytest.raises(ValueError, match=r"down_proj are for a layer of .*: the adapter is of another model"):
        find_start(model, config, resolve_ranks(model, config))


@pytest.mark.parametrize(
    "changes",
    [{"init": "inputs"}, {"ranks": "gradient_spectrum"}, {"routing": "prompt", "initial_rank": 8}],
)
def test_what_makes_a_new_adapter_does_not_go_with_one_that_exists(changes):
    with pytest.raises(ValueError, match=f"start_from is x, but {next(iter(changes))} is "):
        DynamicLoraConfig(start_from="x", **changes)
