"""Options of a chat template (``enable_thinking: false``), written into the template as its defaults.

So all that has the template has the options: training, preview, evaluation, ``generate``, and whoever serves the
adapter, with whose tokenizer the template is saved. A caller that gives an option of its own still has its way.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

from jinja2 import TemplateSyntaxError, meta, nodes
from transformers.utils.chat_template_utils import _compile_jinja_template

from dora_dist.config.checks import nearest

OF_THE_RENDERING = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables of a template that its caller always sets."""
SWITCHES = ("true", "false", "yes", "no", "on", "off", "none")
"""Texts that are meant as values of other types, and all true to a template."""
TRUTH_TESTS = ("defined", "undefined", "none", "true", "false", "boolean")
"""Tests of Jinja that no text passes or fails by what it says."""


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
        self._is_switch = cache(self._only_truth_is_asked)  # for rows that all give the same variable

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
        if isinstance(value, str) and value.strip().lower() in SWITCHES and self._is_switch(name):
            return (
                f"is the text {value!r}, and the chat template asks only whether there is something, so that it means "
                "the same as true: write true, false or null without quotation marks"
            )
        return None

    def _only_truth_is_asked(self, name: str) -> bool:
        """Whether the template does nothing with a variable, or with others that it sets to it, but ask whether it is
        true: it neither writes it nor compares it with anything."""
        assigned = [
            (node.target.name, list(_deciding(node.node)))
            for node in self._tree.find_all(nodes.Assign)
            if isinstance(node.target, nodes.Name)
        ]
        names: set[str] = set()
        found = {name}
        while found - names:
            names |= found
            found = {target for target, values in assigned if any(value.name in names for value in values)}
        asked = [value for test in _tests(self._tree) for value in _deciding(test)]
        known = {id(value) for value in [*asked, *(value for _, values in assigned for value in values)]}
        uses = (node for node in self._tree.find_all(nodes.Name) if node.ctx == "load" and node.name in names)
        return all(id(use) in known for use in uses)


def _tests(tree: nodes.Node) -> Iterator[nodes.Node]:
    """What a template asks to be true."""
    yield from (node.test for node in tree.find_all(nodes.If))
    yield from (node.test for node in tree.find_all(nodes.CondExpr))
    yield from (node.test for node in tree.find_all(nodes.For) if node.test is not None)
    yield from (node for node in tree.find_all(nodes.Test) if node.name in TRUTH_TESTS)


def _deciding(value: nodes.Node) -> Iterator[nodes.Name]:
    """The variables of an expression that pass their truth on to it."""
    parts: list[nodes.Node] = []
    if isinstance(value, nodes.Name):
        yield value
    elif isinstance(value, nodes.Not) or (isinstance(value, nodes.Test) and value.name in TRUTH_TESTS):
        parts = [value.node]
    elif isinstance(value, nodes.And | nodes.Or):
        parts = [value.left, value.right]
    elif isinstance(value, nodes.CondExpr):
        parts = [part for part in (value.expr1, value.expr2) if part is not None]
    elif isinstance(value, nodes.Filter) and value.name in ("default", "d") and value.node is not None:
        parts = [value.node, *value.args]
    elif isinstance(value, nodes.Compare) and all(_is_truth(operand.expr) for operand in value.ops):
        parts = [value.expr]
    for part in parts:
        yield from _deciding(part)


def _is_truth(value: nodes.Node) -> bool:
    return isinstance(value, nodes.Const) and (value.value is None or isinstance(value.value, bool))


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
