"""The optimizer engine around the model: the only file that knows DeepSpeed's insides."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn


class ZeroOptimizer(Protocol):
    """The part of DeepSpeed's ZeRO optimizer that is used here; it has no types."""

    single_partition_of_fp32_groups: Sequence[Tensor]
    optimizer: torch.optim.Optimizer
    check_grad_overflow: bool
    check_overflow: Callable[..., None]
    compute_grad_norm: bool
    overflow: bool


class DeepSpeedEngine(Protocol):
    """The part of DeepSpeed's engine that is used; its own types say only that each is a tensor or a module."""

    optimizer: ZeroOptimizer
    global_steps: int

    def zero_optimization_stage(self) -> int: ...
    def gradient_clipping(self) -> float: ...
    def gradient_accumulation_steps(self) -> int: ...
    def train_micro_batch_size_per_gpu(self) -> int: ...
    def bfloat16_enabled(self) -> bool: ...
    def fp16_enabled(self) -> bool: ...


class FragmentAddress(Protocol):
    """The place of a part of a flat tensor."""

    start: int
    numel: int


class FragmentMapping(Protocol):
    """The part of a parameter that this rank owns (``lp``), and the place of its master copy (``hp``)."""

    param_group_index: int
    lp_fragment_address: FragmentAddress
    hp_fragment_address: FragmentAddress


class LinkedParameter(Protocol):
    """A parameter with the attribute that DeepSpeed adds; None if this rank owns no part of it."""

    _hp_mapping: FragmentMapping | None


def deepspeed_of(wrapped: nn.Module) -> DeepSpeedEngine:
    """A model wrapped by DeepSpeed, with the engine's type."""
    return cast(DeepSpeedEngine, wrapped)


def engine_of(wrapped: nn.Module) -> str:
    """The engine that wraps a prepared model: ``zero2``, another ``zeroN``, ``ddp``, ``dp`` (the Trainer's choice for
    one process that sees several GPUs) or ``none``."""
    if isinstance(wrapped, nn.DataParallel):
        return "dp"
    if type(wrapped).__name__ == "DeepSpeedEngine":
        return f"zero{deepspeed_of(wrapped).zero_optimization_stage()}"
    return "ddp" if isinstance(wrapped, nn.parallel.DistributedDataParallel) else "none"


def zero_entries(parameter: nn.Parameter, keep: Tensor) -> None:
    """Set entries of a parameter to 0 for good, also under ZeRO; see :func:`write_entries`.

    Args:
        parameter: a parameter of any shape.
        keep: boolean mask of the same shape, False where the entry becomes 0.
    """
    write_entries(parameter, torch.zeros_like(parameter), ~keep)


@torch.no_grad()
def write_entries(parameter: nn.Parameter, values: Tensor, chosen: Tensor) -> None:
    """Give entries of a parameter new values for good, also under ZeRO; leave all others as they are. The optimizer's
    moments stay as they are.

    ZeRO keeps a float32 master copy from which every optimizer step overwrites the live parameter: the next step would
    undo a change of the live parameter alone, and a change of the master copy alone would take effect only then. So
    both are changed; each rank changes the part of the master copy that it owns. The live values of the other entries,
    which may be rounded to 16 bits, must not get into the master copy.

    Args:
        parameter: a parameter of any shape.
        values: new values, in the same shape and the precision that the master copy is to have.
        chosen: boolean mask of the same shape, True where the entry changes.
    """
    parameter.data.copy_(torch.where(chosen, values.to(parameter.dtype), parameter.data))
    owned = getattr(parameter, "_hp_mapping", None)
    if owned is not None:
        address = owned.lp_fragment_address
        fragment = owned.get_hp_fragment()
        mine, new = (tensor.flatten().narrow(0, address.start, address.numel) for tensor in (chosen, values))
        fragment.copy_(torch.where(mine, new.to(fragment.dtype), fragment))


@torch.no_grad()
def scale_entries(parameter: nn.Parameter, factor: float) -> None:
    """Multiply all entries of a parameter for good, also under ZeRO; see :func:`write_entries`. Live parameter and
    master copy are multiplied separately, so that the master copy keeps its precision."""
    parameter.data.mul_(factor)
    owned = getattr(parameter, "_hp_mapping", None)
    if owned is not None:
        owned.get_hp_fragment().mul_(factor)


MASTER = "master"
"""Name of the float32 master copy among the tensors that ZeRO's optimizer keeps for a parameter."""


@dataclass(frozen=True)
class OwnedPart:
    """The part of one parameter in this rank's share of ZeRO's optimizer.

    Attributes:
        start: first element of the flattened parameter that belongs to this rank.
        tensors: :data:`MASTER` and the optimizer's state (``exp_avg``, ...), 1-D, all of the same length; they are
            views, and writing into them changes the optimizer.
    """

    start: int
    tensors: dict[str, Tensor]


