"""Exports: what each format holds, that it computes what was trained, and that nothing else is ever left on disk."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.tiny_models import load_base
from support.trained_run import (
    EMPTY_MODULE,
    INITIAL_RANK,
    TrainedFolder,
    make_base,
    make_foreign,
    make_run,
    probe,
    run_export,
    save_adapter,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from dora_dist.adapter.plain_lora import read_lora_adapter
from dora_dist.config.format_version import ADAPTER_WEIGHTS
from dora_dist.config.tasks import CAUSAL_LM
from dora_dist.console import files
from dora_dist.export import __main__ as export
from dora_dist.quantize import __main__ as quantize
from dora_dist.runs import checkpoint, records
from dora_dist.runs.trained_run import open_run
from dora_dist.setup.adapter_use import describe_use

NUM_MODULES = 14


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@torch.no_grad()
def stock_adapter_logits(folder: Path, base: Path, quantization: str = "nf4") -> Tensor:
    return PeftModel.from_pretrained(load_base(base, quantization), str(folder))(input_ids=probe()).logits


@torch.no_grad()
def stock_logits(folder: Path) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=probe()).logits


def adapter_config(folder: Path) -> dict[str, object]:
    return json.loads((folder / "adapter_config.json").read_text())


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_peft_is_the_adapter_as_it_is(run: TrainedFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = run_export(run, tmp_path / "out", "--format", "peft")
    old, new = (load_file(folder / ADAPTER_WEIGHTS) for folder in (run.folder / "adapter", output))
    zeros = new.keys() - old.keys()
    assert all(EMPTY_MODULE in name and not new[name].any() for name in zeros)
    assert len(zeros) == 2
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    assert distance(stock_adapter_logits(output, run.base), run.logits()) < 1e-5
    assert AutoTokenizer.from_pretrained(output).decode([1]) == "<s>"
    said = capsys.readouterr().out
    assert f"Wrote {output}" in said
    assert "largest difference 0.00e+00" in said
    assert f"vllm serve {run.base} --enable-lora --max-lora-rank 8 --lora-modules NAME={output}" in said
    assert f"--model-path {run.base} --enable-lora --max-lora-rank 8 --lora-paths NAME={output}" in said
    assert left_in(tmp_path) == ["out"]


def test_default_output_is_in_the_run(run: TrainedFolder) -> None:
    export.main([str(run.folder), "--format", "peft"])
    assert (run.folder / "export-peft" / ADAPTER_WEIGHTS).is_file()
    with pytest.raises(ValueError, match=r"export-peft exists already.*--output"):
        export.main([str(run.folder), "--format", "peft"])


@pytest.mark.parametrize(("options", "rank"), [((), 8), (("--rank", "16"), 16)])
def test_peft_has_one_rank_everywhere(run: TrainedFolder, tmp_path: Path, options: tuple[str, ...], rank: int) -> None:
    output = run_export(run, tmp_path / "out", "--format", "peft", *options)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(output / ADAPTER_WEIGHTS).items()}
    assert len(shapes) == 2 * NUM_MODULES
    assert {shape[0 if ".lora_A." in name else 1] for name, shape in shapes.items()} == {rank}
    config = adapter_config(output)
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert distance(stock_adapter_logits(output, run.base), run.logits()) < 1e-5


@pytest.mark.parametrize("kind", ["adapter", "peft", "compact"])
def test_adapters_applied_without_peft(run: TrainedFolder, tmp_path: Path, kind: str) -> None:
    """As llama.cpp does (lora_alpha / rank of the tensor), and vLLM (lora_alpha / r, one rank only)."""
    output = run.folder / kind if kind == "adapter" else run_export(run, tmp_path / "out", "--format", kind)
    config, tensors = adapter_config(output), load_file(output / ADAPTER_WEIGHTS)
    for name, layer in run.model.adapted_layers().items():
        if name == EMPTY_MODULE:
            continue
        lora_a, lora_b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        wanted = layer.scale * layer.lora_b @ torch.diag(layer.effective_gate()) @ layer.lora_a
        scales = [config["lora_alpha"] / lora_a.shape[0]]
        scales += [] if kind == "compact" else [config["lora_alpha"] / config["r"]]
        for scale in scales:
            torch.testing.assert_close(scale * lora_b @ lora_a, wanted, rtol=1e-5, atol=1e-6)


def test_compact_has_mixed_ranks_and_says_who_does_not_take_them(
    run: TrainedFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run_export(run, tmp_path / "out", "--format", "compact")
    said = capsys.readouterr().out
    assert "vLLM does not take it: its modules differ in rank or scale (rank_pattern)" in said
    assert f"SGLang does not take it: {said.partition('vLLM does not take it: ')[2].partition(chr(10))[0]}" in said
    assert not adapter_config(output)["alpha_pattern"]
    ranks = {a.shape[0] for name, a in load_file(output / ADAPTER_WEIGHTS).items() if ".lora_A." in name}
    assert ranks == set(range(1, INITIAL_RANK + 1))
    assert distance(stock_adapter_logits(output, run.base), run.logits()) < 1e-5
    sizes = [(folder / ADAPTER_WEIGHTS).stat().st_size for folder in (output, run.folder / "adapter")]
    assert sizes[0] < 0.6 * sizes[1]


def test_merged_is_a_plain_model(run: TrainedFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = run_export(run, tmp_path / "out", "--format", "merged")
    config = json.loads((output / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["dtype"], config["use_cache"]) == ("bfloat16", True)
    assert not list(output.glob("adapter*"))
    model = AutoModelForCausalLM.from_pretrained(output)
    assert type(model) is LlamaForCausalLM
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(output).eos_token_id == 2
    # Rounding to 8 significant bits, and no more than that: far nearer to what was trained than the base is.
    assert distance(stock_logits(output), run.logits()) < 2**-6
    assert "as bfloat16" in capsys.readouterr().out


@pytest.fixture(scope="module")
def on_stored(tmp_path_factory: pytest.TempPathFactory, base: Path) -> TrainedFolder:
    """A run on a base that comes in 4 bits."""
    folder = tmp_path_factory.mktemp("stored")
    quantize.main([str(base), str(folder / "base")])
    return make_run(folder / "run", folder / "base")


def test_merged_into_a_base_in_4_bits_is_a_plain_model(on_stored: TrainedFolder, tmp_path: Path) -> None:
    output = run_export(on_stored, tmp_path / "out", "--format", "merged", "--dtype", "float32")
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    assert distance(stock_logits(output), on_stored.logits()) < 1e-5
    assert AutoTokenizer.from_pretrained(output).eos_token_id == 2


def test_adapter_of_a_base_in_4_bits_goes_with_it(on_stored: TrainedFolder, tmp_path: Path) -> None:
    output = run_export(on_stored, tmp_path / "out", "--format", "compact")
    assert distance(stock_adapter_logits(output, on_stored.base), on_stored.logits()) < 1e-5


def test_there_is_no_original_of_a_base_in_4_bits(on_stored: TrainedFolder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--base is original, but the base .* is stored in NF4"):
        run_export(on_stored, tmp_path / "out", "--format", "merged", "--base", "original")
    assert left_in(tmp_path) == []


CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("of_base", "chat", "ends"),
    [
        ([2, 9], True, [2, 9, 104]),
        (9, True, [2, 9, 104]),
        ([2, 9], False, [2, 9]),
        (2, False, 2),
        (None, True, [2, 104]),
    ],
)
def test_merged_stops_where_its_base_does_and_where_a_turn_ended_in_training(
    tmp_path: Path, of_base: object, chat: bool, ends: object
) -> None:
    base = make_base(tmp_path / "base")
    run = make_run(tmp_path / "run", base)
    settings = GenerationConfig.from_pretrained(base)
    settings.eos_token_id = of_base
    settings.save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "adapter")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(run.folder / "adapter")
    recorded = files.read_json(run.folder / records.RUN)
    files.write_json(run.folder / records.RUN, {**recorded, "data": {"chat": chat}})
    output = run_export(run, tmp_path / "out", "--format", "merged")
    assert GenerationConfig.from_pretrained(output).eos_token_id == ends
    assert AutoModelForCausalLM.from_pretrained(output).generation_config.eos_token_id == ends


@pytest.mark.parametrize("rows", [[7, 9], {"embed_tokens": [7, 9], "lm_head": [7, 9]}])
@pytest.mark.parametrize("kind", ["peft", "compact", "merged"])
def test_rows_of_tokens_of_another_program_are_in_every_export(
    base: Path, tmp_path: Path, kind: str, rows: object
) -> None:
    folder = make_foreign(tmp_path / "foreign", base, trainable_token_indices=rows)
    options = ["--dtype", "float32"] if kind == "merged" else []
    output = tmp_path / "out"
    export.main([str(folder), "--model.quantization", "none", "--format", kind, "--output", str(output), *options])
    wanted = stock_adapter_logits(folder, base, "none")
    found = stock_logits(output) if kind == "merged" else stock_adapter_logits(output, base, "none")
    assert distance(found, wanted) < 1e-5


OF_PEFT = {
    "another alpha": {"r": 3, "lora_alpha": 7},
    "ranks and alphas of their own": {
        "rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\.down_proj": 5},
        "alpha_pattern": {"down_proj": 9, "layers.1.self_attn.q_proj": 1},
    },
    "rsLoRA with ranks and alphas of their own": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"down_proj": 9},
    },
}


def export_folder(folder: Path, output: Path, kind: str, quantization: str | None = None) -> Path:
    """An export of an adapter's folder, in float32; returns ``output``."""
    options = ["--dtype", "float32"] if kind == "merged" else []
    options += [] if quantization is None else ["--model.quantization", quantization]
    export.main([str(folder), "--format", kind, "--output", str(output), *options])
    return output


