"""RMSNorm, RoPE and SwiGLU by kernels: for which models, when not, and the same numbers, in Triton's interpreter."""

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.interpreter import prepare_interpreter
from support.same_gradients import assert_same_gradients, relative_error
from support.tiny_models import adapt, load_base, loss_and_gradients, shake, tiny_model, tokens
from support.tiny_run import tiny_tokenizer, write_config
from torch import Tensor, nn
from transformers import CohereConfig, PreTrainedModel
from transformers.models.cohere.modeling_cohere import CohereAttention
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.base_model.kernels import (
    KERNELS,
    NO_KERNELS,
    RMS_NORM,
    ROPE,
    SWIGLU,
    is_rms_norm,
    is_rotating,
    use_kernels,
)
from dora_dist.config.parse import load_config
from dora_dist.setup.build import load_model

interpreted = pytest.mark.full("kernels")


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_interpreter(monkeypatch)


def with_kernels(base: PreTrainedModel) -> DynamicLoraModel:
    """Adapted as a run does it on a GPU."""
    return shake(adapt(base, kernels=use_kernels(base)))


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


def attentions(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("Attention")]


def replaced(modules: list[nn.Module]) -> list[bool]:
    return ["forward" in vars(module) for module in modules]


def test_models_that_compute_as_llama_are_known_and_others_are_not():
    for architecture in ("llama", "mistral", "qwen3"):
        model = tiny_model(architecture)
        assert all(map(is_rms_norm, norms(model)))
        assert all(map(is_rotating, attentions(model)))
    assert not is_rms_norm(GemmaRMSNorm(8)), "it multiplies by 1 + w"
    assert not is_rms_norm(nn.RMSNorm(8))
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    assert not is_rotating(CohereAttention(CohereConfig(**sizes), 0)), "it rotates neighbours, in float32"
    assert not is_rotating(nn.MultiheadAttention(8, 2))


def test_another_half_makes_another_rotation(monkeypatch: pytest.MonkeyPatch):
    (attention, *_) = attentions(tiny_model())
    assert is_rotating(attention)
    # The function of the model is the same code, and only what it calls is not.
    monkeypatch.setitem(apply_rotary_pos_emb.__globals__, "rotate_half", lambda x: x)
    assert not is_rotating(attention)


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_without_liger_nothing_changes_and_the_log_says_how_to_get_it(capfd: pytest.CaptureFixture):
    model = tiny_model()
    assert use_kernels(model) == NO_KERNELS
    assert not any(replaced([*norms(model), *attentions(model)]))
    assert "to use kernels, pip install 'dora-dist[gpu]'" in capfd.readouterr().err


def test_on_a_cpu_a_run_uses_none_and_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture):
    config = load_config(write_config(tmp_path), ["--distributed.engine", "none"])
    assert config.model.kernels == "auto"
    model = load_model(config, torch.device("cpu"), tiny_tokenizer())
    assert model.kernels == NO_KERNELS
    assert not any(replaced([*norms(model), *attentions(model)]))
    assert "kernel" not in capfd.readouterr().err


@interpreted
@pytest.mark.parametrize(
    ("architecture", "quantization", "checkpointing"),
    [("llama", "none", False), ("llama", "nf4", True), ("mistral", "none", True), ("qwen3", "nf4", False)],
)
def test_loss_and_gradients_are_those_of_the_models_own_code(
    interpreter: None, tmp_path: Path, architecture: str, quantization: str, checkpointing: bool
):
    tiny_model(architecture).save_pretrained(tmp_path)
    model = with_kernels(load_base(tmp_path, quantization))
    plain = shake(adapt(load_base(tmp_path, quantization), fuse=False))
    assert model.kernels.names == KERNELS
    base = model.get_base_model()
    assert all(replaced([*norms(base), *attentions(base)]))
    results = []
    for each in (model.train(), plain.train()):
        if checkpointing:
            each.gradient_checkpointing_enable({"use_reentrant": False})
        results.append(loss_and_gradients(each))
    (found_loss, found), (loss, gradients) = results
    assert relative_error(found_loss, loss) <= 2e-6
    assert_same_gradients(found, gradients, 1e-5)


@interpreted
def test_packed_rows_and_generated_tokens_are_the_same(interpreter: None):
    base = tiny_model()
    other = copy.deepcopy(base)
    use_kernels(other)
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)
    with torch.no_grad():
        expected, found = (model(input_ids=tokens(), position_ids=positions).logits for model in (base, other))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    settings = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
    expected, found = (model.generate(tokens(), **settings) for model in (base, other))
    assert torch.equal(found, expected)