def owned_parts(wrapped: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, OwnedPart]:
    """This rank's share of the optimizer, by parameter. Parameters of which it owns no part are left out, and so are
    untrained ones, which no optimizer has.

    Raises:
        ValueError: the optimizer keeps a state that is not one number per element of the parameter.
    """
    zero = deepspeed_of(wrapped).optimizer
    parts: dict[str, OwnedPart] = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        mapping = cast(LinkedParameter, parameter)._hp_mapping
        if mapping is None:
            continue
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        address = mapping.hp_fragment_address
        whole = {MASTER: flat.data, **_elementwise(zero.optimizer.state.get(flat, {}), flat)}
        tensors = {key: tensor.narrow(0, address.start, address.numel) for key, tensor in whole.items()}
        parts[name] = OwnedPart(mapping.lp_fragment_address.start, tensors)
    return parts


def _elementwise(state: Mapping[str, object], flat: Tensor) -> dict[str, Tensor]:
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim}
    for key, value in tensors.items():
        if value.shape != flat.shape or not value.is_floating_point():
            raise ValueError(
                f"the optimizer's state {key} is {value.dtype} of {value.numel()} elements for {flat.numel()} "
                "parameters, which cannot be saved for another number of ranks, nor forgotten entry by entry: set "
                "training.optim to one that keeps a floating-point number per parameter, such as adamw_torch"
            )
    return tensors


