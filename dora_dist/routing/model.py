"""A model with prompt-routed LoRA: when the routers choose modules, and how layers apply the choice."""

import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from dora_dist.adapter.components import REENTRANT
from dora_dist.adapter.layer import DynamicLoraLinear, operands
from dora_dist.adapter.model import DynamicLoraForCausalLM, add_dynamic_lora
from dora_dist.base_model.head import task_of
from dora_dist.base_model.recomputation import recomputable_layers
from dora_dist.base_model.shape import input_embedding
from dora_dist.config.adapter import DynamicLoraConfig
from dora_dist.config.tasks import CAUSAL_LM
from dora_dist.distributed.agreement import Agreement
from dora_dist.routing.files import write_routed_adapter
from dora_dist.routing.prompts import Prompts, find_prompts
from dora_dist.routing.router import Decision, Router, balance_loss, decide

ROUTERS = "routers"
"""Prefix of the names of the routers' parameters."""
Selected = Sequence[tuple[Tensor, Tensor]]
"""For each module of a block, two tensors of shape ``(tokens,)``: indices, in the flattened batch, of the tokens that
the module is computed for (int64), and their gates."""


class Routing:
    """The routing decisions of one forward of the model.

    Attributes:
        number: number of the forward.
        prompts: prompts of its batch.
        decisions: number of a block -> its decision.
        selected: number of a block -> the tokens of each of its modules.
    """

    def __init__(self, number: int, prompts: Prompts) -> None:
        self.number = number
        self.prompts = prompts
        self.decisions: dict[int, Decision] = {}
        self.selected: dict[int, Selected] = {}


