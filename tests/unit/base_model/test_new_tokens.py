"""New tokens: how a tokenizer takes them, where their rows start, and what cannot have any."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from support.tiny_models import VOCABULARY, adapt, load_base, loss_and_gradients, shake, tiny_model
from support.tiny_run import tiny_tokenizer
from torch import nn
from transformers import AutoTokenizer

import dora_dist
from dora_dist.base_model.load import load_tokenizer
from dora_dist.base_model.new_tokens import NewTokens, add_tokens, fit_rows, modules_with_rows, start_rows
from dora_dist.config.format_version import ADAPTER_WEIGHTS
from dora_dist.data.cache import tokenizer_digest

TEXTS = ["<call>", "w1-w2"]
IDS = [VOCABULARY, VOCABULARY + 1]
NEW = NewTokens(ids=IDS, pieces=[[7, 9], [5]])
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def with_new_tokens(base, **changes):
    start_rows(base, NEW)
    settings = {"target_rank": 2, "dropout": 0.0, "seed": 5, "new_tokens": TEXTS, **changes}
    return dora_dist.add_dynamic_lora(base, dora_dist.DynamicLoraConfig(**settings), token_ids=IDS)


def saved_base(folder, **changes):
    tiny_model(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def ids_with_new_tokens():
    ids = torch.arange(24).reshape(2, 12)
    ids[:, 3], ids[:, 8] = torch.tensor(IDS)
    return ids


@torch.no_grad()
def logits_with_new_tokens(model):
    return model.eval()(input_ids=ids_with_new_tokens()).logits


def test_a_new_token_is_one_token_in_texts_and_is_shown_in_answers(tmp_path):
    tokenizer = tiny_tokenizer()
    assert add_tokens(tokenizer, TEXTS) == NewTokens(ids=IDS, pieces=[[3], [3]])  # unknown words before
    tokenizer.save_pretrained(tmp_path)
    for known in (tokenizer, load_tokenizer(str(tmp_path))):
        ids = known("w5 <call> w6w1-w2").input_ids
        assert [number for number in ids if number >= VOCABULARY] == IDS
        assert "<call>" in known.decode(ids, skip_special_tokens=True)


def test_data_that_were_encoded_without_new_tokens_are_not_taken_for_theirs():
    tokenizers = [tiny_tokenizer() for _ in range(3)]
    add_tokens(tokenizers[1], TEXTS)
    add_tokens(tokenizers[2], TEXTS[::-1])
    assert len({tokenizer_digest(tokenizer) for tokenizer in tokenizers}) == 3


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("w7", r"has 'w7', which the tokenizer knows already, with the id 16: leave it out"),
        ("</s>", r"has '</s>', which the tokenizer knows already, with the id 2"),
        ("<s>w7", r"has '<s>w7', which holds the token '<s>' of the tokenizer"),
    ],
)
def test_a_text_that_is_no_new_token_is_refused(text, refused):
    with pytest.raises(ValueError, match=refused):
        add_tokens(tiny_tokenizer(), ["<call>", text])


@TIED
def test_rows_start_as_the_mean_of_their_pieces_and_no_other_row_changes(tied):
    before, model = (tiny_model(tie_word_embeddings=tied) for _ in range(2))
    start_rows(model, NEW)
    names = ["model.embed_tokens", "lm_head"]
    assert list(modules_with_rows(model)) == names[: 1 if tied else 2]
    for name in names:
        old, new = before.get_submodule(name).weight, model.get_submodule(name).weight
        assert new.shape == (VOCABULARY + 2, 64)
        assert new[:VOCABULARY].equal(old)
        torch.testing.assert_close(new[IDS[0]], (old[7] + old[9]) / 2)
        assert new[IDS[1]].equal(old[5])
    assert model.config.vocab_size == VOCABULARY + 2


def test_a_model_that_has_rows_to_spare_keeps_its_size():
    model = tiny_model(vocab_size=VOCABULARY + 8)
    fit_rows(model, IDS)
    assert model.lm_head.out_features == VOCABULARY + 8


def test_tokens_of_the_tokenizer_that_had_no_row_are_not_given_one():
    with pytest.raises(ValueError, match=f"has {VOCABULARY} tokens, and the model's embedding {VOCABULARY - 1} rows"):
        fit_rows(tiny_model(vocab_size=VOCABULARY - 1), IDS)


def biased(model):
    model.lm_head.bias = nn.Parameter(torch.zeros(VOCABULARY))


def other_head(model):
    model.lm_head = nn.Sequential(model.lm_head)
    model.lm_head.weight = model.lm_head[0].weight


def silent(model):
    model.config.tie_word_embeddings = True


@pytest.mark.parametrize(
    ("change", "flaw"),
    [
        (biased, "its output head has a bias"),
        (other_head, "its output head is a Sequential"),
        (silent, "does not say whether embedding and output head are tied"),
    ],
)
def test_a_model_whose_rows_cannot_be_trained_is_refused(change, flaw):
    model = tiny_model()
    change(model)
    with pytest.raises(ValueError, match=flaw):
        modules_with_rows(model)


def test_an_adapter_with_new_tokens_is_not_gone_on_with_and_beside_one_that_is_they_are_trained(tmp_path):
    adapt(tiny_model(), initial_rank=2).save_pretrained(tmp_path / "plain")
    with_new_tokens(tiny_model(), initial_rank=2).save_pretrained(tmp_path / "tokens")
    with pytest.raises(ValueError, match="has trainable_token_indices"):
        adapt(tiny_model(), start_from=str(tmp_path / "tokens"))
    model = with_new_tokens(tiny_model(), target_rank=8, start_from=str(tmp_path / "plain"))
    assert len(model.new_rows()) == 2


@TIED
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_stock_peft_loads_adapter_and_tokenizer_with_equal_logits(tmp_path, tied, quantization):
    base = saved_base(tmp_path / "base", tie_word_embeddings=tied)
    model = shake(with_new_tokens(load_base(base, quantization)))
    for rows in model.new_rows().values():
        rows.data += torch.linspace(-1, 1, 64)
    wanted = logits_with_new_tokens(model)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = tiny_tokenizer()
    add_tokens(tokenizer, TEXTS)
    tokenizer.save_pretrained(tmp_path / "adapter")
    stock = load_base(base, quantization)
    stock.resize_token_embeddings(len(AutoTokenizer.from_pretrained(tmp_path / "adapter")))
    models = [PeftModel.from_pretrained(stock, tmp_path / "adapter")]
    models.append(dora_dist.load_adapter(load_base(base, quantization), tmp_path / "adapter"))
    if quantization == "none":
        models.append(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"))
    for loaded in models:
        torch.testing.assert_close(logits_with_new_tokens(loaded), wanted, rtol=0, atol=1e-4)
    names = [name for name in load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS) if ".lora_" not in name]
    assert len(names) == (1 if tied else 2)
    # PEFT itself saves the same tensors.
    models[0].save_pretrained(tmp_path / "again", save_embedding_layers=False)
    assert (
        load_file(tmp_path / "again" / ADAPTER_WEIGHTS).keys()
        == load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS).keys()
    )


@TIED
def test_rows_have_the_gradients_of_the_embedding_and_the_head_in_full(tied):
    ids = ids_with_new_tokens()
    model = with_new_tokens(tiny_model(tie_word_embeddings=tied))
    loss, gradients = loss_and_gradients(model, ids)
    plain = tiny_model(tie_word_embeddings=tied)
    start_rows(plain, NEW)
    plain.requires_grad_(True)
    wanted = plain(input_ids=ids, labels=ids).loss
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach())
    found = {name: rows.grad for name, rows in model.new_rows().items()}
    assert list(found) == ["model.embed_tokens", "lm_head"][: 1 if tied else 2]
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain.get_submodule(name).weight.grad[IDS])
        assert gradient.abs().amax(1).min() > 0
    others = [name for name in gradients if ".lora_" not in name]
    assert all("trainable_tokens_delta" in name for name in others), "no other row, and no head, is trained"
    assert len(others) == len(found)


def test_the_loss_needs_the_logits_where_rows_of_the_head_are_trained():
    model = with_new_tokens(tiny_model())
    assert model.use_loss_without_logits() == "rows of its head are trained (adapter.new_tokens)"
    assert not model.has_loss_without_logits
    assert adapt(tiny_model()).use_loss_without_logits() is None


def test_rows_have_the_dtype_of_the_adapter_and_are_part_of_its_state():
    model = with_new_tokens(tiny_model().to(torch.bfloat16), dtype="float32")
    assert {rows.dtype for rows in model.new_rows().values()} == {torch.float32}
    assert model.head_parameters().keys() == {"model.embed_tokens.new_rows", "lm_head.new_rows"}
    assert any("trainable_tokens_delta" in name for name in model.state_dict())
    assert not any("base_layer" in name for name in model.state_dict()), "the frozen base is in the state"


def test_other_trainers_are_told_that_they_have_no_tokenizer():
    config = dora_dist.DynamicLoraConfig(new_tokens=TEXTS)
    with pytest.raises(ValueError, match=r"config.new_tokens is \['<call>', 'w1-w2'\], which a tokenizer must know"):
        dora_dist.add_dynamic_lora(tiny_model(), config)
