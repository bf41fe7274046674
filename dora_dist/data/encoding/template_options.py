"""Options of a chat template (``enable_thinking: false``), written into the template as its defaults.

So all that has the template has the options: training, preview, evaluation, ``generate``, and whoever serves the
adapter, with whose tokenizer the template is saved. A caller that gives an option of its own still has its way.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from jinja2 import TemplateSyntaxError, meta, nodes
from transformers.utils.chat_template_utils import _compile_jinja_template

from dora_dist.config.checks import nearest

OF_THE_RENDERING = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables of a template that its caller always sets."""
SWITCHES = ("true", "false", "yes", "no", "on", "off", "none")
"""Texts that are meant as values of other types, and all true to a template."""


def with_options(template: str, options: Mapping[str, Any], special_tokens: Collection[str]) -> str:
    """The template with defaults for some of its variables.

    Args:
        template: Jinja source.
        options: variable -> value: text, a number, true, false, null, or lists and mappings of these.
        special_tokens: variables with the names of special tokens, such as ``bos_token``.

    Raises:
        ValueError: the template never reads a variable, or it is not for the user to set, or its value is a text that
            is meant as true, false or null.
    """
    if not options:
        return template
    try:
        environment = _compile_jinja_template(template).environment
        read = meta.find_undeclared_variables(environment.parse(template))  # which folds what it is given
        tree = environment.parse(template)
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template cannot be read: {error}; set data.chat_template to another one") from None
    own = {*OF_THE_RENDERING, *special_tokens}
    for name, value in options.items():
        if name in own:
            raise ValueError(f"data.chat_template_kwargs has {name}, which the program sets itself: leave it out")
        if name not in read:
            known = sorted(read - own)
            raise ValueError(
                f"data.chat_template_kwargs has {name}, but the chat template never reads it{nearest(name, known)} "
                f"(it reads {', '.join(known) or 'no variable of this kind'}): correct the name, or leave it out"
            )
        if isinstance(value, str) and value.strip().lower() in SWITCHES and not _compares_with(tree, value):
            raise ValueError(
                f"data.chat_template_kwargs.{name} is the text {value!r}, with which the chat template compares "
                "nothing, so that it means the same as true: write true, false or null without quotation marks"
            )
    defaults = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
        for name, value in options.items()
    )
    return f"{defaults}{{{{ '' }}}}{template}"  # a tag before the template would take its first line break


def _compares_with(tree: nodes.Template, text: str) -> bool:
    """Whether a template asks if something is this text (``reasoning_effort == 'none'``), or lists it among others."""
    asking = tree.find_all((nodes.Compare, nodes.List, nodes.Tuple, nodes.Dict))
    return any(found.value == text for node in asking for found in node.find_all(nodes.Const))


def _literal(value: Any) -> str:
    """A value in Jinja's writing."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
