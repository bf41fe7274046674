"""New tokens of a tokenizer, and their rows in the embedding and the output head of a model. Also finds tokens whose
rows nothing has trained."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dora_dist.base_model.shape import input_embedding

UNTRAINED = 1e-3
"""Share of the median norm of rows up to which a row counts as untrained."""
SAMPLED_ROWS = 1000
"""Approximate number of rows whose median norm is taken."""


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """Tokens that were added to a tokenizer.

    Attributes:
        ids: ids of the tokens, consecutive numbers.
        pieces: ids of the tokens that each token's text was split into before.
    """

    ids: list[int]
    pieces: list[list[int]]


def add_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> NewTokens:
    """Add texts to a tokenizer as tokens, in place.

    They are ordinary tokens and not special ones: texts of rows may hold them, and answers show them.

    Args:
        tokenizer: the model's tokenizer.
        texts: texts of the tokens, in the order of their ids.

    Raises:
        ValueError: a text is a token already, holds an added token, or is not read as one token after it was added.
    """
    known = tokenizer.get_vocab()
    split_at = [token.content for token in tokenizer.added_tokens_decoder.values()]
    pieces = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1 and tokenizer.decode(ids) == text:
            known = {**known, text: ids[0]}
        if text in known:
            raise ValueError(
                f"adapter.new_tokens has {text!r}, which the tokenizer knows already, with the id {known[text]}: leave "
                "it out, or take another text"
            )
        if inside := [token for token in split_at if token in text]:
            raise ValueError(
                f"adapter.new_tokens has {text!r}, which holds the token {inside[0]!r} of the tokenizer, so that texts "
                "that were split there would not be any more: take another text"
            )
        pieces.append(ids)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in texts])
    ids = ids_of(tokenizer, texts)
    for text, number in zip(texts, ids, strict=True):
        if tokenizer.encode(text, add_special_tokens=False) != [number]:
            raise ValueError(
                f"adapter.new_tokens has {text!r}, which the tokenizer {type(tokenizer).__name__} does not read as one "
                "token when it has been added: take another text"
            )
    return NewTokens(ids=ids, pieces=pieces)


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """Ids of tokens that a tokenizer has."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[text] for text in texts]


def modules_with_rows(model: PreTrainedModel) -> dict[str, nn.Embedding | nn.Linear]:
    """Modules that have a row for each token, by name: the embedding, and the head if it is not tied to the embedding.

    Raises:
        ValueError: PEFT's layer for single rows cannot compute what these modules do.
    """
    embedding, head = input_embedding(model), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    flaw = None
    if not isinstance(embedding, nn.Embedding):
        flaw = f"its embedding is a {type(embedding).__name__}"
    elif type(head) is not nn.Linear:
        flaw = f"its output head is a {type(head).__name__}, not a plain linear layer"
    elif head.bias is not None:
        flaw = "its output head has a bias, which PEFT's layer for single rows leaves out"
    elif tied != bool(getattr(model.config, "tie_word_embeddings", False)):
        flaw = "its config.json does not say whether embedding and output head are tied (tie_word_embeddings)"
    if flaw is not None:
        raise ValueError(
            f"adapter.new_tokens is set, but the rows of new tokens in a {type(model).__name__} cannot be trained: "
            f"{flaw}; leave it out, or take another model"
        )
    wanted = [embedding] if tied else [embedding, head]
    return {name: module for name, module in model.named_modules() if any(module is one for one in wanted)}


def num_row_parameters(model: PreTrainedModel, num_tokens: int) -> int:
    """Number of parameters in the rows of new tokens; 0 without new tokens.

    Raises:
        ValueError: as in :func:`modules_with_rows`.
    """
    if not num_tokens:
        return 0
    return sum(num_tokens * module.weight.shape[1] for module in modules_with_rows(model).values())


def fit_rows(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Give embedding and head rows for all of these ids, in place; a model that has them stays as it is. The values of
    added rows have no meaning.

    Raises:
        ValueError: rows would be added for tokens that are not new.
    """
    rows = input_embedding(model).num_embeddings
    if min(ids) > rows:
        raise ValueError(
            f"adapter.new_tokens is set, but the tokenizer without them has {min(ids)} tokens, and the model's "
            f"embedding {rows} rows: some of its own tokens have none; take the tokenizer that the weights came with"
        )
    if max(ids) >= rows:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)


@torch.no_grad()
def start_rows(model: PreTrainedModel, tokens: NewTokens) -> None:
    """Give new tokens rows in embedding and head, in place: each starts as the mean, in float32, of the rows of its
    pieces. The values depend on the model alone, so they are the same on every rank.

    Raises:
        ValueError: as in :func:`modules_with_rows` and :func:`fit_rows`.
    """
    fit_rows(model, tokens.ids)
    for module in modules_with_rows(model).values():
        for number, pieces in zip(tokens.ids, tokens.pieces, strict=True):
            module.weight[number] = module.weight[pieces].float().mean(0)


@torch.no_grad()
def untrained_rows(
    model: PreTrainedModel, read: Sequence[int], written: Sequence[int], added: Sequence[int]
) -> list[int]:
    """Ids of tokens whose row in a model nothing has trained: it is nearly 0, or equal, bit for bit, to that of another
    token. Untrained rows of random values look like trained ones, and are not found.

    Args:
        model: a base.
        read: ids of tokens whose rows in the embedding are checked.
        written: ids of tokens whose rows in the head are checked, if the head has rows of its own.
        added: ids of tokens whose rows these are compared with.
    """
    embedding, head = input_embedding(model), model.get_output_embeddings()
    found = _untrained_in(embedding.weight, read, added)
    if isinstance(head, nn.Linear) and head.weight is not embedding.weight:
        found |= _untrained_in(head.weight, written, added)
    return sorted(found)


def _untrained_in(weight: torch.Tensor, tokens: Sequence[int], added: Sequence[int]) -> set[int]:
    rows = len(weight)
    asked, others = ([token for token in ids if token < rows] for ids in (tokens, added))
    if not asked or not weight.is_floating_point() or weight.is_meta:
        return set()
    typical = weight[:: max(1, rows // SAMPLED_ROWS)].float().norm(dim=1).median()
    compared = weight[others]
    return {
        token
        for token in asked
        if weight[token].float().norm() <= UNTRAINED * typical
        or (compared == weight[token]).all(1).sum() > others.count(token)
    }
