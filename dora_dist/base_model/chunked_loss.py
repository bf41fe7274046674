"""Cross-entropy of a causal language model without its logits: by chunks of positions, with gradients computed in the
forward.

With a vocabulary of 128k, logits and their gradients are the most that a training step allocates. Here the output head
runs on a few positions at a time and skips those whose label is ignored; only the gradient of the head's input is kept.

torch 2.13 has ``torch.nn.functional.linear_cross_entropy``, which does the same, and is not used: for bfloat16 inputs,
the common case on GPUs, it adds up and returns the loss in bfloat16 (3.5 % too low for 4,096 positions), and on CPUs
it casts the whole weight to float32. Liger's and Apple's kernels are for Triton, that is for GPUs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from dora_dist.base_model.proof import relative_difference, short_rows

IGNORED = -100
CHUNK_BYTES = 2**27
"""Bytes of the float32 logits of a chunk. With 128k words, these are 256 positions: by arithmetic, enough that a GPU
does not wait for the head's weight to be read. On a CPU, twice or half as many took about as long."""
BETWEEN_HEAD_AND_LOSS = ("final_logit_softcapping", "logits_soft_cap", "logits_scaling", "logit_scale")
"""Keys of a model's configuration by which transformers' models change logits before the loss."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
LOW_PRECISION_TOLERANCE = 2e-2


def chunk_length(vocabulary: int) -> int:
    """Number of positions whose logits are computed together."""
    return max(1, CHUNK_BYTES // (torch.float32.itemsize * vocabulary))


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    items: Tensor | float = 1,
    ignored: int = IGNORED,
    counted: Tensor | None = None,
) -> Tensor:
    """Sum of the cross-entropies of ``hidden @ weight.T + bias``, divided by ``items``; a scalar in at least float32,
    differentiable once with respect to ``hidden``.

    Args:
        hidden: input of the output head, shape ``(..., features)``.
        weight: weight of the output head, frozen, shape ``(vocabulary, features)``.
        bias: bias of the output head, frozen, shape ``(vocabulary,)``, or None.
        targets: the word that each position is to predict, int64, shape ``(...)``.
        items: divisor of the sum, applied before anything is rounded to the dtype of ``hidden``.
        ignored: target of positions that do not count.
        counted: indices at which the flattened ``targets`` are not ``ignored``, int64, shape ``(positions,)``; None to
            look them up here, for which the host waits for a GPU.
    """
    arguments = (hidden, weight, bias, targets, items, ignored, counted)
    # torch has no types for `apply`.
    loss: Tensor = _ChunkedCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradient in the forward, where the logits are, and multiplies it in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        items: Tensor | float,
        ignored: int,
        counted: Tensor | None,
    ) -> Tensor:
        flat, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        if counted is None:
            counted = (targets != ignored).nonzero().squeeze(1)
        gradient = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        for chosen in counted.split(chunk_length(weight.shape[0])):
            total += _add_chunk(flat, weight, bias, targets, chosen, items, gradient)
        if gradient is not None:
            ctx.save_for_backward(gradient.view_as(hidden))
        return total / items

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # Rounding the factor to bfloat16 would change every gradient of the step.
        product = gradient.to(gradients[0].dtype) * gradients[0]
        return product.to(gradient.dtype), None, None, None, None, None, None


def _add_chunk(
    flat: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chosen: Tensor,
    items: Tensor | float,
    gradient: Tensor | None,
) -> Tensor:
    """Sum of the losses at the positions ``chosen``; writes their gradients, divided by ``items``, into ``gradient``.

    This is a separate function so that the logits of a chunk are freed before those of the next one are computed.
    """
    target = targets[chosen, None]
    logits = functional.linear(flat[chosen], weight, bias)
    dtype = logits.dtype
    # As in the model's own loss: logits in the compute dtype, softmax in float32. From here on in place.
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    logits -= logits.amax(1, keepdim=True)
    at_target = logits.gather(1, target)
    denominator = logits.exp_().sum(1, keepdim=True)
    if gradient is not None:
        logits /= denominator
        logits.scatter_(1, target, -1, reduce="add")
        logits /= items
        gradient[chosen] = (logits.to(dtype) @ weight).to(gradient.dtype)
    return (denominator.log() - at_target).sum()


@dataclass(frozen=True, eq=False)
class DeferredLogits:
    """Takes the place of the logits between a model's head and its loss. It is not a tensor, so that a model that does
    anything to the logits in between fails instead of getting another loss."""

    hidden: Tensor
    head: nn.Linear


class ChunkedLoss:
    """Lets a causal language model compute its loss without its logits, within :meth:`deferred` only.

    The model's own forward runs: its head returns :class:`DeferredLogits`, which its loss function accepts.

    Args:
        base: a model for which :func:`obstacle` finds nothing.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base

    @contextmanager
    def deferred(self, counted: Tensor | None = None) -> Iterator[None]:
        """Within this context, a forward with labels computes no logits: its output has :class:`DeferredLogits`.

        Args:
            counted: see :func:`chunked_cross_entropy`; its targets are the labels, moved to the positions that predict
                them.
        """
        head, loss = self._base.get_output_embeddings(), self._base.loss_function
        with _replaced(head, "forward", lambda hidden: DeferredLogits(hidden, head)):
            with _replaced(self._base, "_loss_function", deferred_loss(loss, counted)):
                yield


