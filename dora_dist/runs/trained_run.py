"""Opens a finished run for use: its adapter, its configuration, and the base the adapter was trained on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dora_dist.base_model import load
from dora_dist.base_model.new_tokens import start_rows
from dora_dist.base_model.quantization import dequantized_weight, quantized_weight
from dora_dist.config.parse import load_config
from dora_dist.config.run import RunConfig
from dora_dist.config.tasks import CAUSAL_LM, TASKS
from dora_dist.console import files
from dora_dist.runs import records
from dora_dist.runs.checkpoint import checkpoints, flaw_of


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """The parts of a run that later commands need.

    Attributes:
        folder: the run's folder.
        adapter: folder with the adapter (plain LoRA) and the tokenizer.
        config: the run's resolved configuration.
        compute_dtype: the dtype in which the base was read before it was quantized.
        chat: whether it was trained on conversations, in the chat template saved with the tokenizer.
        formats: row formats of the training data.
    """

    folder: Path
    adapter: Path
    config: RunConfig
    compute_dtype: torch.dtype
    chat: bool
    formats: set[str]

    @property
    def prompts(self) -> set[str | None]:
        """The ``data.prompt`` of each of its sources; None stands for sources without one."""
        return set(map(self.config.data.prompt_of, self.config.data.train_sources))

    @property
    def systems(self) -> set[str]:
        """The system messages that its sources add to conversations without one."""
        return set(map(self.config.data.system_of, self.config.data.train_sources))

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that was saved with the adapter."""
        return load.load_tokenizer(str(self.adapter), self.config.model.trust_remote_code)

    def load_base(self, device: torch.device | str, in_float32: bool) -> PreTrainedModel:
        """The base with the weights that the adapter was trained against: same dtype, same quantization.

        Args:
            device: device of the whole model.
            in_float32: compute in float32; see :func:`compute_in_float32`.

        Raises:
            ValueError: the base cannot be found.
        """
        model = self._load(self.config.model.quantization, self.compute_dtype, device)
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
        with self._looking():
            return load.load_model_config(self._spec(self.config.model.quantization, self.compute_dtype))

    @property
    def stored_quantized(self) -> bool:
        """Whether the base is stored in 4 bits, so that there is none without quantization."""
        return getattr(self.load_model_config(), "quantization_config", None) is not None

    def make_plain_model(self) -> PreTrainedModel:
        """See :func:`~dora_dist.base_model.load.make_plain_model`; with rows for new tokens."""
        spec = self._spec(self.config.model.quantization, torch.float32)
        return self._with_new_tokens(load.make_plain_model(spec), spec)

    def _load(self, quantization: str, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
        with self._looking():
            spec = self._spec(quantization, dtype)
            return self._with_new_tokens(load.load_base_model(spec, device), spec)

    def _with_new_tokens(self, model: PreTrainedModel, spec: load.BaseModelSpec) -> PreTrainedModel:
        """The model, with rows for new tokens as at the start of the run."""
        if self.config.adapter.new_tokens is not None:
            start_rows(model, load.read_new_tokens(spec, self.config.adapter.new_tokens))
        return model

    def _spec(self, quantization: str, dtype: torch.dtype) -> load.BaseModelSpec:
        return load.BaseModelSpec(
            path=self.config.model.path,
            quantization=quantization,
            compute_dtype=dtype,
            trust_remote_code=self.config.model.trust_remote_code,
            rope_scaling=self.config.model.rope_scaling,
        )

    @contextmanager
    def _looking(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(
                f"the base of {self.folder} cannot be loaded: {error}; run this from the folder where the "
                f"run was started, or correct model.path in "
                f"{self.folder / records.CONFIG}"
            ) from None


def find_adapter(run: Path, checkpoint: str | None) -> Path:
    """The folder of the final adapter, or of the adapter in a checkpoint.

    Raises:
        ValueError: ``run`` is not a run's folder, has no final adapter, or has no such (complete) checkpoint.
    """
    if not (run / records.CONFIG).is_file():
        raise ValueError(f"{run} is not the folder of a run: it has no {records.CONFIG}; give its output_dir")
    known = ", ".join(path.name for path in checkpoints(run)) or "none yet"
    if checkpoint is None:
        adapter = run / "adapter"
        if not adapter.is_dir():
            raise ValueError(
                f"{run} has no final adapter in adapter/: the run has not finished. Finish it with the command "
                f"that started it, or choose a checkpoint with --checkpoint NAME (there are: {known})"
            )
        return adapter
    folder = run / checkpoint
    if folder not in checkpoints(run):
        raise ValueError(f"--checkpoint is {checkpoint!r}, but {run} has no such checkpoint (there are: {known})")
    if flaw := flaw_of(folder):
        raise ValueError(f"--checkpoint {checkpoint} cannot be used: {flaw} (there are: {known})")
    return folder


def open_run(run: Path, checkpoint: str | None = None) -> TrainedRun:
    """Open a run from its folder.

    Raises:
        ValueError: the run, its adapter or its configuration cannot be used.
    """
    adapter = find_adapter(run, checkpoint)
    config = load_config(run / records.CONFIG)
    if config.task != CAUSAL_LM:
        raise ValueError(
            f"{run} was trained with task {config.task}, and this command is for {CAUSAL_LM}. Its adapter is plain "
            f"LoRA: PeftModel.from_pretrained(base, {str(adapter)!r}), where base is of {TASKS[config.task].auto_class}"
        )
    dtype = load.resolve_compute_dtype(config.model.compute_dtype)
    data: dict[str, Any] = {}
    if (run / records.RUN).is_file():
        recorded = files.read_json(run / records.RUN)
        data = recorded.get("data", {})
        # `auto` was resolved on the machine of the run.
        dtype = getattr(torch, records.read_fingerprint(run).model["compute_dtype"].removeprefix("torch."))
    return TrainedRun(
        folder=run,
        adapter=adapter,
        config=config,
        compute_dtype=dtype,
        chat=data.get("chat", False),
        formats={source["format"] for source in data.get("train", [])} or {config.data.format},
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