class RoutedLoraForCausalLM(DynamicLoraForCausalLM):
    """A causal language model in which adapted modules are chosen for each prompt, before each block.

    The choice is made once per prompt and applies to all tokens after it: those of the same forward and, in
    :meth:`generate` or :meth:`one_prompt`, those of later forwards, with or without a cache. Modules that are not
    chosen are not computed. Such an adapter is not plain LoRA, and is saved in its own format
    (:mod:`dora_dist.routing.files`).

    Attributes:
        routers: one router for each block.
        blocks: names of the adapted modules of every block, in the order of a router's outputs.
        modules_per_prompt: number of modules chosen in a block.
        routing: decisions of the latest forward; None before the first.
    """

    routers: nn.ModuleList
    blocks: list[list[str]]
    modules_per_prompt: int
    routing: Routing | None = None
    _labels: Tensor | None = None
    _kept: dict[int, Decision] | None = None

    def route(self, blocks: list[list[str]], modules_per_prompt: int, seed: int) -> None:
        """Add the routers and attach them to the blocks; must be called once."""
        base, layers = self.get_base_model(), self.adapted_layers()
        self.blocks, self.modules_per_prompt = blocks, modules_per_prompt
        gate = next(iter(layers.values())).gate
        size = input_embedding(base).embedding_dim
        self.routers = nn.ModuleList(Router(size, len(names), gate.device, gate.dtype) for names in blocks)
        decoder = base.get_decoder()
        decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        decoder.register_forward_hook(self._end)
        for number, (block, names) in enumerate(zip(recomputable_layers(base), blocks, strict=True)):
            self._router(number).initialize(seed, f"{ROUTERS}.{number}")
            block.register_forward_pre_hook(partial(self._decide, number), with_kwargs=True)
            for index, name in enumerate(names):
                layers[name].shared = partial(self._compute, number, index)

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """The routers' parameters, which are trained beside the adapter as a task head is."""
        return {f"{ROUTERS}.{name}": parameter for name, parameter in self.routers.named_parameters()}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The parent's state, and the routers' parameters."""
        return {**super().state_dict(*args, **kwargs), **self.routers.state_dict(prefix=f"{ROUTERS}.")}

    def save_pretrained(self, save_directory: str | Path, *_: Any, is_main_process: bool = True, **__: Any) -> None:
        """Write a folder that :func:`~dora_dist.routing.loading.load_adapter` reads."""
        if is_main_process:
            write_routed_adapter(
                Path(save_directory),
                factors=self.folded_factors(),
                routers=self.routers.state_dict(),
                blocks=self.blocks,
                modules_per_prompt=self.modules_per_prompt,
                base_model=self.config.name_or_path or None,
            )

    def merge_and_unload(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: a routed adapter cannot be merged.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "adapter.routing is prompt, so every prompt has its own weights: such an adapter cannot be merged. "
            "Write it with save_pretrained(FOLDER), and read it with dora_dist.load_adapter(BASE, FOLDER)"
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The parent's forward; ``labels`` also show where the prompts end."""
        self._labels = labels
        try:
            return super().forward(input_ids, attention_mask, inputs_embeds, labels, *args, **kwargs)
        finally:
            self._labels = None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's ``generate``; the whole input is the prompt.

        Raises:
            ValueError: the prompt would be read in chunks, and the first chunk alone would decide.
        """
        settings = kwargs.get("generation_config") or self.get_base_model().generation_config
        chunk = kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None))
        if chunk is not None:
            raise ValueError(f"prefill_chunk_size is {chunk}, but modules are chosen by the whole prompt: omit it")
        with self.one_prompt():
            # PEFT's method has no types.
            return super().generate(*args, **kwargs)  # type: ignore[no-untyped-call]

    @contextmanager
    def one_prompt(self) -> Iterator[None]:
        """Inside the block, the first forward decides by all that it reads, and the later ones reuse its decision: they
        continue the same rows, from a cache or from the start."""
        before, self._kept = self._kept, {}
        try:
            yield
        finally:
            self._kept = before

    def balance_loss(self, agreement: Agreement) -> Tensor:
        """Balancing loss of the latest forward, over all ranks; see :func:`~dora_dist.routing.router.balance_loss`.
        Must be called on every rank."""
        assert self.routing is not None, "no forward has decided yet"
        probabilities = [self.routing.decisions[number].probabilities for number in range(len(self.routers))]
        return balance_loss(probabilities, self.routing.prompts.trained, agreement.add_up, agreement.size)

    def _router(self, number: int) -> Router:
        router = self.routers[number]
        assert isinstance(router, Router)
        return router

    def _begin(self, _: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Before the decoder: find the batch's prompts."""
        read = next(
            value for value in (*args, inputs.get("input_ids"), inputs.get("inputs_embeds")) if value is not None
        )
        shape, cache = (read.shape[0], read.shape[1]), inputs.get("past_key_values")
        number = 0 if self.routing is None else self.routing.number + 1
        if self._kept:
            decided = len(self._kept[0].chosen)
            if decided != shape[0]:
                raise ValueError(
                    f"a forward has {shape[0]} rows, but modules were chosen for {decided} prompts: within "
                    "one_prompt() all forwards have the same rows, one prompt in each"
                )
            self.routing = Routing(number, find_prompts(shape, read.device))
            return
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                f"a forward continues a cache of {cache.get_seq_length()} tokens, but the modules chosen for them are "
                "not known: use generate(), or make all forwards of a text within model.one_prompt()"
            )
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        self.routing = Routing(number, find_prompts(shape, read.device, mask, positions, self._labels))

    def _end(self, decoder: nn.Module, _: Any, outputs: Any) -> None:
        """After the decoder: make the backward check that recomputed blocks follow the latest forward."""
        recomputes = any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules())
        hidden: Tensor = outputs[0]
        if recomputes and hidden.requires_grad:
            assert self.routing is not None
            hidden.register_hook(partial(_check_latest, weakref.ref(self), self.routing.number))

    def _decide(self, number: int, _: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Before a block: decide, unless a decision for the prompt exists. Some versions of transformers run a block's
        hooks again when they recompute it; the earlier choice then stays."""
        routing = self.routing
        assert routing is not None
        decision = self._kept.get(number) if self._kept is not None else None
        if decision is None:
            hidden: Tensor = args[0] if args else inputs["hidden_states"]
            chosen = routing.decisions[number].chosen if number in routing.decisions else None
            decision = decide(self._router(number)(hidden, routing.prompts), self.modules_per_prompt, chosen)
        if self._kept is not None:
            self._kept[number] = decision
        routing.decisions[number] = decision
        routing.selected[number] = _select(decision, routing.prompts.of_token.flatten())

    def _compute(self, number: int, index: int, layer: DynamicLoraLinear, x: Tensor) -> Tensor:
        """Replaces a layer's own forward."""
        routing = self.routing
        if routing is None or x.shape[:-1] != routing.prompts.of_token.shape:
            raise ValueError(
                f"{self.blocks[number][index]} reads a tensor of shape {tuple(x.shape)}, but a module is chosen for "
                "(rows, tokens) of a forward of the whole model: remove it from adapter.target_modules"
            )
        tokens, gates = routing.selected[number][index]
        if gates.requires_grad and not torch.is_grad_enabled():
            raise ValueError(REENTRANT)
        return routed_linear(layer, x, tokens, gates)


def routed_linear(layer: DynamicLoraLinear, x: Tensor, tokens: Tensor, gates: Tensor) -> Tensor:
    """``W0 x``, plus the components' output times a gate, computed for the chosen tokens only.

    Args:
        layer: the adapted layer.
        x: the layer's input, shape ``(..., in)``.
        tokens: indices of the chosen tokens in the flattened batch, int64, shape ``(chosen,)``. May be empty: the
            components then get gradients of 0, because engines wait for gradients.
        gates: gates of the chosen tokens, shape ``(chosen,)``.

    Returns:
        Shape ``(..., out)`` in the base layer's output dtype.
    """
    output: Tensor = layer.base_layer(x)
    found = operands([layer])
    inputs = functional.dropout(x.flatten(0, -2)[tokens].to(found.rows.dtype), layer.dropout)
    update = (inputs @ found.rows.T) @ found.columns[0] * gates[:, None]
    return output.flatten(0, -2).index_add(0, tokens, update.to(output.dtype)).view(output.shape)


def add_routed_lora(model: PreTrainedModel, config: DynamicLoraConfig) -> RoutedLoraForCausalLM:
    """Like :func:`~dora_dist.adapter.model.add_dynamic_lora`, with a router before every decoder block. The model runs
    layer by layer: nothing is fused.

    Args:
        model: a causal language model of transformers; changed in place.
        config: the adapter's configuration, with ``routing`` prompt.

    Raises:
        ValueError: as in ``add_dynamic_lora``; or ``routing`` is none; or the model is for another task, or its blocks
            do not fit (:func:`routed_blocks`).
    """
    if config.routing != "prompt":
        raise ValueError(f"routing is {config.routing}, but must be prompt: use add_dynamic_lora without it")
    if task_of(model).name != CAUSAL_LM:
        raise ValueError(
            f"a {type(model).__name__} is for {task_of(model).name}, but routing prompt is for {CAUSAL_LM}"
        )
    plain = dataclasses.replace(config, routing="none")
    adapted = add_dynamic_lora(model, plain, fuse=False, model_class=RoutedLoraForCausalLM)
    assert isinstance(adapted, RoutedLoraForCausalLM)
    blocks = routed_blocks(model, list(adapted.adapted_layers()), config.modules_per_prompt)
    adapted.route(blocks, config.modules_per_prompt, config.seed or 0)
    return adapted


def routed_blocks(model: PreTrainedModel, names: Sequence[str], modules_per_prompt: int) -> list[list[str]]:
    """Names of the adapted modules of every decoder block, each sorted.

    Args:
        model: the model; may be on the meta device.
        names: names of all adapted modules.
        modules_per_prompt: number of modules to choose in a block.

    Raises:
        ValueError: a module is in no block, or the blocks have different or too small numbers of modules.
    """
    names_of: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    prefixes = [f"{names_of[id(block)]}." for block in recomputable_layers(model)]
    blocks = [sorted(name for name in names if name.startswith(prefix)) for prefix in prefixes]
    inside = {name for block in blocks for name in block}
    outside = [name for name in names if name not in inside]
    if outside or not blocks:
        raise ValueError(
            f"adapter.routing is prompt, but {len(outside)} of {len(names)} adapted modules are in no decoder block of "
            f"a {type(model).__name__} (first {outside[0]}): remove them from adapter.target_modules, or set "
            "adapter.routing to none"
        )
    sizes = sorted({len(block) for block in blocks})
    if len(sizes) > 1 or sizes[0] < modules_per_prompt:
        raise ValueError(
            f"adapter.routing is prompt and adapter.modules_per_prompt is {modules_per_prompt}, but the decoder blocks "
            f"have {' or '.join(map(str, sizes))} adapted modules: all must have the same number, and no fewer than "
            "that; change adapter.target_modules or adapter.modules_per_prompt"
        )
    return blocks


def _select(decision: Decision, owners: Tensor) -> Selected:
    """The tokens of every module of a block.

    Args:
        decision: the block's decision.
        owners: number of each token's prompt, int64, shape ``(tokens,)``.
    """
    chosen = decision.chosen[owners].T
    modules, tokens = chosen.nonzero(as_tuple=True)
    counts: list[int] = chosen.sum(1).tolist()
    gates = decision.gates[owners[tokens], modules]
    return list(zip(tokens.split(counts), gates.split(counts), strict=True))


def _check_latest(model: "weakref.ref[RoutedLoraForCausalLM]", number: int, _: Tensor) -> None:
    """A tensor hook, which therefore holds no reference to the model. Recomputed blocks follow the latest forward.

    Raises:
        RuntimeError: the backward belongs to an earlier forward.
    """
    alive = model()
    if alive is not None and alive.routing is not None and alive.routing.number != number:
        raise RuntimeError(
            f"the backward of forward {number} comes after forward {alive.routing.number}, whose choice of modules the "
            "recomputed blocks have followed: call backward() before the next forward, or recompute no layers"
        )
