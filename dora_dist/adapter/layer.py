"""The adapted linear layer: a frozen linear map plus gated rank-one components.

``y = W0 x + s * sum_i c_i b_i (a_i . x)`` (equation 6 of Mao et al., 2024), with ``s = alpha / initial_rank``, or an
``s`` that depends on the number of components left (:meth:`DynamicLoraLinear.follow_mask`). The layer knows tensors
only: no rank of a process, no schedule, no configuration file.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from dora_dist.adapter.components import GatheredOperands, Operands, operands_of
from dora_dist.adapter.linear_operation import Frozen, adapted_linears
from dora_dist.base_model.quantization import is_known_linear
from dora_dist.config.adapter import DRAWN_INITS

ADAPTER_NAME = "default"
ADALORA_STD = 0.02
"""Standard deviation of the entries of a_i and b_i as AdaLoRA draws them (PEFT 0.20)."""


class DynamicLoraLinear(nn.Module, LoraLayer):
    """A linear layer (plain, 4-bit or 8-bit) with ``r`` gated rank-one components.

    PEFT constructs it through ``LoraConfig._register_custom_module``, which fixes the constructor's signature, and
    finds its parameters by the names in ``adapter_layer_names``. Tensor shapes never change: ZeRO owns the storage.

    Parameters (adapter dtype): ``lora_A`` weight ``(r, in)``, ``lora_B`` weight ``(out, r)``, ``lora_gate`` ``(r,)``.
    Buffer: ``component_mask`` ``(r,)``, boolean because DeepSpeed casts floating point buffers. A component whose
    mask is False contributes exactly nothing, whatever an optimizer does to its parameters.

    Each of these is None where it is not used. ``shared`` computes the layer, together with others that read the same
    tensor or for the tokens that it is chosen for (:mod:`dora_dist.routing`). ``gathered`` makes the operands of all
    layers of the model at once. ``on_gradient`` is called when a backward comes to the layer. ``scale_of`` gives ``s``
    for a number of components.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_gate")
    base_layer: nn.Linear
    component_mask: Tensor

    def __init__(self, base_layer: nn.Linear, adapter_name: str, *, config: Any, r: int, lora_alpha: float, **_: Any):
        super().__init__()
        if adapter_name != ADAPTER_NAME:
            raise ValueError(f"one adapter per model, named {ADAPTER_NAME!r}; got {adapter_name!r}")
        assert is_known_linear(base_layer), f"{type(base_layer)} computes in a way of its own"
        LoraLayer.__init__(self, base_layer)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / r
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        device = base_layer.weight.device
        self.lora_A[adapter_name] = nn.utils.skip_init(nn.Linear, self.in_features, r, bias=False, device=device)
        self.lora_B[adapter_name] = nn.utils.skip_init(nn.Linear, r, self.out_features, bias=False, device=device)
        self.lora_gate = nn.ParameterDict({adapter_name: torch.empty(r, device=device)})
        self.register_buffer("component_mask", torch.ones(r, dtype=torch.bool, device=device))
        self.shared: Callable[[DynamicLoraLinear, Tensor], Tensor] | None = None
        self.on_gradient: Callable[[], None] | None = None
        self.gathered: GatheredOperands | None = None
        self.scale_of: Callable[[int], float] | None = None
        self.set_adapter(adapter_name)

    @property
    def lora_a(self) -> nn.Parameter:
        """Rows a_i, shape ``(r, in)``."""
        return _weight(self.lora_A)

    @property
    def lora_b(self) -> nn.Parameter:
        """Columns b_i, shape ``(out, r)``."""
        return _weight(self.lora_B)

    @property
    def gate(self) -> nn.Parameter:
        """Gates c_i, shape ``(r,)``."""
        gate: nn.Parameter = self.lora_gate[ADAPTER_NAME]
        return gate

    @property
    def scale(self) -> float:
        """``s``: ``alpha / r``, or the value that :meth:`follow_mask` has set."""
        scale: float = self.scaling[ADAPTER_NAME]
        return scale

    def follow_mask(self) -> float:
        """Set the scale for the number of components that the mask leaves, where it depends on that number.

        Returns:
            The old scale divided by the new one. ``lora_b`` multiplied by it leaves the layer's output unchanged.
        """
        kept, before = int(self.component_mask.sum()), self.scale
        if self.scale_of is None or not kept:
            return 1.0
        self.scaling[ADAPTER_NAME] = self.scale_of(kept)
        return before / self.scale

    def effective_gate(self) -> Tensor:
        """Gates with masked components at exactly 0, shape ``(r,)``."""
        return torch.where(self.component_mask, self.gate, torch.zeros_like(self.gate))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``(..., in) -> (..., out)`` in the base layer's output dtype."""
        if self.disable_adapters:
            output: Tensor = self.base_layer(x, *args, **kwargs)
            return output
        if self.shared is not None:
            return self.shared(self, x)
        return adapted_linears(x, operands([self]), frozen([self]))[0]

    def computes_as(self, other: "DynamicLoraLinear") -> bool:
        """Whether both multiply in the same dtypes, so that they can be computed together."""
        kinds = [(type(one.base_layer), getattr(one.base_layer, "compute_dtype", None)) for one in (self, other)]
        dtypes = [(one.lora_a.dtype, one.lora_b.dtype) for one in (self, other)]
        return kinds[0] == kinds[1] and dtypes[0] == dtypes[1]

    @property
    def dropout(self) -> float:
        """Probability that an entry of the components' input is dropped; 0 outside of training."""
        dropout = self.lora_dropout[ADAPTER_NAME]
        return dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0

    @torch.no_grad()
    def initialize(self, init: str, seed: int, name: str, dtype: torch.dtype) -> None:
        """Set the components to their start, with which the layer equals its base layer exactly.

        The values depend only on ``seed`` and the layer's ``name``, not on the global random state, the order of the
        layers or the process.

        Raises:
            ValueError: ``init`` is not one of ``DRAWN_INITS``.
        """
        if init not in DRAWN_INITS:
            raise ValueError(
                f"init is {init!r}, but must be one of {', '.join(DRAWN_INITS)}: a start from data is made in a run, "
                "by dora-dist train with adapter.init inputs, gradient or lora_one, or by DynamicRankCallback(init=...)"
            )
        generator = layer_generator(seed, name)
        lora_a = torch.empty(self.lora_a.shape)
        lora_b = torch.zeros(self.lora_b.shape)
        if init == "lora":
            lora_a = self.draw_rows(seed, name)
            gate = torch.ones(self.gate.shape)
        else:
            for vectors in (lora_a, lora_b):
                if init == "paper":
                    nn.init.kaiming_uniform_(vectors, generator=generator)
                else:
                    nn.init.normal_(vectors, std=ADALORA_STD, generator=generator)
            gate = torch.zeros(self.gate.shape)
        for parameter, value in ((self.lora_a, lora_a), (self.lora_b, lora_b), (self.gate, gate)):
            parameter.data = value.to(device=parameter.device, dtype=dtype)

    def draw_rows(self, seed: int, name: str) -> Tensor:
        """Rows a_i as LoRA starts with them, shape ``(r, in)``, float32, on the CPU; they depend on ``seed`` and
        ``name`` only."""
        rows = torch.empty(self.lora_a.shape)
        return nn.init.kaiming_uniform_(rows, a=5**0.5, generator=layer_generator(seed, name))

    def __repr__(self) -> str:
        return "dynamic_lora." + super().__repr__()


