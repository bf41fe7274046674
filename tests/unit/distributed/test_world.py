"""What an engine has made of a model, before its first step."""

from types import SimpleNamespace

import pytest
import torch
from support.tiny_models import adapt, tiny_model

from dora_dist.distributed.agreement import Agreement, RankFailedError
from dora_dist.distributed.world import buffer_dtypes, check_prepared


def check(model, before, precision="no", bf16=False):
    """As a run without an engine does."""
    dataloader = SimpleNamespace(batch_sampler=[[0, 1]])
    trainer = SimpleNamespace(
        model=model,
        model_wrapped=model,
        callback_handler=SimpleNamespace(train_dataloader=dataloader),
        accelerator=SimpleNamespace(mixed_precision=precision),
        args=SimpleNamespace(bf16=bf16),
    )
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
    check_prepared(Agreement(), trainer, "none", dtype, before)


def test_an_engine_that_rounds_the_rotary_frequencies_is_refused():
    """As DeepSpeed before 0.19.2 does under bfloat16: it casts the whole module, and so positions are wrong."""
    model = adapt(tiny_model())
    before = buffer_dtypes(model)
    assert any(name.endswith("rotary_emb.inv_freq") for name in before)
    check(model, before)
    message = r"buffers such as \S+inv_freq from torch.float32 to torch.bfloat16.* data_types.buffer_dtype .* 0.19.2"
    with pytest.raises(RankFailedError, match=message):
        check(model.bfloat16(), before)


def test_a_buffer_that_gains_precision_is_not_refused():
    """DeepSpeed keeps some buffers in float32 that a model has in bfloat16 (``data_types.keep_in_fp32_modules``)."""
    model = adapt(tiny_model())
    model.register_buffer("bias", torch.ones(2, dtype=torch.bfloat16))
    before = buffer_dtypes(model)
    model.bias = model.bias.float()
    check(model, before)
    model.bias = model.bias.half()
    with pytest.raises(RankFailedError, match=r"1 buffers such as bias from torch\.bfloat16 to torch\.float16"):
        check(model, before)


def test_another_precision_than_that_of_the_run_is_refused():
    """accelerate takes it from the environment where the Trainer's own setting is off."""
    model = adapt(tiny_model())
    before = buffer_dtypes(model)
    check(model, before, "bf16", bf16=True)
    with pytest.raises(RankFailedError, match="accelerate's mixed precision is bf16, the Trainer's is no"):
        check(model, before, "bf16")
    with pytest.raises(RankFailedError, match="accelerate's mixed precision is no, the Trainer's is bf16"):
        check(model, before, bf16=True)
