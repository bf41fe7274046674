"""Putting dynamic-rank components into a model, as a real PEFT model."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, LoraConfig, PeftModel, PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dora_dist.adapter.components import GatheredOperands
from dora_dist.adapter.from_folder import FoundAdapter, find_start, start_from
from dora_dist.adapter.gated_mlp import fuse_gated_mlps
from dora_dist.adapter.layer import ADAPTER_NAME, DynamicLoraLinear
from dora_dist.adapter.plain_lora import KEY_PREFIX, NEW_ROWS, NewRows, fold_components, write_lora_adapter
from dora_dist.adapter.ranks import resolve_ranks
from dora_dist.adapter.shared_input import share_inputs
from dora_dist.adapter.unfolded import load_masks, load_parameters
from dora_dist.base_model.chunked_loss import ChunkedLoss, proved
from dora_dist.base_model.head import head_modules, read_in_own_dtype, task_of
from dora_dist.base_model.kernels import NO_KERNELS, KernelsInUse
from dora_dist.base_model.new_tokens import modules_with_rows
from dora_dist.base_model.quantization import forbid_inference_packing
from dora_dist.config.adapter import RANKS_FROM_DATA, UNIFORM, DynamicLoraConfig
from dora_dist.config.format_version import METHOD_TENSORS
from dora_dist.config.tasks import CAUSAL_LM, TASKS, Task

Module = TypeVar("Module", bound=nn.Module)


class DynamicLoraModel(PeftModel):
    """A ``PeftModel`` whose layers are :class:`~dora_dist.adapter.layer.DynamicLoraLinear`; mixed into PEFT's class
    for a task.

    Two things differ from PEFT's classes, and both prevent silent errors: it saves its adapter folded to plain LoRA,
    and its state dict holds only what is trained, so that no checkpoint carries the frozen base (whose quantization
    constants are buffers to DeepSpeed, and would be copied into every checkpoint).

    Attributes:
        fused: whether modules may run otherwise than by their own forward; see ``fuse`` of :func:`add_dynamic_lora`.
        kernels: kernels that compute the base.
        dynamic_config: configuration that the adapter was made from.
        adapter_dtype: dtype that its parameters were made in.
        has_controller: whether a controller prunes it, or has done so.
        token_ids: ids of the new tokens whose rows are trained.
    """

    fused = True
    kernels = NO_KERNELS
    dynamic_config: DynamicLoraConfig
    adapter_dtype: torch.dtype
    has_controller = False
    token_ids: Sequence[int] = ()

    if TYPE_CHECKING:

        def get_base_model(self) -> PreTrainedModel:
            """PEFT's method, whose type says only that the result is a module."""

    @property
    def has_loss_without_logits(self) -> bool:
        """Whether the loss is computed without logits in training."""
        return False

    def adapted_layers(self) -> dict[str, DynamicLoraLinear]:
        """Name of the module in the base model -> adapted layer, in the order of the names."""
        return dict(sorted(_named(self, DynamicLoraLinear)))

    @property
    def is_alive(self) -> bool:
        """Whether any component is unmasked and has a gate that is not 0."""
        return any(bool(layer.effective_gate().any()) for layer in self.adapted_layers().values())

    def check_alive(self) -> None:
        """Refuse an adapter that has no effect.

        Raises:
            ValueError: every component has a gate of 0 or is masked.
        """
        if not self.is_alive:
            raise ValueError(
                "no component of any layer has a non-zero gate, so that the adapter has no effect: set "
                "training.learning_rate above 0, and train for more steps (training.max_steps)"
            )

    def heads(self) -> dict[str, nn.Module]:
        """See :func:`trained_heads`."""
        return trained_heads(self)

    def new_rows(self) -> dict[str, nn.Parameter]:
        """Name of the embedding or output head in the base model -> its trained rows of the new tokens, shape
        ``(tokens, hidden)``. A head that is tied to the embedding has none of its own."""
        adapters = {name: wrapper.token_adapter for name, wrapper in _named(self, TrainableTokensWrapper)}
        return {
            name: adapter.trainable_tokens_delta[ADAPTER_NAME]
            for name, adapter in adapters.items()
            if adapter.tied_adapter is None
        }

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that are trained beside the components, by name: those of the :meth:`heads`, by their names in the
        base model, and the :meth:`new_rows`. May be empty."""
        heads = {
            f"{module}.{name}": parameter
            for module, head in self.heads().items()
            for name, parameter in head.named_parameters()
        }
        return heads | {f"{module}.new_rows": rows for module, rows in self.new_rows().items()}

    # torch's type says that the dictionary passed in is the one returned; this returns a part of it.
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Parameters and masks of the adapter, and the trained parameters of head and new tokens."""
        full = super().state_dict(*args, **kwargs)
        return {
            name: value
            for name, value in full.items()
            if any(part in name for part in (".lora_", ".modules_to_save.", NEW_ROWS, ".component_mask"))
        }

    def folded_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Plain LoRA factors by module name; see :func:`dora_dist.adapter.plain_lora.fold_components`."""
        return {
            name: fold_components(layer.lora_a, layer.effective_gate(), layer.lora_b, layer.scale)
            for name, layer in self.adapted_layers().items()
        }

    def save_pretrained(self, save_directory: str | Path, *_: Any, is_main_process: bool = True, **__: Any) -> None:
        """Write the adapter as plain LoRA of one rank that PEFT, vLLM and llama.cpp load exactly; gates and masks are
        folded in. The head and the rows of new tokens are written too, which only PEFT loads. Where no component is
        alive, as at a start with gates of 0, every module is written as zeros. Warns if nothing has pruned the adapter.
        """
        if is_main_process:
            config = self.dynamic_config
            if not self.has_controller and config.ranks == UNIFORM and config.start_rank > config.target_rank:
                warnings.warn(
                    f"the adapter was never pruned: every layer still has initial_rank {config.start_rank}, and not "
                    f"target_rank {config.target_rank} on average. Train it with dora-dist train, or give your trainer "
                    "callbacks=[DynamicRankCallback()] (docs/trainers.md); to keep these ranks, set initial_rank to "
                    "target_rank",
                    stacklevel=2,
                )
            write_lora_adapter(
                Path(save_directory),
                self.folded_factors(),
                self.config.name_or_path or None,
                task_type=task_of(self.get_base_model()).peft_type,
                head={module: dict(head.named_parameters()) for module, head in self.heads().items()},
                keep_empty=not self.is_alive,
                new_rows=NewRows(ids=self.token_ids, rows=self.new_rows()) if self.token_ids else None,
            )

    # PEFT's other parameters have no use here.
    def load_adapter(self, model_id: str | Path, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Read parameters, gates and masks from a checkpoint of a
        :class:`~dora_dist.stock_trainer.callback.DynamicRankCallback`. A Trainer calls this method to resume.

        Raises:
            ValueError: the checkpoint has none, or those of another adapter.
        """
        path = Path(model_id) / METHOD_TENSORS
        if not path.is_file():
            raise ValueError(
                f"{model_id} has no {METHOD_TENSORS}, which gated components are read from (an adapter alone has its "
                "gates folded in): resume from a checkpoint that a trainer with callbacks=[DynamicRankCallback()] has "
                "written to its end; for inference, PeftModel.from_pretrained(BASE, FOLDER) reads the adapter"
            )
        tensors, layers = load_file(path), self.adapted_layers()
        try:
            load_parameters(tensors, layers, self.head_parameters())
            load_masks(tensors, layers)
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"{path} is of another adapter: {error}. Give add_dynamic_lora the model and the configuration that "
                "the checkpoint was trained with"
            ) from None

    def merge_and_unload(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: PEFT's merge knows nothing of gates and masks.

        Raises:
            ValueError: always; the message says how to merge this model.
        """
        raise ValueError(
            "merge_and_unload() does not merge gated components. Write them as plain LoRA with "
            "save_pretrained(FOLDER), then PeftModel.from_pretrained(BASE, FOLDER).merge_and_unload(); of a run, "
            "dora-dist export RUN --format merged does it and verifies it"
        )


class DynamicLoraForCausalLM(DynamicLoraModel, PeftModelForCausalLM):
    """The class for causal language models, which may compute their loss without logits; see
    :meth:`use_loss_without_logits`."""

    _chunked_loss: ChunkedLoss | None = None
    _loss_only = False

    def use_loss_without_logits(self) -> str | None:
        """Compute the loss without logits (:mod:`dora_dist.base_model.chunked_loss`) in training from now on; the
        output's ``logits`` are None there. Nothing changes unless the model is ``fused``, and this is proved to give
        the model's own loss.

        Returns:
            The reason why nothing has changed; None if the loss is now computed so.
        """
        if not self.fused:
            return "fuse is false"
        if self.token_ids:
            return "rows of its head are trained (adapter.new_tokens)"
        self._chunked_loss, reason = proved(self.get_base_model())
        return reason or None

    @contextmanager
    def loss_only(self) -> Iterator[None]:
        """Within this context, the loss is computed as in training even if the model is not in training mode: without
        logits after :meth:`use_loss_without_logits`, from logits otherwise."""
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
        *args: Any,
        predicting: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The parent's forward; see :meth:`use_loss_without_logits`. ``predicting`` are the positions that have a
        target, as :func:`dora_dist.data.batches.predicting` finds them: without them, the host waits for the GPU to
        find them.
        """
        forward = partial(super().forward, input_ids, attention_mask, inputs_embeds, labels, *args, **kwargs)
        wanted = labels is not None and (self.training or self._loss_only)
        if self._chunked_loss is None or not wanted or torch.compiler.is_compiling():
            return forward()
        with self._chunked_loss.deferred(predicting):
            outputs = forward(return_dict=True)
        outputs["logits"] = None
        return outputs

    @property
    def has_loss_without_logits(self) -> bool:
        """Whether the loss is computed without logits in training."""
        return self._chunked_loss is not None


def _model_class(task: Task) -> type[DynamicLoraModel]:
    """The class of adapted models for a task: :class:`DynamicLoraModel` mixed into PEFT's class, and named after it."""
    if task.name == CAUSAL_LM:
        return DynamicLoraForCausalLM
    parent = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task.peft_type]
    name = parent.__name__.replace("PeftModel", "DynamicLora")
    return type(name, (DynamicLoraModel, parent), {"__module__": __name__, "__doc__": f"Adapted model: {task.name}."})


