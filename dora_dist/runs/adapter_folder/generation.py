"""Where the answers of an adapter end, and the chat template that it was trained in: what its folder says of both, and
what must be set where its base has others."""

import json
import os
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from dora_dist.base_model.load import BaseModelSpec, load_model_config, load_tokenizer
from dora_dist.console import files
from dora_dist.data.encoding.chat import stop_tokens

TEMPLATE = "chat_template.jinja"
"""File in which transformers saves the chat template of a tokenizer."""


@dataclass(frozen=True)
class Needed:
    """What a base lacks of what its adapter was trained with; empty if it lacks nothing.

    Attributes:
        ends: ids of all tokens at which answers end; empty if the base itself stops at all that ended answers in
            training.
        lacking: the tokens at which the base itself does not stop.
        template: whether conversations were trained in another chat template than the base's.
    """

    ends: tuple[int, ...] = ()
    lacking: tuple[str, ...] = ()
    template: bool = False

    def lines(self, folder: str) -> list[tuple[str, str]]:
        """What must be set for the adapter in ``folder``: pairs of a title and a line of Python."""
        lines = []
        if self.ends:
            setting = f"model.generation_config.eos_token_id = {list(self.ends)}"
            lines.append(("then set", f"{setting}     # the base does not stop at {', '.join(self.lacking)}"))
        if self.template:
            tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({folder!r})"
            lines.append(("and take", f"{tokenizer}     # the base's chat template is not the trained one"))
        return lines

    def vllm(self, folder: str) -> str:
        """Options of ``vllm serve``, which takes template and end tokens from the base even where a request names an
        adapter; by its source of November 2026, ``--override-generation-config`` sets no end tokens."""
        ends = f" --generation-config {folder}" if self.ends else ""
        return self._template_option(folder) + ends

    def sglang(self, folder: str) -> str:
        """Options of SGLang's server, and what each request must have."""
        ends = f"     # and in each request: stop_token_ids {list(self.ends)}" if self.ends else ""
        return self._template_option(folder) + ends

    def _template_option(self, folder: str) -> str:
        return f" --chat-template {folder}/{TEMPLATE}" if self.template else ""


def settings_of_base(spec: BaseModelSpec) -> GenerationConfig:
    """A base's generation settings, as transformers loads them.

    Raises:
        ValueError: the base cannot be found.
    """
    found = _recorded_settings(os.path.expanduser(spec.path))
    return GenerationConfig.from_model_config(load_model_config(spec)) if found is None else deepcopy(found)


@cache
def _recorded_settings(base: str) -> GenerationConfig | None:
    """The settings in a base's own file; None where it has none. Cached, because every checkpoint asks for them."""
    try:
        return GenerationConfig.from_pretrained(base)
    except OSError:
        return None


def end_tokens(tokenizer: PreTrainedTokenizerBase, chat: bool, settings: GenerationConfig) -> list[int]:
    """Ids of the tokens at which a model stops when it generates: those that ended an answer in training, the end token
    first, and then all others at which its base stops.

    Args:
        tokenizer: the adapter's tokenizer.
        chat: whether the adapter was trained on conversations.
        settings: the base's generation settings.
    """
    found = [tokenizer.eos_token_id, *_trained_ends(tokenizer, chat), *_ends_of(settings)]
    return list(dict.fromkeys(end for end in found if end is not None))


def set_special_tokens(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
    """Change a base's settings to its adapter's, in place; arguments as in :func:`end_tokens`."""
    ends = sorted(end_tokens(tokenizer, chat, settings))
    settings.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    settings.pad_token_id, settings.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id


def write_settings(folder: Path, spec: BaseModelSpec, chat: bool) -> Needed:
    """Write the generation settings of an adapter's model into the adapter's folder, where neither PEFT nor
    transformers reads them by itself, and return what the base lacks of them.

    Args:
        folder: the adapter's folder, with its tokenizer.
        spec: the base.
        chat: whether the adapter was trained on conversations.

    Raises:
        ValueError: the base cannot be found.
    """
    tokenizer, settings = load_tokenizer(str(folder), spec.trust_remote_code), settings_of_base(spec)
    needed = _needed(tokenizer, spec, chat, settings)
    set_special_tokens(settings, tokenizer, chat)
    values = json.loads(settings.to_json_string())  # not save_pretrained, which refuses what some bases have
    values.pop("_from_model_config", None)
    files.write_json(folder / GENERATION_CONFIG_NAME, values)
    return needed


def _needed(tokenizer: PreTrainedTokenizerBase, spec: BaseModelSpec, chat: bool, settings: GenerationConfig) -> Needed:
    of_base = _ends_of(settings)
    lacking = [end for end in _trained_ends(tokenizer, chat) if end not in of_base]
    ends = sorted(end_tokens(tokenizer, chat, settings)) if lacking else []
    template = False
    if chat:
        template = _template_of(spec.path, spec.trust_remote_code) != tokenizer.get_chat_template()
    return Needed(tuple(ends), tuple(tokenizer.convert_ids_to_tokens(lacking)), template)


@cache
def _template_of(base: str, trust_remote_code: bool) -> str | None:
    """The chat template that a base takes by itself; None where it has none, or several without a default. Cached,
    because every checkpoint asks for it."""
    tokenizer = load_tokenizer(base, trust_remote_code)
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _trained_ends(tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[int]:
    return stop_tokens(tokenizer, tokenizer.get_chat_template() if chat else None)


def _ends_of(settings: GenerationConfig) -> list[int]:
    ends = settings.eos_token_id
    return list(ends) if isinstance(ends, list) else [] if ends is None else [ends]