@pytest.mark.parametrize("settings", OF_PEFT)
def test_an_adapter_of_peft_is_exported_with_its_own_ranks_and_scales(
    base: Path, tmp_path: Path, settings: str
) -> None:
    folder = make_foreign(tmp_path / "foreign", base, **OF_PEFT[settings])
    wanted = stock_adapter_logits(folder, base, "none")
    for kind in ("peft", "compact", "merged"):
        output = export_folder(folder, tmp_path / kind, kind, "none")
        found = stock_logits(output) if kind == "merged" else stock_adapter_logits(output, base, "none")
        assert distance(found, wanted) < 1e-5, kind


@pytest.mark.parametrize("first", ["peft", "compact"])
def test_an_export_is_exported_as_the_run_is(run: TrainedFolder, tmp_path: Path, first: str) -> None:
    once = run_export(run, tmp_path / "once", "--format", first)
    again = export_folder(once, tmp_path / "again", first)
    old, new = (load_file(folder / ADAPTER_WEIGHTS) for folder in (once, again))
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        torch.testing.assert_close(new[name], tensor)
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    assert [adapter_config(once)[name] for name in names] == [adapter_config(again)[name] for name in names]
    other = export_folder(once, tmp_path / "other", "compact" if first == "peft" else "peft")
    for folder in (again, other):
        assert distance(stock_adapter_logits(folder, run.base), run.logits()) < 1e-5
    assert distance(stock_logits(export_folder(once, tmp_path / "merged", "merged")), run.logits()) < 1e-5


