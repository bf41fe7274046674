import copy
import pickle
from functools import partial

import pytest
import torch
from peft import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
)
from safetensors.torch import load_file, save_file
from support.tiny_encoders import (
    encoder_config,
    label_logits,
    save_tiny_encoder,
    shake_head,
    tiny_classifier,
    tiny_reader,
    tiny_summarizer,
)
from support.tiny_models import adapt, shake, tiny_model, trainable
from torch import nn
from transformers import AutoModelForSequenceClassification

from dora_dist.adapter.model import MODELS, DynamicLoraForCausalLM, DynamicLoraModel
from dora_dist.adapter.targets import resolve_targets
from dora_dist.base_model.head import head_modules, start_parameters, task_of
from dora_dist.base_model.load import BaseModelSpec, HeadStart, load_base_model, load_skeleton
from dora_dist.config.tasks import TASKS

HEADS = {
    "bert": ["classifier.bias", "classifier.weight"],
    "roberta": [f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("bias", "weight")],
    "llama": ["score.weight"],
}
ARCHITECTURES = pytest.mark.parametrize("architecture", HEADS)


def load(folder, quantization="none", seed=0, labels=("no", "perhaps", "yes")):
    head = HeadStart(labels=labels, seed=seed)
    spec = BaseModelSpec(path=str(folder), task="sequence_classification", quantization=quantization)
    return load_base_model(spec, head=head)


def test_the_task_is_told_by_the_model():
    assert task_of(tiny_classifier("roberta")).name == "sequence_classification"
    assert task_of(tiny_model()).name == "causal_lm"
    assert head_modules(tiny_model()) == []


@pytest.mark.parametrize(
    ("make", "parent"),
    [
        (tiny_model, PeftModelForCausalLM),
        (tiny_classifier, PeftModelForSequenceClassification),
        (tiny_reader, PeftModelForQuestionAnswering),
        (partial(tiny_summarizer, "bart"), PeftModelForSeq2SeqLM),
    ],
)
def test_a_model_is_one_of_pefts_class_for_its_task_and_can_be_pickled(make, parent):
    model = shake(adapt(make(), fuse=False))
    assert isinstance(model, parent)
    assert isinstance(model, DynamicLoraModel)
    assert type(model).__name__ == parent.__name__.replace("PeftModel", "DynamicLora")
    copied = pickle.loads(pickle.dumps(model))
    assert type(copied) is type(model)
    state = copied.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_only_a_task_with_something_of_its_own_has_a_class_of_its_own():
    assert MODELS["causal_lm"] is DynamicLoraForCausalLM
    assert MODELS.keys() == TASKS.keys()


def test_a_head_that_cannot_be_told_from_the_base_is_refused():
    class OddForSequenceClassification(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"the head cannot be told from the base \(''; there are first, second\)"):
        head_modules(OddForSequenceClassification())


@ARCHITECTURES
def test_the_head_is_trained_and_neither_adapted_nor_kept_twice(architecture):
    base = tiny_classifier(architecture)
    assert not [name for name in resolve_targets(base, "all-linear") if name.startswith(("classifier", "score"))]
    with pytest.raises(ValueError, match="matches no linear layer"):
        resolve_targets(base, ["classifier", "score", "out_proj"])
    model = adapt(base)
    assert sorted(model.head_parameters()) == HEADS[architecture]
    trained = {name for name in trainable(model) if ".lora_" not in name}
    assert trained == {
        f"base_model.model.{name.replace('.', '.modules_to_save.default.', 1)}" for name in HEADS[architecture]
    }
    kept = [name for name in model.state_dict() if ".lora_" not in name and not name.endswith(".component_mask")]
    assert sorted(kept) == sorted(trained)


@ARCHITECTURES
def test_stock_peft_gives_the_logits_of_what_is_saved(tmp_path, architecture):
    base = tiny_classifier(architecture)
    untouched = label_logits(base)
    model = shake_head(shake(adapt(copy.deepcopy(base), alpha=3.0))).eval()
    layer = next(iter(model.adapted_layers().values()))
    layer.component_mask[1:] = False
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(label_logits(stock), label_logits(model), rtol=1e-5, atol=1e-5)
    assert (label_logits(model) - untouched).abs().max() > 0.1
    for name, parameter in model.head_parameters().items():
        assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")[f"base_model.model.{name}"], parameter)
    with model.disable_adapter():
        assert torch.equal(label_logits(model), untouched), "without the adapter, it is the base with its own head"


