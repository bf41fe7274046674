"""Opens an adapter for use, from a run or from a folder of its own: its settings, and the base it was trained on."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dora_dist.base_model import load
from dora_dist.base_model.new_tokens import start_rows
from dora_dist.base_model.quantization import dequantized_weight, quantized_weight
from dora_dist.config.checks import require
from dora_dist.config.format_version import ADAPTER_CONFIG, ROUTED_ADAPTER
from dora_dist.config.model import QUANTIZATIONS
from dora_dist.config.parse import load_config
from dora_dist.config.run import EvaluationConfig
from dora_dist.config.tasks import CAUSAL_LM, TASKS
from dora_dist.console import files
from dora_dist.console.text import say
from dora_dist.runs import records
from dora_dist.runs.adapter_folder import generation
from dora_dist.runs.adapter_folder.use import USE, Use
from dora_dist.runs.checkpoint import checkpoints, flaw_of

FINAL = "adapter"
"""Name of the final adapter's folder, inside the run's folder."""
TOKENIZER = "tokenizer_config.json"
"""A file that every saved tokenizer has."""


@dataclass(frozen=True, kw_only=True)
class GivenBase:
    """What the command line says about the base.

    Attributes:
        path: folder or name of the base, in place of the one that the adapter names; None for that one.
        quantization: quantization of the base, for an adapter that does not record it; None where it does.
    """

    path: str | None = None
    quantization: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """The parts of a run that later commands need, or what an adapter's folder says of them.

    Attributes:
        run: the run's folder; None for an adapter in a folder of its own.
        adapter: folder with the adapter (plain LoRA, or routed by prompt).
        base: folder of the base, or its name on the Hub.
        tokenizer: folder or name that the tokenizer is read from.
        trust_remote_code: whether to run model code that comes with the base.
        use: settings of the training that the use of the adapter depends on.
    """

    run: Path | None
    adapter: Path
    base: str
    tokenizer: str
    trust_remote_code: bool
    use: Use

    @property
    def folder(self) -> Path:
        """The folder that was opened: the run's, or the adapter's."""
        return self.run or self.adapter

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that was saved with the adapter."""
        return load.load_tokenizer(self.tokenizer, self.trust_remote_code)

    def load_base(self, device: torch.device | str, in_float32: bool) -> PreTrainedModel:
        """The base with the weights that the adapter was trained against: same dtype, same quantization.

        Args:
            device: device of the whole model.
            in_float32: whether to compute in float32; see :func:`compute_in_float32`.

        Raises:
            ValueError: the base cannot be found.
        """
        model = self._load(self.use.quantization, getattr(torch, self.use.compute_dtype), device)
        if in_float32:
            compute_in_float32(model)
        return model

    def load_original(self, device: torch.device | str) -> PreTrainedModel:
        """The base as it is stored, without quantization, in float32.

        Raises:
            ValueError: the base cannot be found, or is stored quantized.
        """
        return self._load("none", torch.float32, device)

    def load_model_config(self) -> PreTrainedConfig:
        """transformers' configuration of the base.

        Raises:
            ValueError: the base cannot be found.
        """
        with _looking_for_base(self.folder):
            return load.load_model_config(self._trained_spec)

    def scaled_positions(self) -> dict[str, Any] | None:
        """Changed settings of the base's rotary positions; see :func:`~dora_dist.base_model.load.scaled_positions`.

        Raises:
            ValueError: the base cannot be found.
        """
        with _looking_for_base(self.folder):
            return load.scaled_positions(self._trained_spec)

    def generation_settings(self) -> GenerationConfig:
        """The base's generation settings.

        Raises:
            ValueError: the base cannot be found.
        """
        with _looking_for_base(self.folder):
            return generation.settings_of_base(self._trained_spec)

    def write_generation_settings(self, folder: Path) -> generation.Needed:
        """Write the model's generation settings; see :func:`~dora_dist.runs.adapter_folder.generation.write_settings`.

        Raises:
            ValueError: the base cannot be found.
        """
        with _looking_for_base(self.folder):
            return generation.write_settings(folder, self._trained_spec, self.use.chat)

    @property
    def stored_quantized(self) -> bool:
        """Whether the base is stored in 4 bits, so that no unquantized one exists."""
        return getattr(self.load_model_config(), "quantization_config", None) is not None

    def make_plain_model(self) -> PreTrainedModel:
        """An unquantized base with rows for new tokens, its weights to be overwritten; see
        :func:`~dora_dist.base_model.load.make_plain_model`."""
        spec = self._spec(self.use.quantization, torch.float32)
        return self._with_new_tokens(load.make_plain_model(spec), spec)

    @property
    def _trained_spec(self) -> load.BaseModelSpec:
        return self._spec(self.use.quantization, getattr(torch, self.use.compute_dtype))

    def _load(self, quantization: str, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
        with _looking_for_base(self.folder):
            spec = self._spec(quantization, dtype)
            return self._with_new_tokens(load.load_base_model(spec, device), spec)

    def _with_new_tokens(self, model: PreTrainedModel, spec: load.BaseModelSpec) -> PreTrainedModel:
        """The model, with rows for new tokens as at the start of the run."""
        if self.use.new_tokens is not None:
            start_rows(model, load.read_new_tokens(spec, self.use.new_tokens))
        return model

    def _spec(self, quantization: str, dtype: torch.dtype) -> load.BaseModelSpec:
        return load.BaseModelSpec(
            path=self.base,
            quantization=quantization,
            compute_dtype=dtype,
            trust_remote_code=self.trust_remote_code,
            rope_scaling=self.use.rope_scaling,
        )


@contextmanager
def _looking_for_base(folder: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"the base of {folder} cannot be loaded: {error}; run this from the folder where the run was started, or "
            "give the base with --model.path PATH"
        ) from None


def find_adapter(run: Path, checkpoint: str | None) -> Path:
    """The folder of the final adapter, or of the adapter in a checkpoint.

    Raises:
        ValueError: ``run`` is not a run's folder, has no final adapter, or has no such (complete) checkpoint.
    """
    if not (run / records.CONFIG).is_file():
        raise ValueError(
            f"{run} is neither the folder of a run (it has no {records.CONFIG}) nor that of an adapter (it has no "
            f"{ADAPTER_CONFIG}): give the output_dir of a run, or the folder of an adapter"
        )
    known = ", ".join(path.name for path in checkpoints(run)) or "none yet"
    if checkpoint is None:
        adapter = run / FINAL
        if not adapter.is_dir():
            raise ValueError(
                f"{run} has no final adapter in {FINAL}/: the run has not finished. Finish it with the command "
                f"that started it, or choose a checkpoint with --checkpoint NAME (there are: {known})"
            )
        return adapter
    folder = run / checkpoint
    if folder not in checkpoints(run):
        raise ValueError(f"--checkpoint is {checkpoint!r}, but {run} has no such checkpoint (there are: {known})")
    if flaw := flaw_of(folder):
        raise ValueError(f"--checkpoint {checkpoint} cannot be used: {flaw} (there are: {known})")
    return folder


def open_asked(options: argparse.Namespace) -> TrainedRun:
    """Open what the options of :func:`~dora_dist.console.arguments.add_run_options` name; see :func:`open_run`."""
    given = GivenBase(path=options.base_path, quantization=options.base_quantization)
    return open_run(options.run, options.checkpoint, given)


def open_run(path: Path, checkpoint: str | None = None, given: GivenBase | None = None) -> TrainedRun:
    """Open a run from its folder, or an adapter from its own.

    Args:
        path: folder of a run, of a run's final adapter or checkpoint (both open that run), or of any other adapter.
        checkpoint: name of a run's checkpoint; None for the final adapter.
        given: what the command line says about the base.

    Raises:
        ValueError: the run, its adapter or its configuration cannot be used, or an adapter does not say enough.
    """
    given = given or GivenBase()
    if not any((path / name).is_file() for name in (ADAPTER_CONFIG, ROUTED_ADAPTER)):
        return _open_run(path, checkpoint, given)
    if checkpoint is not None:
        raise ValueError(
            f"--checkpoint is {checkpoint!r}, but {path} is an adapter itself: leave --checkpoint out, or give the "
            "folder of its run"
        )
    whole = path.resolve()
    if (whole.parent / records.CONFIG).is_file() and (whole.name == FINAL or whole in checkpoints(whole.parent)):
        return _open_run(whole.parent, None if whole.name == FINAL else whole.name, given)
    return _open_adapter(path, given)


def _open_run(run: Path, checkpoint: str | None, given: GivenBase) -> TrainedRun:
    adapter = find_adapter(run, checkpoint)
    config = load_config(run / records.CONFIG)
    _check_task(run, config.task, adapter)
    use = Use.of(config, run)
    _check_given(run, use, given)
    return TrainedRun(
        run=run,
        adapter=adapter,
        base=given.path or config.model.path,
        tokenizer=str(adapter),
        trust_remote_code=config.model.trust_remote_code,
        use=use,
    )


def _open_adapter(folder: Path, given: GivenBase) -> TrainedRun:
    about = _settings_of(folder)
    base = given.path or about.get("base_model") or about.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder} does not say what its base is: give it with --model.path PATH")
    use, tokenizer = Use.read(folder), str(folder)
    if use is None:  # it is of another program, or of an earlier version of this one
        tokenizer = tokenizer if (folder / TOKENIZER).is_file() else base
        use = _use_of_foreign(folder, about.get("task_type"), tokenizer, given.quantization)
    _check_task(folder, use.task, folder)
    _check_given(folder, use, given)
    return TrainedRun(run=None, adapter=folder, base=base, tokenizer=tokenizer, trust_remote_code=False, use=use)


