"""What a row says is in its rendering, and what is trained is what generation is asked for; else the row is refused."""

import json

import pytest
from support.byte_tokenizer import byte_tokenizer
from tokenizers import models

from dora_dist.data.encoding.chat import stop_tokens
from dora_dist.data.encoding.encoder import EncodingRules, Status
from dora_dist.data.row_formats import build_encoder

TURN = "<|im_start|>{{ m.role }}\n%s<|im_end|>\n"
LOOP = "{%% for m in messages %%}%s{%% endfor %%}{%% if add_generation_prompt %%}<|im_start|>assistant\n%s{%% endif %%}"
TOOLS_AS_JSON = "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
THOUGHT = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"


def chatml(body: str, before: str = "", prompt: str = "") -> str:
    return before + LOOP % (TURN % body, prompt)


def calls(arguments: str) -> str:
    return "{% for c in m.tool_calls or [] %}[{{ c.function.name }} " + arguments + "]{% endfor %}"


CONTENT = "{{ m.content or '' }}"
PLAIN = chatml(CONTENT)
TEMPLATES = {
    "plain": PLAIN,
    "trims": chatml("{{ (m.content or '') | trim }}"),
    "marks": LOOP
    % (
        "{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content or '' }}<|im_end|>"
        "{% endgeneration %}\n{% else %}" + TURN % CONTENT + "{% endif %}",
        "",
    ),
    "marks around the header": LOOP
    % (
        "{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n{{ m.content or '' }}<|im_end|>\n"
        "{% endgeneration %}{% else %}" + TURN % CONTENT + "{% endif %}",
        "",
    ),
    "several marks": LOOP
    % (
        "{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content or '' }}{% endgeneration %}"
        "{% generation %}<|im_end|>{% endgeneration %}\n{% else %}" + TURN % CONTENT + "{% endif %}",
        "",
    ),
    "thoughts kept": chatml(THOUGHT + CONTENT),
    "thoughts of the last only": chatml("{% if loop.last %}" + THOUGHT + "{% endif %}" + CONTENT),
    "thoughts under another name": chatml("{% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}" + CONTENT),
    "thoughts always written": chatml(
        "{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}"
        + CONTENT
    ),
    "takes thoughts out of contents": chatml(
        "{% if '</think>' in (m.content or '') and not loop.last %}{{ m.content.split('</think>')[-1] }}"
        "{% else %}" + CONTENT + "{% endif %}"
    ),
    "arguments as JSON": chatml(CONTENT + calls("{{ c.function.arguments | tojson }}"), TOOLS_AS_JSON),
    "arguments as text": chatml(CONTENT + calls("{{ c.function.arguments }}"), TOOLS_AS_JSON),
    "arguments one by one": chatml(
        CONTENT + calls("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }} {% endfor %}"),
        "{% for t in tools or [] %}{{ t.function.name }}: {{ t.function.description }} "
        "({{ t.function.parameters.properties | join(', ') }})\n{% endfor %}",
    ),
    "calls only without content": chatml(
        "{% if m.content is none %}"
        + calls("{{ c.function.arguments | tojson }}")
        + "{% else %}{{ m.content }}{% endif %}",
        TOOLS_AS_JSON,
    ),
    "system first only": LOOP % ("{% if m.role != 'system' or loop.first %}" + TURN % CONTENT + "{% endif %}", ""),
    "no system": LOOP % ("{% if m.role != 'system' %}" + TURN % CONTENT + "{% endif %}", ""),
    "prompt begins a thought that an answer without one lacks": chatml(
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}" + CONTENT, prompt="<think>"
    ),
    "prompt begins a thought": chatml(
        "{% if m.role == 'assistant' %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}" + CONTENT,
        prompt="<think>",
    ),
}
TOOL = {
    "type": "function",
    "function": {
        "name": "warmth",
        "description": "of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}


def user(text="q", **more):
    return {"role": "user", "content": text, **more}


def answer(text="a", **more):
    return {"role": "assistant", "content": text, **more}


def call(*towns, content=None, as_text=False):
    arguments = [{"town": town} for town in towns]
    return answer(
        content,
        tool_calls=[
            {
                "id": f"c{n}",
                "type": "function",
                "function": {"name": "warmth", "arguments": json.dumps(one) if as_text else one},
            }
            for n, one in enumerate(arguments)
        ],
    )


CONVERSATIONS = {
    "one turn": [user(), answer()],
    "several turns": [user("q1"), answer("a1"), user("q2"), answer("a2")],
    "system first": [{"role": "system", "content": "s"}, user(), answer()],
    "system in the middle": [user("q1"), answer("a1"), {"role": "system", "content": "s"}, user("q2"), answer("a2")],
    "ends with the user": [user("q1"), answer("a1"), user("q2")],
    "begins with a line break": [user(), answer("\n\nBlue.")],
    "begins with a space": [user(), answer(" Blue.")],
    "a thought": [user(), answer("51", reasoning_content="30 and 21")],
    "thoughts": [
        user("q1"),
        answer("51", reasoning_content="30 and 21"),
        user("q2"),
        answer("68", thinking="40 and 28"),
    ],
    "a thought earlier": [user("q1"), answer("51", reasoning_content="30 and 21"), user("q2"), answer("68")],
    "a thought in the content": [user("q1"), answer("<think>t1</think>51"), user("q2"), answer("<think>t2</think>68")],
    "one call": [user(), call("Turku")],
    "a call as text": [user(), call("Turku", as_text=True)],
    "parallel calls": [user(), call("Turku", "Oulu", content="Both.")],
    "a call and its result": [user(), call("Turku"), {"role": "tool", "tool_call_id": "c0", "content": "12"}, answer()],
    "a wrong answer": [user("q1"), answer("wrong", weight=0), user("q2"), answer("right", weight=1)],
    "unicode": [user("Mitä? 語 🙂"), answer("Ä 語 🙂")],
}


def encode(template, messages, tokenizer=None, **rules):
    tokenizer = tokenizer or byte_tokenizer("chatml")
    encoder = build_encoder(tokenizer, EncodingRules(format="messages", template=template, bad_rows="skip", **rules))
    row = {"messages": messages, "tools": [TOOL] if any("tool_calls" in m for m in messages) else None}
    columns = encoder({"place": ["here"], "json": [json.dumps(row)], "flaw": [""], "filled": [False]})
    lines = zip(
        columns["status"], columns["note"], columns["input_ids"], columns["spans"], columns["answer"], strict=True
    )
    return tokenizer, list(lines)


def texts(value):
    """All that a message says."""
    if isinstance(value, dict):
        return [text for name, part in value.items() for text in (name, *texts(part))]
    return [str(value)]


def trained_words(messages):
    """Words of the answers that are trained: contents, thoughts, names and arguments of calls."""
    words = []
    for message in messages:
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        words += [message[key] for key in ("reasoning_content", "thinking") if key in message]
        words += [message["content"].strip()] if message["content"] else []
        for one in message.get("tool_calls", []):
            arguments = one["function"]["arguments"]
            words += ["warmth", *texts(json.loads(arguments) if isinstance(arguments, str) else arguments)]
    return words


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_cell_is_right_or_refused(template, conversation):
    messages = CONVERSATIONS[conversation]
    tokenizer, examples = encode(TEMPLATES[template], messages, max_length=4000)
    if any(status == Status.BAD for status, *_ in examples):
        assert all(note for status, note, *_ in examples if status == Status.BAD)
        assert (template, conversation) in REFUSED, examples[0][1]
        return
    assert (template, conversation) not in REFUSED
    whole = "".join(tokenizer.decode(ids) for _, _, ids, _, _ in examples)
    trained = [
        tokenizer.decode(ids[start:end])
        for _, _, ids, spans, _ in examples
        for start, end in zip(spans[::2], spans[1::2], strict=True)
    ]
    begun = "<think>" * template.startswith("prompt begins")
    for word in trained_words(messages):
        assert any(word in begun + text for text in trained), (word, trained)
    given = messages[: max(n for n, m in enumerate(messages) if m["role"] == "assistant") + 1]
    assert all(m["content"].strip() in whole for m in given if m["content"])
    assert not any("wrong" in text for text in trained)
    assert all(text.endswith("<|im_end|>") and "<|im_start|>" not in text for text in trained)
    tokenizer.chat_template = TEMPLATES[template]
    for _, _, ids, spans, reference in examples:
        # A model that has learned it perfectly is asked as it is deployed, and generates what is compared with.
        assert reference == tokenizer.decode(ids[spans[-2] : spans[-1]], skip_special_tokens=True)
        prompt = tokenizer.decode(ids[: spans[-2]])
        assert prompt.endswith("<|im_start|>assistant\n" + begun)


NO_CALLS = [name for name in TEMPLATES if not name.startswith(("arguments", "calls"))]
NO_THOUGHTS = [name for name in TEMPLATES if not name.startswith(("thoughts", "prompt"))]
CALLS = ("one call", "a call as text", "parallel calls", "a call and its result")
WITHOUT_THOUGHT = set(CONVERSATIONS) - {"a thought", "thoughts", "a thought in the content"}
REFUSED = {
    *(("prompt begins a thought that an answer without one lacks", conversation) for conversation in WITHOUT_THOUGHT),
    *((template, conversation) for template in NO_CALLS for conversation in CALLS),
    *((template, thought) for template in NO_THOUGHTS for thought in ("a thought", "thoughts", "a thought earlier")),
    ("calls only without content", "parallel calls"),
    ("system first only", "system in the middle"),
    ("no system", "system first"),
    ("no system", "system in the middle"),
}


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name.startswith("arguments")])
def test_arguments_as_text_and_as_an_object_give_the_same_tokens(template):
    (one,), (other,) = (encode(TEMPLATES[template], CONVERSATIONS[name])[1] for name in ("one call", "a call as text"))
    assert one == other
    assert "\\" not in byte_tokenizer("chatml").decode(one[2])


