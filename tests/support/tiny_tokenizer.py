"""A tokenizer of whole words, made on the spot."""

import re

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def word_tokenizer(text: str, template: str = "<s> $A", **special: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of the words of ``text``; ``template`` says what it puts around an input."""
    words = [*SPECIAL.values(), *dict.fromkeys(re.findall(r"\w+|[^\w\s]+|\n", text))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"),
            pre_tokenizers.Split(Regex(r"\w+|\n"), "isolated"),
        ]
    )
    ids = [(token, words.index(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**SPECIAL, **special})


def word_pair_tokenizer(
    text: str, template: str = "<s> $A </s> $B:1 </s>:1", **special: str | None
) -> PreTrainedTokenizerFast:
    """A tokenizer that also takes pairs of texts, and ends its inputs; ``template`` is that of a pair."""
    tokenizer = word_tokenizer(text, **special)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=template, special_tokens=ids
    )
    return tokenizer