MODELS = {task.name: _model_class(task) for task in TASKS.values()}
globals().update({model.__name__: model for model in MODELS.values()})  # where pickle looks for a class


def add_dynamic_lora(
    model: PreTrainedModel,
    config: DynamicLoraConfig,
    fuse: bool = True,
    kernels: KernelsInUse = NO_KERNELS,
    model_class: type[DynamicLoraModel] | None = None,
    token_ids: Sequence[int] = (),
    found: FoundAdapter | None = None,
) -> DynamicLoraModel:
    """Give the chosen linear layers of ``model`` gated rank-one components, and freeze everything else except the head
    of its task, where it has one.

    The model is changed in place. The result is a real ``PeftModel``, of PEFT's class for the model's task, so that
    the stock Trainer accepts it on a quantized base.

    Args:
        model: a transformers model; its linear layers may be quantized by bitsandbytes (4 or 8 bit).
        config: the adapter's configuration.
        fuse: whether to compute gated MLPs as one operation, q, k and v of an attention together, and the operands of
            all layers at once; to allow :meth:`DynamicLoraForCausalLM.use_loss_without_logits`; and to cast the input
            of a trained head to the dtype of its parameters. With False, no forward is replaced and no hook is
            registered, for comparisons; a head whose dtype is not that of the base then needs autocast.
        kernels: result of :func:`~dora_dist.base_model.kernels.use_kernels` for the model. Gated MLPs that run as one
            operation use them too.
        model_class: class of the result; by default the one for the model's task.
        token_ids: ids of the ``new_tokens`` of ``config``, whose rows the model already has, at their start
            (:func:`~dora_dist.base_model.new_tokens.start_rows`).
        found: the adapter in ``start_from`` of ``config``, if it has been read already; None to read it here.

    Raises:
        ValueError: ``config`` is another method's, has routing, or has new tokens without ids; the model has an
            adapter, ``target_modules`` matches nothing, ``start_from`` names an adapter that does not fit, rows of new
            tokens cannot be trained, or a 4-bit weight has been repacked for inference.
    """
    _check_arguments(model, config, token_ids)
    ranks = resolve_ranks(model, config)
    found = found or find_start(model, config, ranks)
    forbid_inference_packing(model)
    task, heads = task_of(model), head_modules(model)
    with_rows = list(modules_with_rows(model)) if token_ids else []
    lora_config = _peft_config(model, config, ranks, {name: list(token_ids) for name in with_rows})
    peft_model = (model_class or MODELS[task.name])(
        model, lora_config, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False
    )
    dtype: torch.dtype = model.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    layers = peft_model.adapted_layers()
    _check_all_adapted(ranks, layers)
    _start(layers, config, dtype, found)
    prepare_heads(peft_model, heads, dtype, cast_inputs=fuse)
    _prepare_rows(peft_model, with_rows, dtype, token_ids)
    peft_model.fused, peft_model.kernels = fuse, kernels
    peft_model.dynamic_config, peft_model.adapter_dtype = config, dtype
    if fuse:
        _gather_components(peft_model, [*fuse_gated_mlps(peft_model, kernels.swiglu), *share_inputs(peft_model)])
    return peft_model


