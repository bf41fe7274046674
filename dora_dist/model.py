"""Putting dynamic-rank components into a model, as a real PEFT model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModelForCausalLM
from torch import Tensor, nn

from dora_dist.adapter_config import DynamicLoraConfig
from dora_dist.chunked_loss import ChunkedLoss, proved
from dora_dist.folding import fold_components, write_lora_adapter
from dora_dist.gated_mlp import fuse_gated_mlps
from dora_dist.layer import ADAPTER_NAME, DynamicLoraLinear
from dora_dist.quantization import forbid_inference_packing
from dora_dist.shared_input import share_inputs
from dora_dist.targets import resolve_targets


class DynamicLoraModel(PeftModelForCausalLM):
    """A ``PeftModel`` whose layers are :class:`~dora_dist.layer.DynamicLoraLinear`.

    Two things differ from its parent, and both prevent silent errors: what it saves is folded to plain LoRA, and its
    state dict holds the adapter only, so that no checkpoint carries the frozen base (whose quantization constants are
    buffers to DeepSpeed, and would be copied into every one). A third is off at first: :meth:`leave_out_logits`.
    """

    _chunked_loss: ChunkedLoss | None = None
    _loss_only = False

    def leave_out_logits(self) -> str | None:
        """From now on compute the loss without logits (:mod:`dora_dist.chunked_loss`) in training, where the output's
        ``logits`` are None then; only if this is proved to be the model's own loss.

        Returns:
            Why it is not, so that nothing changes; None if it is.
        """
        self._chunked_loss, reason = proved(self.get_base_model())
        return reason or None

    @contextmanager
    def loss_only(self) -> Iterator[None]:
        """While it lasts, the loss is computed as in training, though the model is not in training mode."""
        before, self._loss_only = self._loss_only, True
        try:
            yield
        finally:
            self._loss_only = before

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The parent's; see :meth:`leave_out_logits`."""
        forward = partial(super().forward, input_ids, attention_mask, inputs_embeds, labels, **kwargs)
        wanted = labels is not None and (self.training or self._loss_only)
        if self._chunked_loss is None or not wanted or torch.compiler.is_compiling():
            return forward()
        with self._chunked_loss.deferred():
            outputs = forward(return_dict=True)
        outputs["logits"] = None
        return outputs

    @property
    def leaves_out_logits(self) -> bool:
        """Whether the loss is computed without logits in training."""
        return self._chunked_loss is not None

    def adapted_layers(self) -> dict[str, DynamicLoraLinear]:
        """Name of the module in the base model -> adapted layer, in the order of the names."""
        prefix = "base_model.model."
        found = {
            name.removeprefix(prefix): module
            for name, module in self.named_modules()
            if isinstance(module, DynamicLoraLinear)
        }
        return dict(sorted(found.items()))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Parameters and mask of the adapter only."""
        full = super().state_dict(*args, **kwargs)
        return {name: value for name, value in full.items() if ".lora_" in name or name.endswith(".component_mask")}

    def folded_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Plain LoRA factors by module name; see :func:`dora_dist.folding.fold_components`."""
        return {
            name: fold_components(layer.lora_a, layer.effective_gate(), layer.lora_b, layer.scale)
            for name, layer in self.adapted_layers().items()
        }

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **_: Any) -> None:
        """Write the adapter as plain LoRA that stock PEFT loads exactly; gates and masks are folded in.

        Raises:
            ValueError: no component has a non-zero gate.
        """
        if is_main_process:
            write_lora_adapter(Path(save_directory), self.folded_factors(), self.config.name_or_path or None)


def add_dynamic_lora(model: nn.Module, config: DynamicLoraConfig) -> DynamicLoraModel:
    """Give the chosen linear layers of ``model`` gated rank-one components and freeze everything else.

    The model is changed in place. The result is a real ``PeftModel``: the stock Trainer accepts it on a quantized base.

    Args:
        model: a causal language model; its linear layers may be quantized by bitsandbytes (4 or 8 bit).
        config: the adapter.

    Raises:
        ValueError: ``target_modules`` matches nothing, or a 4-bit weight has been repacked for inference.
    """
    names = resolve_targets(model, config.target_modules)
    forbid_inference_packing(model)
    lora_config = LoraConfig(
        r=config.start_rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=names,
        task_type="CAUSAL_LM",
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
    )
    # Covers bitsandbytes' quantized layers, which derive from nn.Linear.
    lora_config._register_custom_module({nn.Linear: DynamicLoraLinear})
    peft_model = DynamicLoraModel(model, lora_config, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)
    dtype = model.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    layers = peft_model.adapted_layers()
    _check_all_adapted(names, layers)
    for name, layer in layers.items():
        layer.initialize(config.init, config.seed or 0, name, dtype)
        layer.gate.requires_grad_(config.train_gates)
    fuse_gated_mlps(peft_model)
    share_inputs(peft_model)
    return peft_model


def _check_all_adapted(wanted: Sequence[str], adapted: dict[str, DynamicLoraLinear]) -> None:
    assert list(adapted) == sorted(wanted), f"PEFT adapted {sorted(adapted)}, wanted {sorted(wanted)}"
