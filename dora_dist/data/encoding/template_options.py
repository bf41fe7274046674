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


class TemplateVariables:
    """The variables of a chat template to which a user may give values.

    Args:
        template: the template's Jinja source.
        special_tokens: variables with the names of special tokens, such as ``bos_token``.

    Attributes:
        read: names of these variables.

    Raises:
        ValueError: the template cannot be read.
    """

    def __init__(self, template: str, special_tokens: Collection[str]) -> None:
        try:
            environment = _compile_jinja_template(template).environment
            read = meta.find_undeclared_variables(environment.parse(template))  # folds constants in it
            self._tree = environment.parse(template)
        except TemplateSyntaxError as error:
            raise ValueError(
                f"the chat template cannot be read: {error}; set data.chat_template to another one"
            ) from None
        self._own = {*OF_THE_RENDERING, *special_tokens}
        self.read = read - self._own

    def flaw(self, name: str, value: Any) -> str | None:
        """Why a variable cannot have a value, in words; None where it can."""
        if name in self._own:
            return "is set by the program itself: leave it out"
        if name not in self.read:
            known = sorted(self.read)
            return (
                f"is never read by the chat template{nearest(name, known)} (it reads "
                f"{', '.join(known) or 'no variable of this kind'}): correct the name, or leave it out"
            )
        if isinstance(value, str) and value.strip().lower() in SWITCHES and not self._compares_with(value):
            return (
                f"is the text {value!r}, with which the chat template compares nothing, so that it means the same as "
                "true: write true, false or null without quotation marks"
            )
        return None

    def _compares_with(self, text: str) -> bool:
        """Whether the template asks if something is this text (``reasoning_effort == 'none'``), or lists it among
        others."""
        asking = self._tree.find_all((nodes.Compare, nodes.List, nodes.Tuple, nodes.Dict))
        return any(found.value == text for node in asking for found in node.find_all(nodes.Const))


def with_options(template: str, options: Mapping[str, Any], special_tokens: Collection[str]) -> str:
    """The template with defaults for some of its variables.

    Args:
        template: the template's Jinja source.
        options: variable -> value: text, a number, true, false, null, or lists and mappings of these.
        special_tokens: variables with the names of special tokens, such as ``bos_token``.

    Raises:
        ValueError: the template never reads a variable, or it is not for the user to set, or its value is a text that
            is meant as true, false or null.
    """
    if not options:
        return template
    variables = TemplateVariables(template, special_tokens)
    for name, value in options.items():
        if flaw := variables.flaw(name, value):
            raise ValueError(f"data.chat_template_kwargs.{name} {flaw}")
    defaults = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
        for name, value in options.items()
    )
    return f"{defaults}{{{{ '' }}}}{template}"  # a tag before the template would take its first line break


def _literal(value: Any) -> str:
    """A value in Jinja's writing."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