def _start(
    layers: Mapping[str, DynamicLoraLinear], config: DynamicLoraConfig, dtype: torch.dtype, found: FoundAdapter | None
) -> None:
    for name, layer in layers.items():
        layer.component_mask[config.start_rank :] = config.slots is None
        layer.scale_of = config.scale_of
        # Depends on the number of unmasked components; masks cannot be counted on the meta device.
        layer.scaling[ADAPTER_NAME] = config.scale_of(len(layer.gate) if config.slots is None else config.start_rank)
        layer.initialize(config.init, config.seed or 0, name, dtype)
        layer.gate.requires_grad_(config.train_gates)
    if found is not None:
        start_from(layers, found)


def _peft_config(
    model: PreTrainedModel, config: DynamicLoraConfig, ranks: Mapping[str, int], token_ids: dict[str, list[int]]
) -> LoraConfig:
    """PEFT's configuration for the model. ``token_ids``: name of a module with rows of new tokens -> ids of these."""
    task = task_of(model)
    lora_config = LoraConfig(
        r=config.num_slots,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT multiplies by it; its type is an int
        lora_dropout=config.dropout,
        rank_pattern={f"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != config.num_slots},
        target_modules=list(ranks),
        modules_to_save=head_modules(model) or None,  # PEFT adds names to it
        trainable_token_indices=token_ids or None,
        task_type=task.peft_type,
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
    )
    # Covers bitsandbytes' quantized layers, which derive from nn.Linear.
    lora_config._register_custom_module({nn.Linear: DynamicLoraLinear})
    return lora_config


def _prepare_rows(model: DynamicLoraModel, wanted: Sequence[str], dtype: torch.dtype, token_ids: Sequence[int]) -> None:
    """Set the dtype of the rows of new tokens in the modules ``wanted``, whatever the base computes in."""
    found = model.new_rows()
    assert list(found) == list(wanted), f"PEFT trains rows of {list(found)}, wanted {wanted}"
    for rows in found.values():
        rows.data = rows.data.to(dtype)
    model.token_ids = list(token_ids)


def _check_arguments(model: PreTrainedModel, config: DynamicLoraConfig, token_ids: Sequence[int]) -> None:
    if not isinstance(config, DynamicLoraConfig):
        raise ValueError(
            f"config is a {type(config).__name__}, but must be a DynamicLoraConfig: DynamicLoraConfig(target_rank=8, "
            "alpha=8.0), say, where PEFT's LoraConfig has r and lora_alpha"
        )
    if config.routing != "none":
        raise ValueError(
            f"config.routing is {config.routing}, but add_dynamic_lora adds no routers: call dora_dist.add_routed_lora"
        )
    if len(config.new_tokens or []) != len(token_ids):
        raise ValueError(
            f"config.new_tokens is {config.new_tokens}, which a tokenizer must know first, as dora-dist train does: "
            "leave it out, or train with dora-dist train"
        )
    if config.ranks in RANKS_FROM_DATA:
        raise ValueError(
            f"config.ranks is {config.ranks}, which is made from training rows in a run, by dora-dist train: set it to "
            "uniform, or to the plan.json of such a run"
        )
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "the model has an adapter already: give add_dynamic_lora the model as transformers loads it, or go on with "
            "the one that the first call has returned"
        )