@pytest.mark.parametrize("kind", ["peft", "compact"])
def test_an_adapter_of_scaled_positions_says_what_its_base_must_be_set_to(
    base: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a base that is set so has the positions of the run, though its own are of another kind."""
    own = shutil.copytree(base, tmp_path / "base")
    config = json.loads((own / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0, "attention_factor": 3.0}
    config["rope_parameters"]["original_max_position_embeddings"] = 128
    (own / "config.json").write_text(json.dumps(config))
    run = make_run(tmp_path / "run", own, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    output = run_export(run, tmp_path / "out", "--format", kind)
    advice = re.search("First set (.*), in the base's config.json; or take --format merged", capsys.readouterr().out)
    card = " ".join((output / "README.md").read_text().split())
    assert f"first set {advice[1]}, in the base's config.json" in card
    at_the_end = describe_use(run.folder, CAUSAL_LM, None, open_run(run.folder).scaled_positions())
    assert f"first set        {advice[1]}, in the base's config.json; or merge the adapter" in at_the_end
    rope, positions = re.fullmatch("rope_parameters to (.*) and max_position_embeddings to (.*)", advice[1]).groups()
    changed = {"rope_parameters": json.loads(rope), "max_position_embeddings": int(positions)}
    (own / "config.json").write_text(json.dumps({**config, **changed}))
    merged = stock_logits(run_export(run, tmp_path / "merged", "--format", "merged", "--dtype", "float32"))
    assert distance(stock_adapter_logits(output, own), merged) < 1e-5


def test_merged_in_float32_is_exact(run: TrainedFolder, tmp_path: Path) -> None:
    output = run_export(run, tmp_path / "out", "--format", "merged", "--dtype", "float32")
    assert distance(stock_logits(output), run.logits()) < 1e-5


def test_merged_into_the_original_base(run: TrainedFolder, tmp_path: Path) -> None:
    output = run_export(run, tmp_path / "out", "--format", "merged", "--dtype", "float32", "--base", "original")
    wanted = stock_adapter_logits(run.folder / "adapter", run.base, "none")
    assert distance(stock_logits(output), wanted) < 1e-5
    assert distance(stock_logits(output), run.logits()) > 1e-3, "NF4 makes a difference, or this test shows nothing"


@pytest.mark.parametrize("architecture", ["qwen3", "gemma"])
def test_merged_where_embeddings_are_tied(architecture: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", architecture, tie_word_embeddings=True)
    run = make_run(tmp_path / "run", base)
    output = run_export(run, tmp_path / "out", "--format", "merged", "--dtype", "float32")
    assert distance(stock_logits(output), run.logits()) < 1e-5


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_other_bases(base: Path, tmp_path: Path, quantization: str) -> None:
    run = make_run(tmp_path / "run", base, quantization=quantization)
    # LLM.int8 rounds the activations too, so that the live model itself is not exact.
    tolerance = 1e-5 if quantization == "none" else 0.05
    for kind in ("peft", "compact"):
        output = run_export(run, tmp_path / kind, "--format", kind)
        assert distance(stock_adapter_logits(output, base, quantization), run.logits()) < tolerance
    output = run_export(run, tmp_path / "merged", "--format", "merged", "--dtype", "float32")
    assert distance(stock_logits(output), run.logits()) < tolerance


def test_a_run_in_bfloat16_on_another_machine(base: Path, tmp_path: Path) -> None:
    """The base is rounded to bfloat16 before it is quantized, as it was in the run, though `auto` is float32 here."""
    run = make_run(tmp_path / "run", base, compute_dtype="bfloat16")
    output = run_export(run, tmp_path / "out", "--format", "merged", "--dtype", "float32")
    head = load_file(output / "model.safetensors")["lm_head.weight"]
    stored = load_file(base / "model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(head, stored.bfloat16().float(), rtol=0, atol=0)
    assert not torch.equal(head, stored)


def test_checkpoint_instead_of_the_final_adapter(run: TrainedFolder, tmp_path: Path) -> None:
    unfinished = TrainedFolder(tmp_path / "run", run.base, run.model)
    unfinished.folder.mkdir()
    for name in (records.CONFIG, records.RUN):
        shutil.copy(run.folder / name, unfinished.folder)
    for step in (3, 12):
        save_adapter(run.model, unfinished.folder / f"checkpoint-{step}")
    checkpoint.seal(unfinished.folder / "checkpoint-12")
    with pytest.raises(ValueError, match=r"has not finished.*--checkpoint NAME.*checkpoint-3, checkpoint-12"):
        run_export(unfinished, tmp_path / "out", "--format", "peft")
    with pytest.raises(ValueError, match=r"checkpoint-3 cannot be used: it was not completed"):
        run_export(unfinished, tmp_path / "out", "--format", "peft", "--checkpoint", "checkpoint-3")
    with pytest.raises(ValueError, match=r"'last'.*no such checkpoint.*checkpoint-12"):
        run_export(unfinished, tmp_path / "out", "--format", "peft", "--checkpoint", "last")
    output = run_export(unfinished, tmp_path / "out", "--format", "peft", "--checkpoint", "checkpoint-12")
    assert distance(stock_adapter_logits(output, run.base), run.logits()) < 1e-5


STOCK_PROGRAM = """
import sys
import torch
torch.set_num_threads(1)
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

base, adapter, tokens, output = sys.argv[1:]
settings = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
)
model = AutoModelForCausalLM.from_pretrained(
    base, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
)
for module in model.modules():
    if isinstance(module, Linear4bit):
        module.support_avx512bf16_for_cpu = False
