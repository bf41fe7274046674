"""Adapters by the rules of vLLM and SGLang: those that they take, and each reason why they do not take one."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model

from dora_dist.adapter.plain_lora import read_lora_adapter, write_compact_adapter, write_lora_adapter
from dora_dist.export import servers
from dora_dist.runs.adapter_folder.generation import Needed

LAYER = "model.layers.0."
FACTORS = {
    f"{LAYER}self_attn.q_proj": (torch.ones(2, 64), torch.ones(64, 2)),
    f"{LAYER}self_attn.o_proj": (torch.ones(3, 64), torch.ones(64, 3)),
    f"{LAYER}mlp.up_proj": (torch.ones(1, 64), torch.ones(128, 1)),
}
SHAPES = {f"base_model.model.{LAYER}self_attn.o_proj.lora_{part}.weight": (8, 8) for part in "AB"}
CONFIG: dict[str, Any] = {"r": 8, "lora_alpha": 8, "target_modules": ["o_proj"], "bias": "none", "rank_pattern": {}}


def test_modules_that_are_computed_together_are_completed_with_zeros(tmp_path: Path) -> None:
    completed = servers.with_neighbours(FACTORS, tiny_model())
    added = {name.removeprefix(LAYER): (tuple(a.shape), tuple(b.shape)) for name, (a, b) in completed.items()}
    for name in FACTORS:
        del added[name.removeprefix(LAYER)]
    assert added == {
        "self_attn.k_proj": ((0, 64), (32, 0)),
        "self_attn.v_proj": ((0, 64), (32, 0)),
        "mlp.gate_proj": ((0, 64), (128, 0)),
    }
    write_lora_adapter(tmp_path, completed, "base", keep_empty=True)
    assert read_lora_adapter(tmp_path).keys() == FACTORS.keys()
    assert "6 rank-one components in 3 modules, ranks 1 to 3" in (tmp_path / "README.md").read_text()


def test_a_base_that_has_no_such_neighbour_gets_none() -> None:
    base = tiny_model()
    del base.model.layers[0].mlp.gate_proj
    assert f"{LAYER}mlp.gate_proj" not in servers.with_neighbours(FACTORS, base)


def test_an_adapter_of_one_rank_with_all_neighbours_is_served_by_both(tmp_path: Path) -> None:
    write_lora_adapter(tmp_path, servers.with_neighbours(FACTORS, tiny_model()), "base", keep_empty=True)
    vllm, sglang = servers.serve_lines(tmp_path, "my base", Needed())
    options = "--enable-lora --max-lora-rank 8"
    assert vllm == f"vllm serve 'my base' {options} --lora-modules NAME={{folder}}"
    assert sglang == f"python -m sglang.launch_server --model-path 'my base' {options} --lora-paths NAME={{folder}}"


def test_template_and_end_tokens_of_the_adapter_reach_both(tmp_path: Path) -> None:
    write_lora_adapter(tmp_path, servers.with_neighbours(FACTORS, tiny_model()), "base", keep_empty=True)
    vllm, sglang = servers.serve_lines(tmp_path, "base", Needed((2, 5), ("<|im_end|>",), template=True))
    template = "--chat-template {folder}/chat_template.jinja"
    assert vllm.endswith(f"NAME={{folder}} {template} --generation-config {{folder}}")
    assert sglang.endswith(f"NAME={{folder}} {template}     # and in each request: stop_token_ids [2, 5]")


def test_sglang_does_not_take_half_of_what_is_computed_together(tmp_path: Path) -> None:
    write_lora_adapter(tmp_path, FACTORS, "base")
    of_vllm, of_sglang = servers.serve_lines(tmp_path, "base", Needed())
    assert of_vllm.startswith("vllm serve")
    assert of_sglang == "SGLang does not take it: model.layers.0.mlp has up_proj and not gate_proj"


def test_mixed_ranks_are_for_neither(tmp_path: Path) -> None:
    write_compact_adapter(tmp_path, FACTORS, "base")
    assert all(
        "does not take it: its modules differ in rank" in line
        for line in servers.serve_lines(tmp_path, "base", Needed())
    )


def test_a_head_that_was_trained_is_not_for_them(tmp_path: Path) -> None:
    write_lora_adapter(tmp_path, FACTORS, "base", head={"score": {"weight": torch.ones(2, 64)}})
    of_vllm, of_sglang = servers.serve_lines(tmp_path, "base", Needed())
    assert "modules that are trained as a whole (score)" in of_vllm
    assert "base_model.model.score.weight, which is no factor of LoRA" in of_sglang


@pytest.mark.parametrize(
    ("key", "value", "flaw", "of_both"),
    [
        ("r", 1024, "its rank is 1024, and --max-lora-rank goes to 512", False),
        ("use_dora", True, "use_dora is True", True),
        ("lora_bias", True, "lora_bias is True", True),
        ("bias", "all", "bias is 'all'", True),
        ("alpha_pattern", {"o_proj": 3}, "alpha_pattern", True),
        ("trainable_token_indices", {"lm_head": [7]}, "it holds rows of new tokens .*--format merged has them", True),
    ],
)
def test_every_rule_has_its_reason(key: str, value: object, flaw: str, of_both: bool) -> None:
    assert servers.vllm_flaws(CONFIG, SHAPES) == servers.sglang_flaws(CONFIG, SHAPES) == []
    changed = {**CONFIG, key: value}
    (said,) = servers.vllm_flaws(changed, SHAPES)
    assert re.search(flaw, said)
    assert servers.sglang_flaws(changed, SHAPES) == ([said] if of_both else [])


def test_sglang_wants_names_of_modules() -> None:
    (said,) = servers.sglang_flaws({**CONFIG, "target_modules": ".*_proj"}, SHAPES)
    assert said == "target_modules is '.*_proj', where it must be a list of names"
