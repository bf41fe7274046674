import pytest
from support.byte_tokenizer import byte_tokenizer
from support.tiny_run import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from dora_dist.console.text import visible
from dora_dist.preview.terminal import MARKS
from dora_dist.preview.tokens import split_tokens

TEXTS = [
    "Hello  world,\n\n\tthe end .  ",
    "你好\uff0c世界\u3000!",
    "\u0633\u0644\u0627\u0645 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "👩\u200d👧 é \U0001f1e9\U0001f1ea",
    "a\ufffdb \ufffd\ufffd\ufffd c",
    " lead and <|eot_id|> <0xE4>",
]
BYTES = byte_tokenizer("chatml")


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """LLaMA's way: spaces as a letter, bytes with names for what is not in the vocabulary."""
    vocabulary = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Helowrd,你"]
    tokenizer = Tokenizer(
        models.BPE({token: n for n, token in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [BYTES, sentencepiece_like()], ids=["bytes", "sentencepiece"])
def test_pieces_together_are_the_decoded_text_and_all_tokens(tokenizer, text):
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    pieces = split_tokens(tokenizer, ids, [False] * len(ids))
    assert [number for piece in pieces for number in piece.ids] == ids
    assert [piece.position for piece in pieces] == [sum(len(p.ids) for p in pieces[:n]) for n in range(len(pieces))]
    whole = "".join(piece.text for piece in pieces if piece.text != "▁")  # a first token that is no text has a name
    assert whole == tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert [piece.special for piece in pieces[-2:]] == [False, True]


def test_words_are_decoded_with_their_spaces():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("<s> w1 w2 nonsense </s>")["input_ids"]
    pieces = split_tokens(tokenizer, ids, [False, False, False, True, True])
    assert [piece.text for piece in pieces] == ["<s>", " w1", " w2", " <unk>", " </s>"]
    assert [piece.special for piece in pieces] == [True, False, False, True, True]


@pytest.mark.parametrize("tokenizer", [BYTES, sentencepiece_like()], ids=["bytes", "sentencepiece"])
def test_bytes_that_are_no_text_have_names(tokenizer):
    ids = tokenizer("o好o", add_special_tokens=False)["input_ids"]
    start = next(n for n, name in enumerate(tokenizer.convert_ids_to_tokens(ids)) if name in ("å", "<0xE5>"))
    # A character that is cut off.
    pieces = split_tokens(tokenizer, ids[: start + 2], [False] * (start + 2))
    assert [piece.text for piece in pieces[-2:]] == ["<0xE5>", "<0xA5>"]
    assert all(piece.special for piece in pieces[-2:])
    # Training begins in the middle of a character, as it can with one token a byte.
    trained = [n > start for n in range(len(ids))]
    pieces = split_tokens(tokenizer, ids, trained)
    assert [piece.text for piece in pieces[-4:]] == ["<0xE5>", "<0xA5>", "<0xBD>", "o"]
    assert [piece.trained for piece in pieces[-4:]] == [False, True, True, True]
    # Otherwise its bytes are one piece.
    (character,) = [p for p in split_tokens(tokenizer, ids, [False] * len(ids)) if p.text == "好"]
    assert len(character.ids) == 3


def test_nothing_invisible_reaches_the_terminal():
    text = "a\x1b[2J\r\x00\u202eb\u200b\u200c\u3000\n\t\udcff⟦"
    assert visible(text) == "a\\x1b[2J\\r\\x00\\u202eb\\u200b\u200c\u3000\n⇥\\udcff⟦"
    assert visible("⟦a│b⟧", MARKS) == "\\u27e6a\\u2502b\\u27e7"