@interpreted
def test_other_models_of_the_process_are_left_alone(interpreter: None):
    base, other = tiny_model(), tiny_model()
    before = modeling_llama.apply_rotary_pos_emb, LlamaAttention.forward, modeling_llama.LlamaRMSNorm.forward
    use_kernels(base)
    assert all(replaced([*norms(base), *attentions(base)]))
    assert not any(replaced([*norms(other), *attentions(other)]))
    assert before == (modeling_llama.apply_rotary_pos_emb, LlamaAttention.forward, modeling_llama.LlamaRMSNorm.forward)


@interpreted
def test_a_model_gets_those_kernels_whose_formula_it_has(interpreter: None, capfd: pytest.CaptureFixture):
    """Gemma's norm and MLP are others."""
    model = tiny_model("gemma")
    assert use_kernels(model).names == (ROPE,)
    assert not any(replaced(norms(model)))
    assert capfd.readouterr().err == "kernels in use: rope\n"


@interpreted
def test_only_what_is_wanted_is_used(interpreter: None):
    model = tiny_model()
    assert use_kernels(model, [RMS_NORM]).names == (RMS_NORM,)
    assert all(replaced(norms(model)))
    assert not any(replaced(attentions(model)))


@interpreted
def test_a_gradient_that_others_share_is_not_written_over(interpreter: None):
    """As of a residual connection, which hands one tensor to both of its branches."""
    model = tiny_model()
    use_kernels(model, [RMS_NORM])
    x, residual = (torch.randn(3, 64, requires_grad=True) for _ in range(2))
    gradient = torch.randn(3, 64)
    (model.model.norm(x) + residual).backward(gradient)
    assert torch.equal(residual.grad, gradient)
    assert not torch.equal(x.grad, gradient)


@interpreted
def test_a_trial_draws_no_random_numbers(interpreter: None):
    model = tiny_model()
    before = torch.random.get_rng_state()
    assert use_kernels(model).names == KERNELS
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


@interpreted
def test_angles_in_another_order_are_refused(interpreter: None, capfd: pytest.CaptureFixture):
    """The kernel reads the first half of the cosines only; the second one is no copy of it here."""
    model = tiny_model()
    rotary = model.model.rotary_emb
    ordinary = rotary.forward
    rotary.forward = lambda *arguments, **keywords: tuple(
        angles[..., : angles.shape[-1] // 2].repeat_interleave(2, dim=-1) for angles in ordinary(*arguments, **keywords)
    )
    assert use_kernels(model).names == (RMS_NORM, SWIGLU)
    assert not any(replaced(attentions(model)))
    said = capfd.readouterr().err
    assert "rope of LlamaForCausalLM runs by the model's own code, not by Liger's kernel: a result differs by" in said


class ReadsAgain(LlamaAttention):
    """Its queries are also read without their rotation, which the kernel overwrites."""

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: object
    ) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k = (project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj))
        rotated, _ = apply_rotary_pos_emb(q, k, *position_embeddings)
        return self.o_proj((rotated + q).transpose(1, 2).flatten(2)), None


@interpreted
def test_an_attention_that_reads_its_queries_again_is_refused(interpreter: None, capfd: pytest.CaptureFixture):
    model = tiny_model()
    for attention in attentions(model):
        attention.__class__ = ReadsAgain
    assert is_rotating(model.model.layers[0].self_attn)
    assert ROPE not in use_kernels(model).names
    assert "rope of LlamaForCausalLM runs by the model's own code" in capfd.readouterr().err


@interpreted
def test_what_a_kernel_cannot_compute_is_refused(interpreter: None, capfd: pytest.CaptureFixture):
    """Liger has no norm in float64, and computes SwiGLU in float32."""
    model = tiny_model().double()
    assert use_kernels(model).names == (ROPE,)
    said = capfd.readouterr().err
    assert "rms_norm of LlamaForCausalLM runs by the model's own code, not by Liger's kernel: it does not run" in said
    assert "swiglu of LlamaForCausalLM runs by the model's own code, not by Liger's kernel: a result differs by" in said


@interpreted
def test_a_second_backward_is_refused_where_the_first_has_overwritten_what_it_reads(interpreter: None):
    model = with_kernels(tiny_model())
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward through a gated MLP.* set model.kernels to none"):
        loss.backward()


def test_a_second_backward_without_kernels_gives_the_same():
    model = shake(adapt(tiny_model()))
    loss = model(input_ids=tokens(), labels=tokens()).loss
    rows = model.adapted_layers()["model.layers.0.mlp.gate_proj"].lora_a
    first, second = (torch.autograd.grad(loss, rows, retain_graph=True)[0] for _ in range(2))
    assert first.any()
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-9)