@ARCHITECTURES
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_head_that_the_files_lack_starts_from_the_seed_alone_and_is_not_quantized(
    tmp_path, architecture, quantization
):
    save_tiny_encoder(tmp_path, architecture, hidden_size=64)
    torch.manual_seed(1)
    first = load(tmp_path, quantization)
    torch.manual_seed(2)
    again, other = load(tmp_path, quantization), load(tmp_path, quantization, seed=1)
    assert first.config.id2label == {0: "no", 1: "perhaps", 2: "yes"}
    for name in HEADS[architecture]:
        parameter = first.get_parameter(name)
        assert type(parameter) is nn.Parameter
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, again.get_parameter(name))
        if name.endswith("weight"):
            assert not torch.equal(parameter, other.get_parameter(name))
            assert 0.015 < parameter.std() < 0.025
        else:
            assert not parameter.any()
    quantized = {type(first.get_submodule(name)) for name in resolve_targets(first, "all-linear")}
    assert (nn.Linear in quantized) == (quantization == "none"), quantized
    model = shake(adapt(first)).train()
    model(input_ids=torch.arange(12).reshape(2, 6) + 5, labels=torch.tensor([0, 2])).loss.backward()
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_only_weights_of_the_head_may_be_missing(tmp_path):
    save_tiny_encoder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"no weights for bert\.encoder\.layer\.1\.output\.dense\.weight: every weight"
    ):
        load(tmp_path)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_head_that_the_files_have_is_taken_and_one_for_other_classes_starts_anew(tmp_path, quantization):
    tiny_classifier("roberta").save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    same = load(tmp_path, quantization)
    assert all(torch.equal(same.get_parameter(name), stored[name]) for name in HEADS["roberta"])
    fewer = load(tmp_path, quantization, labels=("no", "yes"), seed=4)
    assert torch.equal(fewer.classifier.dense.weight, stored["classifier.dense.weight"])
    assert fewer.classifier.out_proj.weight.shape == (2, 32)
    anew = load(tmp_path, quantization, labels=("no", "yes"), seed=4)
    assert torch.equal(anew.classifier.out_proj.weight, fewer.classifier.out_proj.weight)


def test_one_number_is_a_regression(tmp_path):
    model = load(save_tiny_encoder(tmp_path), labels=None)
    assert model.config.problem_type == "regression"
    assert model.classifier.weight.shape == (1, 32)


def test_a_parameter_of_an_unknown_kind_is_not_started():
    model = tiny_classifier()
    model.classifier.scale = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"classifier\.scale of the head .* is neither a weight nor a bias"):
        start_parameters(model, ["classifier.scale"], 0)


def test_a_model_without_such_a_head_is_refused(tmp_path):
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a vit, for which transformers has no AutoModelForSequenceClassification"):
        load_skeleton(BaseModelSpec(path=str(tmp_path), task="sequence_classification"))


@pytest.mark.parametrize(("base", "head"), [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")])
def test_the_head_has_the_adapters_dtype_and_reads_what_the_base_computes(base, head):
    model = shake_head(adapt(tiny_classifier("roberta").to(base), dtype=head))
    assert {parameter.dtype for parameter in model.head_parameters().values()} == {getattr(torch, head)}
    assert label_logits(model).isfinite().all()


def test_a_trained_head_is_that_of_a_plain_model():
    """One step on everything that is trained moves the head as it moves that of the model without an adapter."""
    plain = AutoModelForSequenceClassification.from_config(encoder_config(num_labels=3))
    model = adapt(copy.deepcopy(plain)).eval()
    plain.eval()
    ids, labels = torch.arange(12).reshape(2, 6) + 5, torch.tensor([0, 2])
    for one in (plain, model):
        one(input_ids=ids, labels=labels).loss.backward()
    torch.testing.assert_close(model.head_parameters()["classifier.weight"].grad, plain.classifier.weight.grad)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["bert", "roberta", "llama"])
def test_a_head_for_answers_goes_through_stock_peft(tmp_path, architecture):
    base = tiny_reader(architecture)
    model = shake_head(shake(adapt(copy.deepcopy(base)))).eval()
    assert isinstance(model, PeftModelForQuestionAnswering)
    assert sorted(model.head_parameters()) == ["qa_outputs.bias", "qa_outputs.weight"]
    model.save_pretrained(tmp_path)
    ids = torch.arange(12).reshape(2, 6) + 5
    stock = PeftModel.from_pretrained(base, tmp_path).eval()(input_ids=ids)
    for name, logits in model(input_ids=ids).items():
        torch.testing.assert_close(stock[name], logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_an_encoder_with_a_decoder_goes_through_stock_peft_and_keeps_its_output_head(tmp_path, architecture):
    base = tiny_summarizer(architecture)
    model = shake(adapt(copy.deepcopy(base))).eval()
    assert isinstance(model, PeftModelForSeq2SeqLM)
    assert not model.head_parameters()
    assert "lm_head" not in model.adapted_layers()
    model.save_pretrained(tmp_path)
    ids = torch.arange(12).reshape(2, 6) + 5
    stock = PeftModel.from_pretrained(base, tmp_path).eval()
    expected = model(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(stock(input_ids=ids, decoder_input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