model = PeftModel.from_pretrained(model, adapter)
with torch.no_grad():
    torch.save(model(input_ids=torch.load(tokens)).logits, output)
assert not any(name.split(".")[0] == "dora_dist" for name in sys.modules)
"""


def test_stock_process_loads_the_adapter(run: TrainedFolder, tmp_path: Path) -> None:
    """A process that has never heard of this package gets the same logits from the adapter of a run."""
    torch.save(probe(), tmp_path / "tokens.pt")
    paths = [run.base, run.folder / "adapter", tmp_path / "tokens.pt", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", STOCK_PROGRAM, *map(str, paths)], cwd=tmp_path, check=True, timeout=120)
    logits = torch.load(tmp_path / "logits.pt")
    assert distance(logits, run.logits()) < 1e-5
    with run.model.disable_adapter(), torch.no_grad():
        alone = run.model(input_ids=probe()).logits
    assert distance(alone, run.logits()) > 0.1, "the adapter does much, or this test shows nothing"


def test_ranks_of_the_run_are_uneven(run: TrainedFolder) -> None:
    ranks = {name: lora_a.shape[0] for name, (lora_a, _) in read_lora_adapter(run.folder / "adapter").items()}
    assert set(ranks.values()) == set(range(1, INITIAL_RANK + 1))
    assert EMPTY_MODULE not in ranks
    assert len(ranks) == NUM_MODULES - 1
