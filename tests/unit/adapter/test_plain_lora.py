import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from dora_dist.adapter.plain_lora import (
    HEAD,
    TOKEN_ROWS,
    Factors,
    NewRows,
    adapter_bytes,
    common_rank,
    fold_components,
    pad_rank,
    read_lora_adapter,
    read_new_rows,
    write_compact_adapter,
    write_lora_adapter,
)
from dora_dist.config.format_version import ADAPTER_WEIGHTS


def draw_layer(gate: list[float], dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    lora_a = torch.randn(len(gate), 10, generator=generator).to(dtype)
    lora_b = torch.randn(6, len(gate), generator=generator).to(dtype)
    return lora_a, torch.tensor(gate, dtype=dtype), lora_b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_folded_factors_are_the_update_without_its_pruned_components(dtype):
    lora_a, gate, lora_b = draw_layer([0.5, 0.0, -2.0, 0.0, 1e-3], dtype)
    folded_a, folded_b = fold_components(lora_a, gate, lora_b, scale=0.7)
    assert folded_a.shape == (3, 10)
    assert folded_b.shape == (6, 3)
    assert folded_a.dtype == folded_b.dtype == torch.float32
    update = 0.7 * lora_b.double() @ torch.diag(gate.double()) @ lora_a.double()
    torch.testing.assert_close((folded_b @ folded_a).double(), update, rtol=1e-5, atol=1e-6)


def test_a_layer_without_components_folds_to_rank_zero():
    folded_a, folded_b = fold_components(*draw_layer([0.0, 0.0]), scale=1.0)
    assert folded_a.shape == (0, 10)
    assert folded_b.shape == (6, 0)


@pytest.mark.parametrize("gate", [[1.0, 0.0, 3.0], [0.0, 0.0]])
def test_padding_adds_zeros_and_changes_nothing(gate):
    factors = fold_components(*draw_layer(gate), scale=2.0)
    padded_a, padded_b = pad_rank(factors, 8)
    assert padded_a.shape == (8, 10)
    assert padded_b.shape == (6, 8)
    assert torch.equal(padded_b @ padded_a, factors[1] @ factors[0])


def test_padding_to_fewer_components_is_refused():
    with pytest.raises(ValueError, match="rank 3 to rank 2"):
        pad_rank(fold_components(*draw_layer([1.0, 1.0, 1.0]), scale=1.0), 2)


GATES = {
    "layers.0.q_proj": [1.0, 2.0, 3.0, 4.0, 5.0],
    "layers.0.k_proj": [0.0, 2.0, 0.0],
    "layers.1.q_proj": [0.0, 0.0, 0.0],
}


def folded() -> dict[str, Factors]:
    return {name: fold_components(*draw_layer(gate), scale=1.0) for name, gate in GATES.items()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items()}


def test_a_written_adapter_has_one_rank_and_leaves_out_rank_zero(tmp_path: Path):
    write_lora_adapter(tmp_path / "new" / "adapter", folded(), "some/base")
    config = config_of(tmp_path / "new" / "adapter")
    assert sorted(config["target_modules"]) == ["layers.0.k_proj", "layers.0.q_proj"]
    assert config["r"] == config["lora_alpha"] == 8
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["base_model_name_or_path"] == "some/base"
    assert shapes_of(tmp_path / "new" / "adapter") == {
        "base_model.model.layers.0.k_proj.lora_A.weight": (8, 10),
        "base_model.model.layers.0.k_proj.lora_B.weight": (6, 8),
        "base_model.model.layers.0.q_proj.lora_A.weight": (8, 10),
        "base_model.model.layers.0.q_proj.lora_B.weight": (6, 8),
    }


@pytest.mark.parametrize(("widest", "rank"), [(1, 8), (8, 8), (9, 16), (17, 32), (64, 64), (513, 1024)])
def test_the_rank_that_all_modules_get_is_the_next_that_servers_take(widest, rank):
    assert common_rank({"a": (torch.ones(1, 2), torch.ones(2, 1)), "b": (torch.ones(widest, 2), None)}) == rank


def test_a_compact_adapter_has_mixed_ranks_and_one_alpha_that_all_loaders_apply_alike(tmp_path: Path):
    """PEFT divides alpha by the rank in ``rank_pattern``, llama.cpp by that of the tensor."""
    write_compact_adapter(tmp_path, folded(), None)
    config, tensors = config_of(tmp_path), load_file(tmp_path / ADAPTER_WEIGHTS)
    assert (config["r"], config["lora_alpha"]) == (5, 5)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"layers.0.k_proj": 1}, {})
    for name, (lora_a, lora_b) in folded().items():
        if lora_a.shape[0]:
            a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            assert a.shape[0] == config["rank_pattern"].get(name, config["r"]) == lora_a.shape[0]
            torch.testing.assert_close(config["lora_alpha"] / a.shape[0] * b @ a, lora_b @ lora_a)


