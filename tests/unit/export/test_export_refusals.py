"""Exports that are refused: what is asked for cannot be had, or what was written does not compute what was trained."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.trained_run import VOCABULARY, TrainedFolder, character_tokenizer, make_foreign, make_run, run_export
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.config.format_version import ADAPTER_WEIGHTS
from dora_dist.console.errors import ExpectedRunError
from dora_dist.export import __main__ as export
from dora_dist.export import formats, merge
from dora_dist.export.llama_cpp import NEEDED
from dora_dist.export.verification import Reference
from dora_dist.runs import records
from dora_dist.runs.trained_run import TrainedRun

NUM_MODULES = 14
FORMATS = ("peft", "compact", "merged")


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "peft", "--rank", "12"], "--rank is 12, but must be one of 8, 16, 32"),
        (["--format", "compact", "--rank", "8"], "--rank is an option of --format peft"),
        (["--format", "peft", "--dtype", "float32"], "--dtype is an option of --format merged and gguf"),
        (["--format", "peft", "--base", "original"], "--base is an option of --format merged and gguf"),
        (
            ["--format", "merged", "--llama-cpp", "x"],
            "--llama-cpp is an option of --format gguf, but --format is merged",
        ),
        (
            ["--format", "gguf", "--part", "adapter", "--dtype", "float32"],
            "--dtype is for the merged model, but --part",
        ),
    ],
)
def test_options_that_do_not_fit(run: TrainedFolder, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_export(run, tmp_path / "out", *options)
    assert left_in(tmp_path) == []


def test_rank_smaller_than_the_widest_module() -> None:
    factors = {"narrow": (torch.zeros(2, 4), torch.zeros(4, 2)), "wide": (torch.zeros(9, 4), torch.zeros(4, 9))}
    assert formats.choose_rank(factors, None) == 16
    with pytest.raises(ValueError, match="--rank is 8, but wide has rank 9"):
        formats.choose_rank(factors, 8)


def test_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is neither the folder of a run \(it has no config\.yaml\) nor"):
        export.main([str(tmp_path), "--format", "peft"])


def test_base_that_has_moved(run: TrainedFolder, tmp_path: Path) -> None:
    moved = TrainedFolder(shutil.copytree(run.folder, tmp_path / "run"), run.base, run.model)
    config = moved.folder / records.CONFIG
    for path, message in (("./gone", "model.path './gone'"), ("models/gone", r"'models/gone'.*looked from")):
        text = (run.folder / records.CONFIG).read_text()
        config.write_text(text.replace(str(run.base), path))
        with pytest.raises(ValueError, match=message):
            run_export(moved, tmp_path / "out", "--format", "peft")
    assert left_in(tmp_path) == ["run"]


def test_merge_that_forgets_a_layer_is_refused(
    run: TrainedFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def forgetful(source: torch.nn.Module, factors: object) -> Tensor:
        calls.append(factors)
        return merged_weight(source, None if len(calls) == 3 else factors)

    merged_weight = merge.merged_weight
    monkeypatch.setattr(merge, "merged_weight", forgetful)
    with pytest.raises(ExpectedRunError, match=r"the merged model does not compute.*largest difference.*allowed"):
        run_export(run, tmp_path / "out", "--format", "merged")
    assert len(calls) == NUM_MODULES + 1
    assert left_in(tmp_path) == []


def test_merged_file_that_is_harmed_is_refused(
    run: TrainedFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = LlamaForCausalLM.save_pretrained

    def harmful(model: LlamaForCausalLM, folder: Path) -> None:
        weight = model.model.layers[0].mlp.up_proj.weight
        kept = weight.data
        weight.data = kept.roll(1)
        save(model, folder)
        weight.data = kept

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", harmful)
    with pytest.raises(ExpectedRunError, match="the model loaded back does not compute"):
        run_export(run, tmp_path / "out", "--format", "merged")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("kind", ["peft", "compact"])
def test_adapter_that_is_harmed_is_refused(
    run: TrainedFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def zero_one_tensor(folder: Path) -> None:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].zero_()
        save_file(tensors, folder / ADAPTER_WEIGHTS)

    check = formats._complete_adapter

    def harmed_before_check(trained: TrainedRun, folder: Path, reference: Reference, content: str) -> formats.Exported:
        zero_one_tensor(folder)
        return check(trained, folder, reference, content)

    monkeypatch.setattr(formats, "_complete_adapter", harmed_before_check)
    with pytest.raises(ExpectedRunError, match="the adapter written does not compute"):
        run_export(run, tmp_path / "out", "--format", kind)
    assert left_in(tmp_path) == []


def test_adapter_too_weak_for_16_bits(base: Path, tmp_path: Path) -> None:
    def weaken(model: DynamicLoraModel) -> None:
        for layer in model.adapted_layers().values():
            layer.gate.data.mul_(1e-5)

    run = make_run(tmp_path / "run", base, change=weaken)
    with pytest.raises(ExpectedRunError, match=r"rounding the weights to bfloat16.*--dtype float32"):
        run_export(run, tmp_path / "out", "--format", "merged")
    assert left_in(tmp_path) == ["run"]
    run_export(run, tmp_path / "out", "--format", "merged", "--dtype", "float32")


def test_adapter_of_zeros_is_refused(run: TrainedFolder, tmp_path: Path) -> None:
    """The silent failure that looks like a finished run: a loader finds all tensors, and they do nothing."""
    empty = TrainedFolder(shutil.copytree(run.folder, tmp_path / "run"), run.base, run.model)
    weights = empty.folder / "adapter" / ADAPTER_WEIGHTS
    save_file({name: torch.zeros_like(value) for name, value in load_file(weights).items()}, weights)
    for kind in FORMATS:
        with pytest.raises(ExpectedRunError, match="changes no logit"):
            run_export(empty, tmp_path / "out", "--format", kind)
    assert left_in(tmp_path) == ["run"]


def test_logits_that_are_not_finite_are_refused() -> None:
    reference = Reference(torch.zeros(1, 2), torch.ones(1, 2, 3), torch.zeros(1, 2, 3))
    logits = torch.ones(1, 2, 3)
    assert reference.check("it", logits).largest == 0
    logits[0, 1, 2] = math.nan
    with pytest.raises(ExpectedRunError, match="nan"):
        reference.check("it", logits)
    with pytest.raises(ExpectedRunError, match="nan"):
        reference.check_rounded("it", logits, torch.bfloat16)


@pytest.fixture
def llama_cpp(tmp_path: Path) -> Path:
    """A folder that looks like llama.cpp: nothing in it can be run."""
    for name in NEEDED:
        path = tmp_path / "llama.cpp" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "llama.cpp"


@pytest.mark.parametrize("options", [*(["--format", kind] for kind in FORMATS), ["--format", "gguf", "--part"]])
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "has use_dora: True: only plain LoRA can be taken from it"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save: \['lm_head'\]: only"),
        ({"bias": "lora_only", "lora_bias": True}, r"has trained biases \(bias: lora_only\): only"),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            r"has the tensor .*\.embed_tokens\..*: only",
        ),
    ],
)
def test_an_adapter_of_which_something_would_be_lost_is_refused(
    base: Path, llama_cpp: Path, tmp_path: Path, settings: dict[str, object], reason: str, options: list[str]
) -> None:
    folder = make_foreign(tmp_path / "foreign", base, **settings)
    if "gguf" in options:
        options = [*options, "adapter", "--llama-cpp", str(llama_cpp)]
    given = [str(folder), "--model.quantization", "none", "--output", str(tmp_path / "out"), *options]
    with pytest.raises(ValueError, match=f"the adapter in .*foreign {reason}"):
        export.main(given)
    assert left_in(tmp_path) == ["foreign", "llama.cpp"]


@pytest.mark.parametrize("part", ["adapter", None])
def test_rows_of_tokens_are_not_for_an_adapter_in_gguf(
    base: Path, llama_cpp: Path, tmp_path: Path, part: str | None
) -> None:
    folder = make_foreign(tmp_path / "foreign", base, trainable_token_indices=[7, 9])
    given = [str(folder), "--model.quantization", "none", "--format", "gguf", "--llama-cpp", str(llama_cpp)]
    with pytest.raises(ValueError, match=r"has rows of new tokens .*: give --part merged, whose weights have them"):
        export.main([*given, *([] if part is None else ["--part", part])])


@pytest.mark.parametrize("part", ["adapter", None])
def test_an_adapter_of_scaled_positions_is_not_for_gguf(
    base: Path, llama_cpp: Path, tmp_path: Path, part: str | None
) -> None:
    run = make_run(tmp_path / "run", base, rope_scaling={"rope_type": "linear", "factor": 2.0})
    options = ["--format", "gguf", "--llama-cpp", str(llama_cpp), *([] if part is None else ["--part", part])]
    with pytest.raises(ValueError, match=r"was trained with model.rope_scaling, .*: give --part merged, which has"):
        run_export(run, tmp_path / "out", *options)


def test_rows_of_other_tokens_in_each_module_are_refused(base: Path, tmp_path: Path) -> None:
    rows = {"embed_tokens": [7, 9], "lm_head": [7]}
    folder = make_foreign(tmp_path / "foreign", base, trainable_token_indices=rows)
    with pytest.raises(ValueError, match=r"has trainable_token_indices: .*all modules must have rows of the same"):
        export.main([str(folder), "--model.quantization", "none", "--format", "peft"])


def spoil_nan(folder: Path) -> None:
    weights = folder / ADAPTER_WEIGHTS
    tensors = load_file(weights)
    next(iter(tensors.values())).fill_(math.nan)
    save_file(tensors, weights)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / ADAPTER_WEIGHTS).unlink(), "has no adapter_model.safetensors: give the folder of a"),
        (lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes(b"x"), "cannot be read: "),
        (spoil_nan, r"has factors of model\..* that are not finite"),
    ],
)
def test_a_spoiled_adapter_is_refused_with_what_is_wrong_with_it(
    base: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    folder = make_foreign(tmp_path / "foreign", base)
    spoil(folder)
    with pytest.raises(ValueError, match=f"the adapter in .*foreign {message}"):
        export.main([str(folder), "--model.quantization", "none", "--format", "peft"])


def test_layers_that_are_not_linear_ones_cannot_be_merged_into(tmp_path: Path) -> None:
    """GPT-2's Conv1D, whose weight is stored the other way round: an adapter of it is still one."""
    base = tmp_path / "base"
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCABULARY)).save_pretrained(base)
    character_tokenizer().save_pretrained(base)
    folder = make_foreign(tmp_path / "foreign", base, target_modules=["c_attn"], lora_alpha=7, fan_in_fan_out=True)
    given = [str(folder), "--model.quantization", "none", "--output", str(tmp_path / "out"), "--format"]
    with pytest.raises(ValueError, match=r"adapts transformer\.h\.0\.attn\.c_attn, which is a Conv1D and no linear"):
        export.main([*given, "merged"])
    export.main([*given, "compact"])
