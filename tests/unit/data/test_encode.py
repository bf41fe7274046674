import pytest
from tiny_tokenizer import word_tokenizer

from dora_dist.data.encode import IGNORED, encode_examples, encode_prompt
from dora_dist.data.rows import Example

EXAMPLES = [Example("one two : ", "three"), Example("two : ", "one two three"), Example("three three three :", "one")]
TEXT = " ".join(example.prompt + example.completion for example in EXAMPLES)


@pytest.mark.parametrize("template", ["<s> $A", "$A", "<s> $A </s>", "$A </s>"])
def test_the_loss_is_on_the_answer_and_one_end_token_exactly(template):
    tokenizer = word_tokenizer(TEXT, template)
    data = encode_examples(EXAMPLES, tokenizer, max_length=100)
    assert len(data.dataset) == len(EXAMPLES)
    for row, example in zip(data.dataset, EXAMPLES, strict=True):
        start = ["<s>"] if "<s>" in template else []
        prompt, answer = start + example.prompt.split(), [*example.completion.split(), "</s>"]
        assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == prompt + answer
        assert row["labels"][: len(prompt)] == [IGNORED] * len(prompt)
        assert tokenizer.convert_ids_to_tokens(row["labels"][len(prompt) :]) == answer
        assert row["attention_mask"] == [1] * len(row["input_ids"])
    assert data.trained_tokens == sum(len(example.completion.split()) + 1 for example in EXAMPLES)
    assert data.tokens == sum(len(row["input_ids"]) for row in data.dataset)
    assert data.num_dropped == 0
    assert data.examples == EXAMPLES


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_a_prompt_is_encoded_as_in_training(template):
    tokenizer = word_tokenizer(TEXT, template)
    data = encode_examples(EXAMPLES, tokenizer, max_length=100)
    for row, example in zip(data.dataset, EXAMPLES, strict=True):
        prompt = encode_prompt(tokenizer, example.prompt)
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"].count(IGNORED) == len(prompt)


def test_a_row_of_just_the_longest_length_is_kept():
    longest = max(len(row["input_ids"]) for row in encode_examples(EXAMPLES, word_tokenizer(TEXT), 100).dataset)
    assert encode_examples(EXAMPLES, word_tokenizer(TEXT), longest).num_dropped == 0
    with pytest.raises(ValueError, match=f"{longest} tokens, more than data.max_length {longest - 1}.*data.overlong"):
        encode_examples(EXAMPLES, word_tokenizer(TEXT), longest - 1)


def test_an_overlong_example_is_named():
    with pytest.raises(ValueError, match="example 2 has 7 tokens"):
        encode_examples([Example("one", "two"), *EXAMPLES[1:]], word_tokenizer(TEXT), max_length=4)


def test_overlong_examples_are_dropped_and_counted_on_request():
    examples = [EXAMPLES[1], Example("one", "two"), EXAMPLES[2], Example("two", "one")]
    data = encode_examples(examples, word_tokenizer(TEXT), max_length=4, overlong="drop")
    assert data.num_dropped == 2
    assert data.examples == [examples[1], examples[3]]
    assert len(data.dataset) == 2
    assert data.trained_tokens == 4
    assert data.tokens == 8


def test_dropping_everything_is_an_error():
    with pytest.raises(ValueError, match=r"none of 3 examples is left at data\.max_length 2"):
        encode_examples(EXAMPLES, word_tokenizer(TEXT), max_length=2, overlong="drop")


def test_a_tokenizer_without_an_end_token_is_refused():
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        encode_examples(EXAMPLES, word_tokenizer(TEXT, eos_token=None), max_length=100)
