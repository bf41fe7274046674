"""The fused MLP against the module's own forward, left to autograd."""

import pytest
import torch
from support.base_layers import adapt_layer, drop_the_same, make_base
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GemmaConfig, LlamaConfig, Qwen3Config
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from dora_dist.adapter.gated_mlp import fuse_gated_mlps
from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.base_model.kernels import Swiglu
from dora_dist.base_model.shape import is_gated_mlp

HIDDEN, INNER, RANK = 64, 128, 6
SIZES = {"hidden_size": HIDDEN, "intermediate_size": INNER}


def make_mlp(kind: str = "plain", dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
    """Adapted and fused, with components that have an effect."""
    mlp = LlamaMLP(LlamaConfig(**SIZES))
    for seed, (name, out, width) in enumerate(
        (("gate_proj", INNER, HIDDEN), ("up_proj", INNER, HIDDEN), ("down_proj", HIDDEN, INNER))
    ):
        base = make_base(kind, out, width, seed, bias=False)
        if kind == "plain":
            base.to(dtype)
        setattr(mlp, name, adapt_layer(base, RANK, dropout=dropout, seed=seed, dtype=dtype))
    fuse_gated_mlps(mlp, Swiglu())
    return mlp.train()


def draw_x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(7)).to(dtype).requires_grad_()


def trained(mlp: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in mlp.parameters() if parameter.requires_grad]


def results(mlp: nn.Module, forward, x: Tensor) -> list[Tensor]:
    """Output and gradients; dropout from the same random state."""
    torch.manual_seed(5)
    output = forward(x)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    inputs = [x, *trained(mlp)] if x.requires_grad else trained(mlp)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)]


def fused_and_not(mlp: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    fused = results(mlp, mlp, x)
    hooks = drop_the_same([mlp.gate_proj, mlp.up_proj])
    alone = results(mlp, lambda rows: type(mlp).forward(mlp, rows), x)
    for hook in hooks:
        hook.remove()
    return fused, alone


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kept", ["all", "some"])
def test_output_and_gradients_are_those_of_the_module(kept, dropout):
    mlp = make_mlp(dtype=torch.float64, dropout=dropout)
    if kept == "some":
        mlp.gate_proj.component_mask[[0, 2]] = False
        mlp.down_proj.component_mask[1:] = False
        mlp.up_proj.component_mask.fill_(False)
    found, wanted = fused_and_not(mlp, draw_x(torch.float64))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert all(gradient.any() for gradient in found[1:]) == (kept == "all")


@pytest.mark.parametrize("kind", ["plain", "nf4", "int8"])
def test_the_output_is_bit_for_bit_that_of_the_module(kind):
    mlp = make_mlp(kind, dropout=0.3)
    found, wanted = fused_and_not(mlp, draw_x())
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_bfloat16_with_and_without_autocast():
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        mlp = make_mlp(dtype=dtype, dropout=0.3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, wanted = fused_and_not(mlp, draw_x(dtype))
        for one, other in zip(found, wanted, strict=True):
            assert one.dtype == other.dtype
            assert (one.float() - other.float()).norm() <= 0.02 * other.float().norm()


def test_what_is_frozen_gets_no_gradient():
    mlp = make_mlp(dtype=torch.float64)
    for layer in (mlp.gate_proj, mlp.down_proj):
        layer.gate.requires_grad_(False)
    found, wanted = fused_and_not(mlp, draw_x(torch.float64).detach())
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert len(found) == 1 + 9 - 2


def test_gradient_checkpointing_changes_nothing():
    mlp, x = make_mlp(dropout=0.3), draw_x()
    plain = results(mlp, mlp, x)
    again = results(mlp, lambda rows: checkpoint(mlp, rows, use_reentrant=False), x)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_checkpointing_does_not_compute_the_output_again():
    """It stops when it has what was kept: before the base of down, which no gradient needs."""
    mlp, x = make_mlp(dropout=0.3), draw_x()
    calls = []
    for name in ("gate_proj", "up_proj", "down_proj"):
        base = getattr(mlp, name).base_layer
        base.register_forward_hook(lambda *_, name=name: calls.append(name))
    results(mlp, lambda rows: checkpoint(mlp, rows, use_reentrant=False) + rows, x)
    assert calls == ["gate_proj", "up_proj", "down_proj", "gate_proj", "up_proj"]


def test_two_tensors_of_the_inner_width_are_kept_and_not_four():
    mlp, x = make_mlp(), draw_x()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        mlp(x)
    assert sum(tensor.shape == (2, 9, INNER) for tensor in kept) == 2


def test_a_layer_that_is_off_or_watched_runs_on_its_own():
    mlp, x = make_mlp(), draw_x()
    seen = []
    handle = mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    watched = mlp(x)
    assert seen == [1]
    handle.remove()
    assert torch.equal(mlp(x), watched)
    layers = [module for module in mlp.modules() if isinstance(module, DynamicLoraLinear)]
    for layer in layers:
        layer.enable_adapters(False)
    bases = [layer.base_layer for layer in layers]
    assert torch.equal(mlp(x), bases[2](torch.nn.functional.silu(bases[0](x)) * bases[1](x)))


def test_gradients_of_modules_can_be_watched():
    mlp = make_mlp()
    seen = []
    mlp.down_proj.register_full_backward_hook(lambda *_: seen.append(1))
    mlp(draw_x()).sum().backward()
    assert seen == [1]


def test_layers_may_be_taken_away_again():
    """As PEFT's ``unload`` does."""
    mlp, x = make_mlp(), draw_x()
    mlp.up_proj = mlp.up_proj.base_layer
    assert torch.equal(mlp(x), type(mlp).forward(mlp, x))


def test_models_of_the_family_are_known_and_others_are_not():
    assert is_gated_mlp(LlamaMLP(LlamaConfig(**SIZES)))
    assert is_gated_mlp(Qwen3MLP(Qwen3Config(**SIZES)))
    assert not is_gated_mlp(GemmaMLP(GemmaConfig(**SIZES))), "its activation is another one"
    assert not is_gated_mlp(LlamaMLP(LlamaConfig(**SIZES, hidden_act="relu")))
    assert not is_gated_mlp(nn.Linear(2, 2))

    class Other(LlamaMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    assert not is_gated_mlp(Other(LlamaConfig(**SIZES)))

    class Scaled(LlamaMLP):
        def forward(self, x):
            down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
            return down_proj * 2

    assert not is_gated_mlp(Scaled(LlamaConfig(**SIZES)))


def test_an_mlp_with_a_bare_layer_is_left_as_it_is():
    mlp = LlamaMLP(LlamaConfig(**SIZES))
    mlp.gate_proj = adapt_layer(mlp.gate_proj, RANK)
    fuse_gated_mlps(mlp, Swiglu())
    assert "forward" not in vars(mlp)
