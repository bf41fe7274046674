"""RMSNorm, RoPE and SwiGLU as one kernel each: Liger's, written in Triton (``pip install "dora-dist[gpu]"``).

transformers computes each of them in several operations over the same tensors, and a GPU waits for their launches. A
kernel replaces them where a module has the code of Llama's, and where a trial on the model itself, on its device and in
its dtype, gives the same output and the same gradients. Only the modules of one model are changed: transformers, and
other models in the process, stay as they are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import FunctionType, MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from dora_dist.base_model.proof import relative_difference, short_rows
from dora_dist.base_model.shape import has_code_of, is_gated_mlp, linear_layer, text_decoder
from dora_dist.config.model import KERNELS
from dora_dist.console.text import say

RMS_NORM, ROPE, SWIGLU = KERNELS
TRIED_ALONE = (RMS_NORM, SWIGLU)
"""Kernels whose trial runs no layer of the model; RoPE's trial runs the model, and an attention with its weights."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
LOW_PRECISION_TOLERANCE = 2e-2
"""Largest relative difference of a trial's results in 16 bits: a kernel rounds to bfloat16 in other places."""
NUM_ROWS = 16
"""Number of rows in a trial."""


class Swiglu:
    """``silu(gate) * up`` and its gradients, in torch's operations. All tensors have the shape of ``gate``,
    ``(..., width)``, and its dtype."""

    overwrites = False
    """Whether :meth:`gradients` overwrites ``gate`` and ``up``, so that they cannot be read a second time."""

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        """``silu(gate) * up``."""
        return functional.silu(gate).mul_(up)

    def product_again(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor | None]:
        """The product, computed again in a backward, and the activation, if :meth:`gradients` needs it."""
        activation = functional.silu(gate)
        return activation * up, activation

    def gradients(
        self, grad_product: Tensor, gate: Tensor, up: Tensor, activation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up; overwrites ``grad_product`` and ``activation``."""
        assert activation is not None
        grad_up = activation.mul_(grad_product)
        return torch.ops.aten.silu_backward(grad_product.mul_(up), gate), grad_up


class LigerSwiglu(Swiglu):
    """The same in one launch each. The kernels need contiguous tensors."""

    overwrites = True

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        from liger_kernel.ops.swiglu import swiglu_forward

        _, _, product = swiglu_forward(gate.contiguous(), up.contiguous())
        found: Tensor = product
        return found

    def product_again(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.product(gate, up), None

    def gradients(
        self, grad_product: Tensor, gate: Tensor, up: Tensor, activation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.swiglu import swiglu_backward

        found: tuple[Tensor, Tensor] = swiglu_backward(gate.contiguous(), up.contiguous(), grad_product.contiguous())
        return found


@dataclass(frozen=True)
class KernelsInUse:
    """The members of :data:`KERNELS` that compute a model."""

    names: tuple[str, ...] = ()

    @property
    def swiglu(self) -> Swiglu:
        """SwiGLU for gated MLPs that run as one operation (:mod:`dora_dist.adapter.gated_mlp`)."""
        return LigerSwiglu() if SWIGLU in self.names else Swiglu()


NO_KERNELS = KernelsInUse()


def use_kernels(model: PreTrainedModel, wanted: Sequence[str] = KERNELS) -> KernelsInUse:
    """Let the norms and the attention of a model run by kernels, in place, where a trial shows that they compute the
    same; the log says which do, and why others do not. SwiGLU is only tried here: the code that adapts the MLPs
    installs it.

    Args:
        model: the model, on its device, without an adapter, not in training mode.
        wanted: some of :data:`KERNELS`.
    """
    if find_spec("liger_kernel") is None:
        say(f"{', '.join(wanted)} run by transformers' own code: to use kernels, pip install 'dora-dist[gpu]'")
        return NO_KERNELS
    used = []
    text = model.get_submodule(text_decoder(model))
    for name in wanted:
        kernel = _KERNELS[name]
        modules = [module for module in text.modules() if kernel.fits(module)]
        if not modules:
            continue
        flaw = _flaw(kernel.trials(model, modules), TOLERANCE.get(model.dtype, LOW_PRECISION_TOLERANCE))
        if flaw is not None:
            say(f"{name} of {type(model).__name__} runs by the model's own code, not by Liger's kernel: {flaw}")
            continue
        for module in modules:
            kernel.install(module)
        used.append(name)
    if used:
        say(f"kernels in use: {', '.join(used)}")
    return KernelsInUse(tuple(used))


Trial = tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]
"""Two functions, which return results of a kernel and results of the model's own code, to be compared."""


def _flaw(trials: Iterator[Trial], tolerance: float) -> str | None:
    """The reason why a kernel may not replace the model's own code; None if it may."""
    try:
        for ours, own in trials:
            for found, expected in zip(ours(), own(), strict=True):
                if found.dtype != expected.dtype:
                    return f"a result is {found.dtype}, not {expected.dtype}"
                difference = relative_difference(found, expected)
                if not difference <= tolerance:
                    return f"a result differs by {difference:.2g}, and {tolerance:.2g} is allowed"
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernel
    except Exception as error:  # a compiler of kernels, and what it calls, raises anything
        return f"it does not run here ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    return None


def _results(run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output, and gradient of the input."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        output = run(x)
    return [output.detach(), *torch.autograd.grad(output, x, _noise(output, seed=1))]


def _noise(like: Tensor, seed: int) -> Tensor:
    """Normal random numbers in the shape, dtype and device of a tensor, from a separate generator."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)


class _RmsNorm(nn.Module):
    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * x.to(dtype)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module computes ``w * x / sqrt(mean(x^2) + eps)`` by the code of :class:`_RmsNorm`, as transformers'
    Llama has it. Gemma's norm, with ``1 + w``, has other code."""
    return has_code_of(type(module).forward, _RmsNorm.forward)


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    assert x.dtype == norm.weight.dtype, f"the norm of {x.dtype} has a weight of {norm.weight.dtype}"
    # Not in place: a residual connection may share the gradient of the output. By rows, whatever their number: Liger
    # has other kernels for many short rows, which a trial with few rows would not test.
    offset, casting, in_place, by_rows = 0.0, "llama", False, True
    # torch has no types for `apply`.
    output: Tensor = LigerRMSNormFunction.apply(
        x, norm.weight, norm.variance_epsilon, offset, casting, in_place, by_rows
    )
    return output


def _norm_trials(model: PreTrainedModel, norms: list[nn.Module]) -> Iterator[Trial]:
    """Trials of one norm of each class and width."""
    chosen = {(type(norm), _weight(norm).shape): norm for norm in norms}.values()
    for norm in chosen:
        x = _noise(_weight(norm).new_empty(NUM_ROWS, *_weight(norm).shape, dtype=model.dtype), seed=0)
        yield partial(_results, partial(_rms_norm, norm), x), partial(_results, partial(type(norm).forward, norm), x)


def _weight(norm: nn.Module) -> nn.Parameter:
    # torch's type is that of every part: a module or a tensor.
    return cast(nn.Parameter, norm.weight)


def _install_norm(norm: nn.Module) -> None:
    norm.forward = MethodType(_rms_norm, norm)


def rotate_half(x: Tensor) -> Tensor:
    """Copy of the function in transformers' Llama, with whose code other models' functions are compared."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Copy of the function in transformers' Llama, with whose code other models' functions are compared."""
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed


ROTARY = apply_rotary_pos_emb.__name__


def is_rotating(module: nn.Module) -> bool:
    """Whether a module rotates queries and keys by a function that has the code of :func:`apply_rotary_pos_emb`."""
    forward = type(module).forward
    code, names = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    if code is None or ROTARY not in code.co_names or ROTARY not in names:
        return False
    rotary = names[ROTARY]
    same = has_code_of(rotary, apply_rotary_pos_emb)
    return same and has_code_of(rotary.__globals__[rotate_half.__name__], rotate_half)


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Replaces transformers' ``apply_rotary_pos_emb``. It overwrites ``q`` and ``k``: a trial of the whole attention
    shows that nothing else reads them."""
    from liger_kernel.ops.rope import LigerRopeFunction

    assert unsqueeze_dim == 1, f"heads are in dimension {unsqueeze_dim}"
    assert q.dtype == k.dtype == cos.dtype, f"queries are {q.dtype}, keys {k.dtype}, and cosines {cos.dtype}"
    rotated: tuple[Tensor, Tensor] = LigerRopeFunction.apply(q, k, cos, sin)
    return rotated


def _with_rope(attention: nn.Module) -> MethodType:
    """The forward of an attention with another rotary function: the same code, with other global names."""
    forward: Any = type(attention).forward
    names = {**forward.__globals__, ROTARY: _rope}
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return MethodType(made, attention)


def _rope_trials(model: PreTrainedModel, attentions: list[nn.Module]) -> Iterator[Trial]:
    """Trials of one attention of each class, with the arguments of a forward of the model."""
    calls: dict[nn.Module, tuple[Any, Any]] = {}
    chosen = {type(attention): attention for attention in attentions}.values()
    hooks = [
        attention.register_forward_pre_hook(
            lambda module, arguments, keywords: calls.update({module: (arguments, keywords)}), with_kwargs=True
        )
        for attention in chosen
    ]
    try:
        with torch.no_grad():
            model.base_model(input_ids=short_rows(model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for attention in chosen:
        arguments, keywords = calls[attention]
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        runs = [
            partial(_attend, forward, arguments, keywords)
            for forward in (_with_rope(attention), MethodType(type(attention).forward, attention))
        ]
        ours, own = (partial(_results, run, hidden) for run in runs)
        yield ours, own


def _attend(
    forward: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any], hidden: Tensor
) -> Tensor:
    """Output of an attention for the input ``hidden`` and otherwise the recorded arguments."""
    if arguments:
        arguments = (hidden, *arguments[1:])
    else:
        keywords = {**keywords, "hidden_states": hidden}
    output: Tensor = forward(*arguments, **keywords)[0]
    return output


def _install_rope(attention: nn.Module) -> None:
    attention.forward = _with_rope(attention)


def _swiglu_trials(model: PreTrainedModel, mlps: list[nn.Module]) -> Iterator[Trial]:
    """One trial for each width."""
    for width in sorted({linear_layer(mlp, "gate_proj").out_features for mlp in mlps}):
        like = torch.empty(NUM_ROWS, width, dtype=model.dtype, device=model.device)
        yield partial(_swiglu_results, LigerSwiglu(), like), partial(_swiglu_results, Swiglu(), like)


def _swiglu_results(swiglu: Swiglu, like: Tensor) -> list[Tensor]:
    """Product, and gradients of gate and up."""
    gate, up, grad_product = (_noise(like, seed) for seed in range(3))
    product = swiglu.product(gate, up)
    again, activation = swiglu.product_again(gate, up)
    return [product, again, *swiglu.gradients(grad_product, gate, up, activation)]


class _Kernel(NamedTuple):
    fits: Callable[[nn.Module], bool]
    """Whether the module computes what the kernel does."""
    trials: Callable[[PreTrainedModel, list[nn.Module]], Iterator[Trial]]
    """Makes trials for the modules that the kernel fits."""
    install: Callable[[nn.Module], None]


_KERNELS = {
    RMS_NORM: _Kernel(is_rms_norm, _norm_trials, _install_norm),
    ROPE: _Kernel(is_rotating, _rope_trials, _install_rope),
    SWIGLU: _Kernel(is_gated_mlp, _swiglu_trials, lambda _: None),
}