def _settings_of(folder: Path) -> dict[str, Any]:
    """The content of an adapter's own configuration file, plain LoRA's or a prompt-routed one's."""
    path = folder / ADAPTER_CONFIG
    path = path if path.is_file() else folder / ROUTED_ADAPTER
    try:
        return dict(files.read_json(path))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; copy the adapter's folder again") from None


def _use_of_foreign(folder: Path, peft_type: str | None, tokenizer: str, quantization: str | None) -> Use:
    """Settings for an adapter whose folder does not record them: asked in its tokenizer's chat template, if it has one,
    and under Alpaca's headings otherwise."""
    if quantization is None:
        raise ValueError(
            f"{folder} does not say how its base was quantized in training (it has no {USE}, which dora-dist writes "
            f"beside an adapter): give --model.quantization, one of {', '.join(QUANTIZATIONS)}"
        )
    require(
        quantization in QUANTIZATIONS, "--model.quantization", quantization, f"be one of {', '.join(QUANTIZATIONS)}"
    )
    with _looking_for_base(folder):
        chat = bool(load.load_tokenizer(tokenizer).chat_template)
    where = "in its tokenizer's chat template" if chat else "under Alpaca's headings, as its tokenizer has no template"
    say(f"{folder} does not say how its rows were worded: taken for ones {where}")
    tasks = [task.name for task in TASKS.values() if task.peft_type == peft_type]
    return Use(
        task=tasks[0] if tasks else CAUSAL_LM,
        quantization=quantization,
        compute_dtype=str(load.resolve_compute_dtype("auto")).removeprefix("torch."),
        rope_scaling=None,
        new_tokens=None,
        chat=chat,
        formats=["auto"],
        prompts=[None],
        fields=[{}],
        ignore=[[]],
        systems=[""],
        control_tokens="refuse",
        max_new_tokens=EvaluationConfig().max_new_tokens,
    )