def _gather_components(model: DynamicLoraModel, groups: Sequence[Sequence[DynamicLoraLinear]]) -> None:
    """Let the operands of all layers be made at once, in every forward of the base.

    Args:
        model: the model, with its adapter.
        groups: groups of layers that read one tensor; every other layer is a group by itself.
    """
    grouped = {layer for group in groups for layer in group}
    layers = model.adapted_layers().values()
    gathered = GatheredOperands([*groups, *([layer] for layer in layers if layer not in grouped)])
    for layer in layers:
        layer.gathered = gathered
    gathered.attach(model.get_base_model())


def trained_heads(model: PeftModel) -> dict[str, nn.Module]:
    """Name of the module in the base model -> the copy of it that PEFT trains in its place, as a whole."""
    return {name: wrapper.modules_to_save[ADAPTER_NAME] for name, wrapper in _named(model, ModulesToSaveWrapper)}


def prepare_heads(model: PeftModel, wanted: Sequence[str], dtype: torch.dtype, cast_inputs: bool = True) -> None:
    """Set the dtype of the heads that are trained, whatever the base computes in.

    Args:
        model: a PEFT model, with any adapter.
        wanted: names of the modules that are its head and are to be trained.
        dtype: dtype of their parameters.
        cast_inputs: whether they cast their input to this dtype; see
            :func:`~dora_dist.base_model.head.read_in_own_dtype`.

    Raises:
        ValueError: PEFT, which finds modules to train by the ends of their names, would train others.
    """
    heads = trained_heads(model)
    if sorted(heads) != sorted(wanted):
        raise ValueError(
            f"the head of {type(model.get_base_model()).__name__} is {', '.join(wanted)}, but PEFT would train "
            f"{', '.join(heads)} as a whole: such a model cannot be tuned here"
        )
    for head in heads.values():
        head.to(dtype)
        if cast_inputs:
            read_in_own_dtype(head)


def _named(model: nn.Module, kind: type[Module]) -> Iterator[tuple[str, Module]]:
    for name, module in model.named_modules():
        if isinstance(module, kind):
            yield name.removeprefix(KEY_PREFIX), module


def _check_all_adapted(wanted: Mapping[str, int], adapted: Mapping[str, DynamicLoraLinear]) -> None:
    found = {name: len(layer.gate) for name, layer in adapted.items()}
    assert found == wanted, f"PEFT adapted {found}, wanted {wanted}"