def test_what_is_read_back_has_no_padding(tmp_path: Path):
    write_lora_adapter(tmp_path, folded(), None)
    factors = read_lora_adapter(tmp_path)
    assert {name: len(lora_a) for name, (lora_a, _) in factors.items()} == {"layers.0.k_proj": 1, "layers.0.q_proj": 5}
    for name, parts in factors.items():
        assert all(torch.equal(found, wanted) for found, wanted in zip(parts, folded()[name], strict=True))
    padded, compact = adapter_bytes(tmp_path)
    assert padded - compact == 4 * ((8 + 8) - (1 + 5)) * (10 + 6)
    assert padded == (tmp_path / ADAPTER_WEIGHTS).stat().st_size


def test_an_adapter_of_an_earlier_version_is_read_with_the_rank_of_every_module(tmp_path: Path):
    """They wrote ``rank_pattern`` and an equal ``alpha_pattern``, and B without a factor for it."""
    present = {name: parts for name, parts in folded().items() if len(parts[0])}
    pattern = {"layers.0.k_proj": 1}
    config = LoraConfig(r=5, lora_alpha=5, target_modules=list(present), rank_pattern=pattern, alpha_pattern=pattern)
    config.save_pretrained(str(tmp_path))
    named = {
        f"base_model.model.{name}.lora_{part}.weight": value
        for name, parts in present.items()
        for part, value in zip("AB", parts, strict=True)
    }
    save_file(named, tmp_path / ADAPTER_WEIGHTS)
    for name, parts in read_lora_adapter(tmp_path).items():
        assert all(torch.equal(found, wanted) for found, wanted in zip(parts, present.pop(name), strict=True))
    assert not present


def test_a_compact_adapter_is_read_as_the_update_that_it_was_written_from(tmp_path: Path):
    write_compact_adapter(tmp_path, folded(), None)
    present = {name: parts for name, parts in folded().items() if len(parts[0])}
    found = read_lora_adapter(tmp_path)
    assert found.keys() == present.keys()
    for name, (lora_a, lora_b) in found.items():
        assert torch.equal(lora_a, present[name][0])
        torch.testing.assert_close(lora_b, present[name][1])


def test_a_head_and_rows_of_tokens_are_left_out_only_where_this_is_asked_for(tmp_path: Path):
    rows = NewRows(ids=[3, 4], rows={"embed": torch.ones(2, 10)})
    write_lora_adapter(tmp_path, folded(), None, head={"score": {"weight": torch.ones(2, 10)}}, new_rows=rows)
    assert read_lora_adapter(tmp_path, (HEAD, TOKEN_ROWS)).keys() == {"layers.0.k_proj", "layers.0.q_proj"}
    for apart, named in (((), HEAD), ((TOKEN_ROWS,), HEAD), ((HEAD,), TOKEN_ROWS)):
        with pytest.raises(ValueError, match=f"has {named}: .*only plain LoRA can be taken from it"):
            read_lora_adapter(tmp_path, apart)
    found = read_new_rows(tmp_path)
    assert found.ids == [3, 4]
    assert torch.equal(found.rows["embed"], rows.rows["embed"])
    assert adapter_bytes(tmp_path)[0] > adapter_bytes(tmp_path)[1]


def test_its_card_names_base_budget_and_what_it_is_not(tmp_path: Path):
    factors = {name: (torch.ones(rank, 4), torch.ones(3, rank)) for name, rank in (("a", 2), ("b", 5), ("c", 0))}
    write_lora_adapter(tmp_path, factors, base_model="org/base")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.library_name) == ("org/base", "peft")
    assert "7 rank-one components in 2 modules, ranks 2 to 5" in card.text
    assert "padded with zeros to rank 8" in card.text
    assert "This is not weight-decomposed DoRA" in card.text


def test_a_base_that_is_a_folder_is_named_by_its_whole_path_outside_of_the_metadata(tmp_path: Path, monkeypatch):
    base = tmp_path / "a `base`: {odd}"
    base.mkdir()
    monkeypatch.chdir(tmp_path)
    write_lora_adapter(tmp_path / "adapter", {"a": (torch.ones(2, 4), torch.ones(3, 2))}, base.name)
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model is None
    assert f"# LoRA adapter for `{str(base).replace('`', '')}`\n" in card.text
    assert LoraConfig.from_pretrained(str(tmp_path / "adapter")).base_model_name_or_path == str(base)


def test_an_adapter_without_any_component_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no adapter to write"):
        write_lora_adapter(tmp_path / "adapter", {"q": fold_components(*draw_layer([0.0]), scale=1.0)}, None)
    assert not (tmp_path / "adapter").exists()