def _check_task(opened: Path, task: str, adapter: Path) -> None:
    if task != CAUSAL_LM:
        raise ValueError(
            f"{opened} was trained with task {task}, and this command is for {CAUSAL_LM}. Its adapter is plain LoRA: "
            f"PeftModel.from_pretrained(base, {str(adapter)!r}), where base is of {TASKS[task].auto_class}"
        )


def _check_given(opened: Path, use: Use, given: GivenBase) -> None:
    if given.quantization not in (None, use.quantization):
        raise ValueError(
            f"--model.quantization is {given.quantization}, but {opened} was trained with {use.quantization}, and is "
            "used so: leave it out"
        )


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_in_float32(model: PreTrainedModel) -> None:
    """Make a model compute in float32 with its present weights, in place.

    4-bit weights stay as they are, and are dequantized to float32 from now on. 8-bit layers become plain ones with the
    dequantized weight, because LLM.int8 also rounds the activations, which would blur any comparison of models.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear8bitLt):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            plain.weight = nn.Parameter(dequantized_weight(module), requires_grad=False)
            plain.bias = module.bias
            model.set_submodule(name, plain)
        elif isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32
            quantized_weight(module).quant_state.dtype = torch.float32
        # Not model.float(): transformers refuses it for quantized models, and it would convert their codes.
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