def deferred_loss(ordinary: Callable[..., Tensor], counted: Tensor | None = None) -> Callable[..., Tensor]:
    """transformers' ``ForCausalLMLoss`` for :class:`DeferredLogits`; calls ``ordinary`` if it is given logits."""

    def loss(
        logits: Tensor | DeferredLogits,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not isinstance(logits, DeferredLogits):
            return ordinary(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        weight = logits.head.weight
        assert vocab_size == weight.shape[0], f"loss over {vocab_size} words, but the head has {weight.shape[0]}"
        if shift_labels is None:
            assert labels is not None
            shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.to(logits.hidden.device)
        items = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        if isinstance(items, Tensor):
            items = items.to(targets.device)
        bias = logits.head.bias
        return chunked_cross_entropy(logits.hidden, weight, bias, targets, items, ignore_index, counted)

    return loss


@contextmanager
def _replaced(owner: nn.Module, name: str, value: object) -> Iterator[None]:
    """Set an attribute of an object within this context."""
    missing = object()
    before = vars(owner).get(name, missing)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if before is missing:
            del vars(owner)[name]
        else:
            vars(owner)[name] = before


def obstacle(model: PreTrainedModel) -> str | None:
    """The reason why this model's loss needs its logits, as far as its parts show one; None otherwise."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}, not a plain linear layer"
    if head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad):
        return "its head is trained"
    if model.loss_function is not ForCausalLMLoss:
        return f"its loss is {getattr(model.loss_function, '__name__', 'unknown')}"
    settings = model.config.get_text_config()
    for name in BETWEEN_HEAD_AND_LOSS:
        if getattr(settings, name, None) not in (None, 1):
            return f"{name} changes its logits before the loss"
    return None


def proved(model: PreTrainedModel) -> tuple[ChunkedLoss | None, str]:
    """The loss without logits and "", if it is proved on the model itself to be the model's own; otherwise None and the
    reason.

    Loss and gradient of the head's input are compared on a small batch, without dropout and without drawing random
    numbers. That nothing happens to the logits between head and loss is proved for every batch
    (:class:`DeferredLogits`).

    Args:
        model: a causal language model on its device, with trained parameters below its head.
    """
    reason = obstacle(model)
    if reason is not None:
        return None, reason
    chunked = ChunkedLoss(model)
    was_training = model.training
    model.eval()
    try:
        own = _loss_and_gradient(model)
        with chunked.deferred():
            found = _loss_and_gradient(model)
    except torch.OutOfMemoryError:
        raise  # it says nothing about the loss, and the ordinary path takes more
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        return None, f"it does not compute a loss without them ({type(error).__name__}: {error})"
    finally:
        model.train(was_training)
    tolerance = TOLERANCE.get(model.dtype, LOW_PRECISION_TOLERANCE)
    for name, ours, models in zip(("loss", "gradient"), found, own, strict=True):
        difference = relative_difference(ours, models)
        if not difference <= tolerance:
            return None, f"without them its {name} differs by {difference:.2g}"
    return chunked, ""


def _loss_and_gradient(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """The loss on two short rows with ignored labels, and its gradient with respect to the head's input."""
    ids = short_rows(model)
    labels = ids.clone()
    labels[0, :3] = labels[1, 6:] = IGNORED
    inputs: list[Tensor] = []
    watch = model.get_output_embeddings().register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        with torch.enable_grad():
            loss = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(7, device=ids.device)).loss
    finally:
        watch.remove()
    (hidden,) = inputs
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]