class Moments:
    """The optimizer's state for every entry of a parameter (Adam's averages), whichever engine keeps it.

    Args:
        wrapped: the prepared model.
        optimizer: its torch optimizer.
    """

    def __init__(self, wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._wrapped = wrapped if engine_of(wrapped).startswith("zero") else None
        self._optimizer = optimizer

    @torch.no_grad()
    def zero(self, parameter: nn.Parameter, chosen: Tensor) -> None:
        """Forget the past of some entries, because they now hold new values. State that all entries share, such as
        Adam's number of steps, stays.

        Args:
            parameter: a parameter of any shape.
            chosen: boolean mask of the same shape, True where the past is forgotten.

        Raises:
            ValueError: the optimizer keeps a state that is not one number per element of the parameter.
        """
        if self._wrapped is None:
            for state in _elementwise(self._optimizer.state.get(parameter, {}), parameter).values():
                state.masked_fill_(chosen, 0)
            return
        for part in owned_parts(self._wrapped, {"parameter": parameter}).values():
            for name, state in part.tensors.items():
                if name != MASTER:
                    state.masked_fill_(chosen.flatten().narrow(0, part.start, state.numel()), 0)

    def slow_down(self, rates: Callable[[], Iterable[tuple[nn.Parameter, Tensor]]]) -> None:
        """From now on, apply only a share of the optimizer's update to some entries:
        ``new <- old + share (new - old)``. Scaling their gradients would do nothing under Adam.

        It changes the values that the optimizer itself steps, which under ZeRO are the part of the master copy that a
        rank owns, before the engine copies them to the live parameters on all ranks. The optimizer's state for these
        entries is the same as without it.

        Args:
            rates: function that is called before every step and returns parameters, each with the share of its
                entries, in [0, 1], broadcastable to the parameter's shape. 0 leaves an entry as it is to the bit, and
                1 applies the whole update.
        """
        optimizer = self._optimizer if self._wrapped is None else deepspeed_of(self._wrapped).optimizer.optimizer
        before: list[tuple[Tensor, Tensor, Tensor]] = []

        @torch.no_grad()
        def remember(*_: object) -> None:
            for parameter, share in rates():
                values, part = self._stepped(parameter, share.to(parameter.device).expand_as(parameter))
                before.append((values, values.clone(), part.to(device=values.device, dtype=values.dtype)))

        @torch.no_grad()
        def bring_back(*_: object) -> None:
            for values, old, share in before:
                values.copy_(torch.lerp(old, values, share))
            before.clear()

        optimizer.register_step_pre_hook(remember)
        optimizer.register_step_post_hook(bring_back)

    def _stepped(self, parameter: nn.Parameter, other: Tensor) -> tuple[Tensor, Tensor]:
        """The part of a parameter that this rank's optimizer steps, as a view, and the same part of ``other``, a tensor
        of the parameter's shape."""
        if self._wrapped is None:
            return parameter.data, other
        for part in owned_parts(self._wrapped, {"parameter": parameter}).values():
            master = part.tensors[MASTER]
            return master, other.flatten().narrow(0, part.start, master.numel())
        return parameter.data.new_empty(0), other.flatten()[:0]


Counters = Mapping[str, Mapping[str, Any]]
"""Name of an optimizer's counter (Adam's ``step``) -> its value, dtype and device, as plain values."""


def optimizer_counters(wrapped: nn.Module) -> list[Counters]:
    """The counters of ZeRO's optimizer, by parameter group; the same on every rank."""
    zero = deepspeed_of(wrapped).optimizer
    return [counters_of(zero.optimizer.state.get(flat, {})) for flat in zero.single_partition_of_fp32_groups]


def counters_of(state: Mapping[str, object]) -> Counters:
    """The counters in the state of one parameter."""
    counters: dict[str, dict[str, object]] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and not value.ndim:
            dtype = str(value.dtype).removeprefix("torch.")
            counters[key] = {"value": value.item(), "dtype": dtype, "device": value.device.type}
        elif isinstance(value, int | float):
            counters[key] = {"value": value}
    return counters


def read_counters(counters: Counters, group: Mapping[str, Any], device: torch.device) -> dict[str, object]:
    """The inverse of :func:`counters_of`, for an optimizer that may differ from that of the checkpoint.

    Args:
        counters: counters of a parameter.
        group: the optimizer's parameter group to which the parameter belongs.
        device: device of the parameter.
    """
    # As in torch's own optimizers (Optimizer.load_state_dict): they count on the CPU, unless a kernel or a graph
    # counts. Others count on the kind of device on which they did.
    hosts = [bool(group[key]) for key in ("fused", "capturable") if key in group]
    found: dict[str, object] = {}
    for key, saved in counters.items():
        found[key] = saved["value"]
        if "dtype" in saved:
            on_device = any(hosts) if hosts else saved["device"] != "cpu"
            dtype = torch.float32 if any(hosts) else getattr(torch, saved["dtype"])
            found[key] = torch.tensor(saved["value"], dtype=dtype, device=device if on_device else "cpu")
    return found


def prepare_optimizer_state(
    wrapped: nn.Module,
    dtypes: Mapping[str, torch.dtype],
    counters: Counters | Sequence[Counters],
    step: int,
) -> None:
    """Give a fresh ZeRO optimizer the state that it would make itself at its first step, filled with zeros.

    Args:
        wrapped: DeepSpeed's engine.
        dtypes: name of a tensor of the state -> its dtype.
        counters: counters that :func:`optimizer_counters` has returned, or those that all parameters share.
        step: number of optimizer steps taken so far.
    """
    engine = deepspeed_of(wrapped)
    zero = engine.optimizer
    flats = zero.single_partition_of_fp32_groups
    by_group = [counters] * len(flats) if isinstance(counters, Mapping) else counters
    for flat, counted in zip(flats, by_group, strict=True):
        state: dict[str, object] = {key: torch.zeros_like(flat, dtype=dtype) for key, dtype in dtypes.items()}
        (group,) = [one for one in zero.optimizer.param_groups if any(member is flat for member in one["params"])]
        zero.optimizer.state[flat] = {**state, **read_counters(counted, group, flat.device)}
    engine.global_steps = step


class SkippedSteps:
    """Makes the optimizer skip a step in which a gradient is not finite, and tells whether it did; the same answer on
    every rank.

    ZeRO checks the reduced gradients itself, unless it is told not to. Under DDP, and without an engine, a hook drops
    the gradients before the step, after DDP has made them the same on every rank: an optimizer changes neither
    parameters without a gradient nor their state.

    Args:
        wrapped: the prepared model.
        optimizer: its prepared optimizer.
    """

    def __init__(self, wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._zero = deepspeed_of(wrapped).optimizer if engine_of(wrapped).startswith("zero") else None
        self._dropped = False
        if self._zero is not None:
            self._zero.check_grad_overflow = True
            _leave_to_the_norm(self._zero)
        else:
            optimizer.register_step_pre_hook(self._drop_bad_gradients)

    def last(self) -> bool:
        """Whether the latest step was skipped."""
        return bool(self._zero.overflow) if self._zero is not None else self._dropped

    def _drop_bad_gradients(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self._dropped = not bool(torch.isfinite(nn.utils.get_total_norm(gradients, torch.inf)))
        if self._dropped:
            for parameter in parameters:
                parameter.grad = None


def _leave_to_the_norm(zero: ZeroOptimizer) -> None:
    """Let ZeRO find gradients that are not finite by the norm that it needs for clipping, instead of checking each of
    them first. This saves an exchange and a wait for the GPU in every step, and some kernels for each parameter.

    DeepSpeed before 0.19.8 does not check the norm, nor does a later one that is told to compute none.
    """
    from deepspeed.runtime.zero import stage_1_and_2

    if hasattr(stage_1_and_2, "is_invalid_grad_norm") and zero.compute_grad_norm:
        zero.check_overflow = lambda partition_gradients: None