def merging_tokenizer():
    """Joins two line breaks to one token, as those of most families do."""
    tokenizer = byte_tokenizer("chatml")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = {**backend["model"]["vocab"], "ĊĊ": 1000}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")])
    return tokenizer


def test_an_answer_that_begins_with_a_line_break_is_asked_for_in_the_tokens_of_the_deployed_prompt():
    messages = CONVERSATIONS["begins with a line break"]
    tokenizer, ((_, _, ids, spans, reference),) = encode(PLAIN, messages, merging_tokenizer())
    together = tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False)
    assert together != ids, "the tokenizer joins nothing at this border: the test proves nothing"
    prompt = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert ids[: spans[-2]] == tokenizer.encode(prompt, add_special_tokens=False)
    assert tokenizer.decode(ids) == f"{prompt}\n\nBlue.<|im_end|>\n"
    assert reference == "\n\nBlue."


ENDS = "{% if m.tool_calls %}<|endoftext|>{% else %}<|im_end|>{% endif %}\n"
ONE_AT_A_TIME = "{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one call') }}{% endif %}"
JSON_CALLS = calls("{{ c.function.arguments | tojson }}")


@pytest.mark.parametrize("before", ["", ONE_AT_A_TIME], ids=["several calls", "one call at a time"])
def test_calls_may_end_by_a_token_of_their_own_at_which_generation_stops_too(before):
    body = "<|im_start|>{{ m.role }}\n" + before + CONTENT + JSON_CALLS + ENDS
    template = TOOLS_AS_JSON + LOOP % (body, "")
    tokenizer, ((status, _, ids, spans, _),) = encode(template, CONVERSATIONS["one call"])
    assert status == Status.KEPT
    assert tokenizer.decode(ids[spans[0] : spans[1]]).endswith('{"town": "Turku"}]<|endoftext|>')
    wanted = sorted(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    assert stop_tokens(tokenizer, template) == wanted


def test_a_token_after_every_call_ends_no_answer():
    """Generation would stop behind the first of several calls."""
    ends = "{% if not m.tool_calls %}<|im_end|>{% endif %}\n"
    body = CONTENT + calls("{{ c.function.arguments | tojson }}<|endoftext|>") + ends
    template = TOOLS_AS_JSON + LOOP % ("<|im_start|>{{ m.role }}\n" + body, "")
    tokenizer, ((status, note, *_),) = encode(template, CONVERSATIONS["one call"])
    assert status == Status.BAD
    assert "ends without '<|im_end|>', which ends others" in note
    assert stop_tokens(tokenizer, template) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_an_end_in_the_middle_of_an_answer_is_refused():
    """Generation would stop there, though the rest was trained."""
    thought = "{% if m.reasoning_content %}{{ m.reasoning_content }}<|im_end|>{% endif %}"
    _, ((status, note, *_),) = encode(chatml(thought + CONTENT), [user(), answer(reasoning_content="t")])
    assert status == Status.BAD
    assert "is rendered with '<|im_end|>' in the middle of an answer, where generation would stop" in note


def test_a_text_that_the_template_takes_away_is_noticed_in_the_row_that_has_it():
    template = chatml("{% if m.content.startswith('#') %}-{% else %}{{ m.content }}{% endif %}")
    _, examples = encode(template, [user(), answer("#hidden")])
    assert [(status, note) for status, note, *_ in examples] == [
        (
            Status.BAD,
            "field 'messages[1].content' does not stand in its rendering: it is left out by the chat template, so that "
            "it would be lost: leave it out of the rows, or set data.chat_template",
        )
    ]


@pytest.mark.parametrize(
    ("row", "form", "message"),
    [
        ({"messages": [user(), answer()], "history": [["x", "y"]]}, "messages", "field 'history' is not read"),
        ({"messages": [user(), answer(images=["x"])]}, "messages", r"field 'messages\[1\]\.images' is not read"),
        ({"messages": [user(), answer(weight=0.5)]}, "messages", r"messages\[1\]\.weight' must be 0 or 1"),
        ({"messages": [user(), answer(weight=0)]}, "messages", "has no message of the assistant to train"),
        ({"prompt": "p", "completion": "c", "system": "s"}, "prompt_completion", "field 'system' is not read"),
        ({"instruction": "i", "output": "o", "history": ["x"]}, "alpaca", "field 'history' must be a list of"),
        (
            {"instruction": "i", "output": "o", "history": [["a", "b"], ["c", " "]]},
            "alpaca",
            r"field 'history\[1\]\[1\]' is empty, so that there is nothing to learn from it",
        ),
        ({"instruction": "i", "output": "o", "system": "s"}, "alpaca", "field 'system' has no place under"),
        (
            {"instruction": "i", "context": "c", "output": "o"},
            "alpaca",
            r"field 'context' is not read .* lost: name it in the fields of the source, fields: \{input: context\}, or",
        ),
        (
            {"messages": [user(), answer()], "system_prompt": "s"},
            "messages",
            r"field 'system_prompt' is not read .* fields: \{system: system_prompt\}, or set ignore",
        ),
        (
            {"prompt": "p", "completion": "c", "context": "x"},
            "prompt_completion",
            r"field 'context' is not read .* lost: write it into the prompt of the source, prompt: \.\.\. \{context\}",
        ),
        (
            {"instruction": "i", "output": "o", "chat_template_kwargs": {"enable_thinking": False}},
            "alpaca",
            r"'chat_template_kwargs' is not read .* lost: set data\.chat_template_kwargs, which is for all rows",
        ),
        (
            {"messages": [user(), answer()], "documents": [{"title": "t", "text": "x"}]},
            "messages",
            r"field 'documents' is not read in rows of the format messages, so that it would be lost: set ignore: \[",
        ),
        (
            {"messages": [user(), answer()], "weight": 0},
            "messages",
            "field 'weight' is 0, which is not read for a whole",
        ),
        (
            {"prompt": "p", "completion": "c", "train": False},
            "prompt_completion",
            "field 'train' is False, which is not",
        ),
        (
            {"prompt": "p", "completion": "c", "train": "false"},
            "prompt_completion",
            "field 'train' is 'false', which is",
        ),
        ({"text": "t", "weight": 0.5}, "text", "field 'weight' is 0.5, which is not read for a whole row"),
    ],
)
def test_what_would_be_lost_is_refused(row, form, message):
    encoder = build_encoder(byte_tokenizer("chatml"), EncodingRules(format=form, template=PLAIN))
    with pytest.raises(ValueError, match=message):
        encoder({"place": ["here"], "json": [json.dumps(row)], "flaw": [""], "filled": [False]})


@pytest.mark.parametrize(
    ("row", "rules", "text"),
    [
        (
            {"instruction": "Five?", "output": "25", "system": "Square.", "history": [["Four?", "16"]]},
            {"format": "alpaca", "as_chat": True},
            "<|im_start|>system\nSquare.<|im_end|>\n<|im_start|>user\nFour?<|im_end|>\n<|im_start|>assistant\n16"
            "<|im_end|>\n<|im_start|>user\nFive?<|im_end|>\n<|im_start|>assistant\n25<|im_end|>\n",
        ),
        (
            {"system": "Be kind.", "messages": [user(), answer(mood="glad")]},
            {"format": "messages"},
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
            "<|im_start|>assistant\na<|im_end|>\n",
        ),
    ],
)
def test_system_and_history_of_a_row_are_read_and_other_fields_of_messages_counted(row, rules, text):
    tokenizer = byte_tokenizer("chatml")
    encoder = build_encoder(tokenizer, EncodingRules(template=PLAIN, **rules))
    columns = encoder({"place": ["here"], "json": [json.dumps(row)], "flaw": [""], "filled": [False]})
    assert tokenizer.decode(columns["input_ids"][0]) == text
    assert columns["unread"] == ["mood" if rules["format"] == "messages" else ""]


THINKS = TEMPLATES["thoughts kept"]
PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize(("thought", "written"), [("one", "one"), (PARTS, "one\ntwo"), (PARTS[:1], "one")])
def test_a_thought_is_text_or_parts_of_text_which_are_joined_as_those_of_contents_are(name, thought, written):
    tokenizer, ((_, note, ids, spans, _),) = encode(THINKS, [user(PARTS), answer(PARTS, **{name: thought})])
    assert not note
    assert tokenizer.decode(ids[spans[0] : spans[1]]) == f"<think>{written}</think>one\ntwo<|im_end|>"


@pytest.mark.parametrize("nothing", [None, "", []])
def test_a_thought_of_nothing_is_none(nothing):
    assert encode(PLAIN, [user(thinking=nothing), answer(thinking=nothing)])[1] == encode(PLAIN, [user(), answer()])[1]


@pytest.mark.parametrize(
    ("thought", "again"),
    [("t", "t"), ("t", [{"type": "text", "text": "t"}]), (PARTS, "one\ntwo")],
    ids=["text", "text and its part", "parts and their text"],
)
def test_a_thought_that_stands_under_two_names_is_one(thought, again):
    twice = answer(reasoning=again, reasoning_content=thought)
    assert encode(THINKS, [user(), twice])[1] == encode(THINKS, [user(), answer(thinking=thought)])[1]


@pytest.mark.parametrize(
    ("messages", "flaw"),
    [
        ([user(), answer(thinking=True)], "'messages[1].thinking' must be text, got True"),
        ([user(), answer(thinking=False)], "'messages[1].thinking' must be text, got False"),
        ([user(), answer(reasoning=float("nan"))], "'messages[1].reasoning' must be text, got nan"),
        ([user(), answer(reasoning={"steps": "x"})], "'messages[1].reasoning' must be text, got {'steps': 'x'}"),
        (
            [user(), answer(reasoning_content=["step 1", "step 2"])],
            "'messages[1].reasoning_content[0]' must be a part of text, {type: text, text: ...}, since no other is "
            "read, got 'step 1'",
        ),
        (
            [user(), answer(thinking="t", reasoning="u")],
            "'messages[1].reasoning' is another thought than thinking of the same message: keep one",
        ),
        (
            [user(thinking="t"), answer()],
            "'messages[0].thinking' is a thought in a message that is not the assistant's: leave it out",
        ),
    ],
)
def test_other_thoughts_are_refused(messages, flaw):
    """The template writes what is no text as nothing, so that an empty thought would be trained."""
    template = chatml("{% if m.reasoning_content is string %}" + THOUGHT + "{% endif %}" + CONTENT)
    assert encode(template, messages)[1][0][:2] == (Status.BAD, f"field {flaw}")


def test_a_thought_that_the_template_takes_away_is_noticed_in_the_row_that_has_it():
    thought = "{% if m.reasoning_content %}<think>{{ m.reasoning_content.split('#')[0] }}</think>{% endif %}"
    template = chatml(thought + CONTENT)
    _, examples = encode(template, [user(), answer(reasoning_content="said # hidden")])
    assert examples[0][0] == Status.BAD
    assert examples[0][1].startswith(
        "field 'messages[1].reasoning_content' does not stand in its rendering: it is left"
    )
    assert encode(template, [user(), answer(reasoning_content=" said\n")])[1][0][0] == Status.KEPT


NAMES = "{% if m.name %}{{ m.name }}: {% endif %}"
IDS = "{% if m.tool_call_id %}({{ m.tool_call_id }}) {% endif %}"
NINE = "{% if m.tool_call_id and m.tool_call_id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"


@pytest.mark.parametrize(
    ("body", "unread"),
    [
        (CONTENT, ["name of the role user", "name of the role tool", "tool_call_id of the role tool"]),
        (NAMES + CONTENT, ["tool_call_id of the role tool"]),
        ("{% if m.role == 'tool' %}" + NAMES + "{% endif %}" + IDS + CONTENT, ["name of the role user"]),
        (NAMES + IDS + NINE + CONTENT, []),
        ("{% if m.name and m.name != 'Ann' %}{{ raise_exception('who?') }}{% endif %}" + CONTENT, []),
    ],
    ids=["neither", "names", "names of tools, ids", "ids of nine characters", "refuses the names of the proof"],
)
def test_names_and_ids_of_calls_are_counted_where_the_template_does_not_write_them(body, unread):
    """The name of the user stands in what is said."""
    calling = call("Turku", content="Ann")
    calling["tool_calls"][0]["id"] = "123456789"
    result = {"role": "tool", "tool_call_id": "123456789", "name": "Ann", "content": "12"}
    template = chatml(body + calls("{{ c.function.arguments | tojson }}"), TOOLS_AS_JSON)
    encoder = build_encoder(byte_tokenizer("chatml"), EncodingRules(format="messages", template=template))
    row = {"messages": [user("Ann", name="Ann"), calling, result, answer("Ann")], "tools": [TOOL]}
    columns = encoder({"place": ["here"], "json": [json.dumps(row)], "flaw": [""], "filled": [False]})
    assert columns["unread"] == [",".join(unread)]


HARMLESS = {
    "messages": {"messages": [user(), answer()]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "output": "a"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "text": {"text": "a"},
}


@pytest.mark.parametrize("form", HARMLESS)
def test_fields_of_rows_that_are_not_read_are_named_and_change_nothing(form):
    more = {
        **{"id": 0, "lang": "en", "made": False, "comma, in it": "x", "empty": "", "none": None, "list": [], "map": {}},
        **{"context": " ", "system_prompt": None, "documents": [], "chat_template_kwargs": {}},
        **{"images": [None], "audio": {"path": None, "texts": [" "]}, "videos": [[]]},
        **{"weight": 1, "train": "true", "trainable": None, "loss": 0.3},
    }
    encoder = build_encoder(byte_tokenizer("chatml"), EncodingRules(format=form, template=PLAIN))
    rows = [json.dumps(HARMLESS[form] | added) for added in ({}, more)]
    columns = encoder({"place": ["a", "b"], "json": rows, "flaw": ["", ""], "filled": [False, False]})
    assert columns["unread_of_row"] == [[], ["id", "lang", "made", "comma, in it", "loss"]]
    assert columns["key"][0] == columns["key"][1]


@pytest.mark.parametrize(
    ("row", "rules", "unread"),
    [
        (
            {"instruction": "i", "context": "c", "response": "r", "category": "x"},
            {"format": "alpaca", "fields": {"input": "context", "output": "response"}},
            ["category"],
        ),
        (
            {"prompt": "old", "q": "x", "completion": "y"},
            {"format": "prompt_completion", "fields": {"prompt": "q"}},
            ["prompt"],
        ),
        (
            {"q": "x", "answers": {"text": ["y"]}, "other": {"text": ["z"]}},
            {"format": "prompt_completion", "fields": {"prompt": "q", "completion": "answers.text.0"}},
            ["other"],
        ),
    ],
    ids=["dolly", "the format's own name is another column", "a path"],
)
def test_what_fields_name_is_read(row, rules, unread):
    encoder = build_encoder(byte_tokenizer("chatml"), EncodingRules(**rules))
    columns = encoder({"place": ["here"], "json": [json.dumps(row)], "flaw": [""], "filled": [False]})
    assert columns["unread_of_row"] == [unread]


PROMPTED = {"question": "q", "answer": "a", "system": "s", "meta": {"tools": "t"}}


def test_a_prompt_of_its_own_reads_what_it_names_and_loses_nothing_else():
    """Context that it does not name is refused, as that of other rows is."""

    def encode_with(prompt):
        fields = {"completion": "answer"}
        rules = EncodingRules(format="prompt_completion", fields=fields, prompt=prompt, bad_rows="skip")
        encoder = build_encoder(byte_tokenizer("chatml"), rules)
        return encoder({"place": ["here"], "json": [json.dumps(PROMPTED)], "flaw": [""], "filled": [False]})

    columns = encode_with("{question}")
    assert columns["status"] == [Status.BAD]
    assert columns["note"][0] == (
        "field 'system' is not read in rows of the format prompt_completion, so that it would be lost: write it into "
        "the prompt of the source, prompt: ... {system} ..., or set ignore: [system] for the source, if the model need "
        "not have it"
    )
    columns = encode_with("{system}: {question}")
    assert (columns["status"], columns["unread_of_row"]) == ([Status.KEPT], [["meta"]])
    assert encode_with("{system}: {question} {meta.tools}")["unread_of_row"] == [[]]


SYSTEM = {"role": "system", "content": "Be brief."}
SHORT_PAIR = {"question": "q", "response": "a", "system_prompt": "s"}


def outcome(row, **rules):
    """Why a row is refused, or the fields of it that are not read."""
    rules = {"template": PLAIN, "bad_rows": "skip", **rules}
    encoder = build_encoder(byte_tokenizer("chatml"), EncodingRules(**rules))
    columns = encoder({"place": ["here"], "json": [json.dumps(row)], "flaw": [""], "filled": [False]})
    return columns["unread_of_row"][0] if columns["status"] == [Status.KEPT] else columns["note"][0]


@pytest.mark.parametrize(
    ("row", "form", "fields", "lost", "way_out"),
    [
        (
            {"instruction": "i", "input": "x", "output": "o"},
            "prompt_completion",
            {"prompt": "instruction", "completion": "output"},
            "input",
            "read the rows as alpaca, with format: alpaca and no fields for the source, or set ignore: [input]",
        ),
        (
            {"instruction": "i", "input": "x", "context": "c", "output": "o"},
            "alpaca",
            {"input": "context"},
            "input",
            "set ignore: [input]",
        ),
        (
            {"instruction": "i", "input": "x", "context": "c", "output": "o"},
            "alpaca",
            {},
            "context",
            "set ignore: [context]",
        ),
        (
            {"messages": [user(), answer()], "system": "s", "system_prompt": "t"},
            "messages",
            {"system": "system_prompt"},
            "system",
            "set ignore: [system]",
        ),
        (
            {"messages": [SYSTEM, user(), answer()], "system_prompt": "t"},
            "messages",
            {},
            "system_prompt",
            "set ignore: [system_prompt]",
        ),
        (
            SHORT_PAIR,
            "prompt_completion",
            {"prompt": "question", "completion": "response"},
            "system_prompt",
            "read the rows as alpaca, with format: alpaca and fields: {instruction: question, output: response, "
            "system: system_prompt} for the source, or set ignore: [system_prompt]",
        ),
        (
            {"prompt": "p", "completion": "c", "documents": [{"text": "x"}]},
            "prompt_completion",
            {},
            "documents",
            "set ignore: [documents]",
        ),
    ],
    ids=["input", "beside fields", "filled", "system", "another message of the system", "OpenOrca", "no text"],
)
def test_what_would_be_lost_is_refused_with_what_works_for_the_row(row, form, fields, lost, way_out):
    start = f"field '{lost}' is not read in rows of the format {form}, so that it would be lost: {way_out} for"
    found = outcome(row, format=form, fields=fields)
    assert found.startswith(start.replace("] for", "]")), found


def test_open_orca_is_read_as_the_message_says():
    fields = {"instruction": "question", "output": "response", "system": "system_prompt"}
    assert outcome(SHORT_PAIR, format="alpaca", fields=fields, as_chat=True) == []


@pytest.mark.parametrize(
    ("row", "rules"),
    [
        ({"prompt": "p", "completion": "c", "context": "x"}, {"format": "prompt_completion", "ignore": ["context"]}),
        ({"prompt": "p", "completion": "c", "weight": 70.5}, {"format": "prompt_completion", "ignore": ["weight"]}),
        (
            {"question": "q", "answers": {"text": ["a"]}, "context": "x"},
            {
                "format": "prompt_completion",
                "fields": {"prompt": "question", "completion": "answers.text.0"},
                "ignore": ["context"],
            },
        ),
        (
            {"q": "q", "completion": "c", "system": "x"},
            {"format": "prompt_completion", "prompt": "{q}", "ignore": ["system"]},
        ),
    ],
    ids=["context", "kilograms", "SQuAD", "a prompt of its own"],
)
def test_a_field_that_is_ignored_is_neither_refused_nor_counted(row, rules):
    assert outcome(row, **rules) == []
    assert f"ignore: [{rules['ignore'][0]}]" in outcome(row, **{**rules, "ignore": []})


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize("content", ["Be brief.", "Be brief.\n", [{"type": "text", "text": "Be brief."}]])
def test_a_column_that_repeats_the_message_of_the_system_is_accepted(name, content):
    row = {"messages": [{"role": "system", "content": content}, user(), answer()]}
    again = outcome({**row, name: "Be brief."}, format="messages")
    assert again == (["system_prompt"] if name == "system_prompt" else [])
    assert name in outcome({**row, name: "Be kind."}, format="messages")


@pytest.mark.parametrize("value", [False, " ", [None], {"bytes": None}, [[" "]]])
def test_a_value_that_says_nothing_is_not_lost(value):
    assert outcome({**HARMLESS["messages"], "image": value}, format="messages") == (["image"] if value is False else [])