def operands(layers: Sequence[DynamicLoraLinear]) -> Operands:
    """The present operands of layers that read one tensor."""
    found = operands_of(layers, layers[0].gathered)
    for layer, columns in zip(layers, found.columns, strict=True):
        if layer.on_gradient is not None and columns.requires_grad:
            # The layer's parameters may have a gradient from elsewhere, such as a regularizer; its columns do not.
            columns.register_hook(lambda _, on_gradient=layer.on_gradient: on_gradient())
    return found


def frozen(layers: Sequence[DynamicLoraLinear]) -> Frozen:
    """Base layers and dropout of layers that read one tensor.

    Raises:
        ValueError: their dropout differs, for example because only one of them is in training mode.
    """
    dropouts = {layer.dropout for layer in layers}
    if len(dropouts) > 1:
        raise ValueError(
            f"layers that read one tensor have dropout {', '.join(map(str, sorted(dropouts)))}, but they drop the same "
            "entries of it: give all of them one mode (train or eval) and one probability, or "
            "add_dynamic_lora(..., fuse=False)"
        )
    return Frozen(tuple(layer.base_layer for layer in layers), dropouts.pop())


def layer_generator(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU whose numbers depend only on ``seed`` and the layer's ``name``."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))


def _weight(linears: nn.ModuleDict) -> nn.Parameter:
    # torch's types do not say what a ModuleDict holds, nor that a linear layer's weight is a parameter.
    return cast(nn.Parameter, linears[ADAPTER_NAME].weight)
