"""A conversation with the adapter of a run, on a terminal or line by line."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import TextStreamer

from dora_dist.console.text import say
from dora_dist.generate.answering import Answerer
from dora_dist.generate.questions import PromptRequest, as_asked
from dora_dist.generate.showing import shown

RESET = "/reset"


class Printed(TextStreamer):
    """Prints an answer while it is made, with characters that a terminal would obey escaped."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(shown(text), end="\n" if stream_end else "", flush=True)


def converse(answerer: Answerer, system: str | None) -> None:
    """Answer every line of standard input, each with all that was said before, until it ends.

    Args:
        answerer: the run's answerer.
        system: system message; None for the run's own.

    Raises:
        ValueError: the run was not trained in a chat template, or its sources have different system messages.
    """
    if not answerer.trained.use.chat:
        raise ValueError(
            "--chat is given, but this run was not trained in a chat template: ask it with --prompt, --file or lines "
            "of standard input"
        )
    said: list[Mapping[str, Any]] = []
    questions = as_asked(answerer.trained.use, _typed(said), system)
    model = answerer.load()
    context = answerer.context
    say(f"The adapter answers. {RESET} forgets what was said; Ctrl-D ends.")
    for turn, question in enumerate(questions):
        try:
            ids = answerer.ids(question)
        except ValueError as error:  # about this line only
            say(str(error))
            continue
        if context is not None and len(ids) + answerer.max_new_tokens > context:
            say(
                f"the conversation has {len(ids)} tokens, which with an answer of {answerer.max_new_tokens} are more "
                f"than the model's context of {context}: {RESET} begins a new one, --max-new-tokens allows shorter "
                "answers"
            )
            continue
        streamer = Printed(answerer.tokenizer, skip_prompt=True, skip_special_tokens=True)
        (answer,) = answerer.answers(model, [ids], turn, streamer=streamer)
        said += [question.messages[-1], {"role": "assistant", "content": answer}]


def _typed(said: list[Mapping[str, Any]]) -> Iterator[PromptRequest]:
    """Every line of standard input that has some text, as a question after what has been said by then."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip() == RESET:
            said.clear()
            say("a new conversation")
        elif line.strip():
            yield PromptRequest(messages=[*said, {"role": "user", "content": line.strip()}])
