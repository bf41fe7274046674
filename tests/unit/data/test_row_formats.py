import json

import pytest

from dora_dist.config.tasks import TASKS
from dora_dist.data.reading.samples import (
    Chat,
    Document,
    Instruction,
    Pair,
    Question,
    RowFlaw,
    Summary,
    alpaca_prompt,
    rename_fields,
)
from dora_dist.data.row_formats import FORMATS, tell_format

ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
PAIR = {"prompt": "1 and 2 is", "completion": " 3"}
TEXT = {"text": "1 and 2 is 3"}
QUESTION, ANSWER = {"role": "user", "content": "1 and 2?"}, {"role": "assistant", "content": "3"}
MESSAGES = {"messages": [QUESTION, ANSWER]}
SHAREGPT = {"conversations": [{"from": "human", "value": "1 and 2?"}, {"from": "gpt", "value": "3"}]}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
SQUAD = {
    "question": "Who has a ball?",
    "context": "Ann has a ball. Ann runs.",
    "answers": {"text": ["Ann", "Ann"], "answer_start": [0, 16]},
}
SUMMARY = {"document": "Ann has a red ball and runs.", "summary": "Ann runs."}
ROWS = {
    "messages": (MESSAGES, Chat([QUESTION, ANSWER])),
    "sharegpt": (SHAREGPT, Chat([QUESTION, ANSWER])),
    "alpaca": (ALPACA, Instruction("Add.", "1 and 2", "3")),
    "prompt_completion": (PAIR, Pair("1 and 2 is", " 3")),
    "text": (TEXT, Document("1 and 2 is 3")),
    "squad": (SQUAD, Question(SQUAD["question"], SQUAD["context"], ("Ann", "Ann"), (0, 16))),
    "summary": (SUMMARY, Summary(SUMMARY["document"], SUMMARY["summary"])),
}


def parse(name: str, row: dict):
    return FORMATS[name].parse(row)


@pytest.mark.parametrize("name", ROWS)
def test_a_format_is_told_by_its_fields_and_read(name):
    row, sample = ROWS[name]
    formats = next((task.formats for task in TASKS.values() if name in task.formats), [name])
    assert tell_format([{**row, "source": "x"}, row], "src", {}, formats) == name
    assert parse(name, {**row, "source": "x"}) == sample


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({**TEXT, **PAIR}, "prompt_completion"),
        ({**TEXT, **ALPACA}, "alpaca"),
        ({**PAIR, **ALPACA}, "alpaca"),
        ({**PAIR, **MESSAGES}, "messages"),
        ({**SHAREGPT, **MESSAGES}, "messages"),
        ({**SHAREGPT, "instruction": "x", "output": "y"}, "sharegpt"),
    ],
)
def test_a_row_that_fits_several_formats_is_read_as_the_first_of_them(row, name):
    assert tell_format([row], "src", {}) == name


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ([ALPACA, ALPACA, {"instruction": "no answer"}], "alpaca"),
        ([{"prompt": "no answer"}, PAIR, PAIR], "prompt_completion"),
        ([{**ALPACA, **TEXT}, {**ALPACA, **TEXT}, {"instruction": "no answer", **TEXT}], "alpaca"),
    ],
    ids=["alpaca", "pair", "alpaca with a text column"],
)
def test_one_row_with_a_missing_field_does_not_change_what_the_others_are_read_as(rows, name):
    assert tell_format(rows, "src", {}) == name


def test_an_empty_column_of_a_table_tells_nothing():
    assert tell_format([{"messages": None, **PAIR}] * 3, "src", {}) == "prompt_completion"


def test_unknown_fields_are_refused_with_those_found_and_those_wanted():
    with pytest.raises(ValueError, match=r"^src: the fields answer, question fit no known format .*alpaca needs instr"):
        tell_format([{"question": "x", "answer": "y"}], "src", {})


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"q": "x", "a": "y"}, {"prompt": "q", "completion": "a"}),
        ({"q": "x", "completion": "y"}, {"prompt": "q"}),
        ({"prompt": "y", "completion": "x"}, {"prompt": "completion", "completion": "prompt"}),
        ({"prompt": "old", "q": "x", "completion": "y"}, {"prompt": "q"}),
    ],
    ids=["both", "one", "swapped", "the format's own name is another column"],
)
def test_fields_of_another_name_are_read_under_that_name(row, fields):
    assert rename_fields(row, fields) == {"prompt": "x", "completion": "y"}
    assert tell_format([row], "src", fields) == "prompt_completion"


def test_a_named_field_that_a_row_lacks_is_not_taken_from_another_column():
    with pytest.raises(RowFlaw):
        parse("prompt_completion", rename_fields({"prompt": "not this", "completion": "y"}, {"prompt": "question"}))


def answers(texts: object, starts: object) -> dict:
    return {**SQUAD, "answers": {"text": texts, "answer_start": starts}}


def test_a_question_may_have_no_answer():
    assert parse("squad", answers([], [])) == Question(SQUAD["question"], SQUAD["context"], (), ())


@pytest.mark.parametrize(
    ("row", "flaw"),
    [
        (answers(["Ann"], [1]), r"'answers\.answer_start\[0\]' is 1, but the context has 'nn ' there, not .* 'Ann'"),
        (answers(["Ann", "runs."], [0, 21]), r"'answers\.answer_start\[1\]' is 21, but the context has 'uns\.' there"),
        (answers(["ann"], [0]), r"'answers\.answer_start\[0\]' is 0, but the context has 'Ann' there"),
        (answers(["Ann"], [99]), r"'answers\.answer_start\[0\]' is 99, but the context has '' there"),
        (answers(["Ann"], [-25]), r"'answers\.answer_start\[0\]' must be a number of at least 0, got -25"),
        (answers(["Ann"], ["0"]), r"'answers\.answer_start\[0\]' must be a number of at least 0, got '0'"),
        (answers(["Ann"], [False]), r"'answers\.answer_start\[0\]' must be a number of at least 0, got False"),
        (answers([" "], [3]), r"'answers\.text\[0\]' must be text that is not empty, got ' '"),
        (answers([5], [0]), r"'answers\.text\[0\]' must be text that is not empty, got 5"),
        (answers(["Ann"], []), r"'answers' has 1 texts, but 0 starts"),
        (answers("Ann", 0), r"'answers' must be \{text: .*, got \{'text': 'Ann'"),
        ({**SQUAD, "answers": None}, r"'answers' must be \{text: .*, got null"),
        ({**SQUAD, "question": " "}, r"'question' is empty"),
        ({**SQUAD, "context": None}, r"'context' must be text, got null"),
    ],
)
def test_an_answer_must_stand_where_it_is_said_to_stand(row, flaw):
    with pytest.raises(RowFlaw, match=f"^field {flaw}"):
        parse("squad", row)


@pytest.mark.parametrize("name", ["document", "summary"])
def test_a_summary_needs_both_texts(name):
    with pytest.raises(RowFlaw, match=f"^field '{name}' is empty"):
        parse("summary", {**SUMMARY, name: "\n"})


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": None}])
def test_an_alpaca_row_without_input_has_a_prompt_without_that_part(empty):
    sample = parse("alpaca", {"instruction": "Say hi.", "output": "hi", **empty})
    assert sample.as_pair() == Pair("### Instruction:\nSay hi.\n\n### Response:\n", "hi")
    assert alpaca_prompt("Say hi.") == sample.as_pair().prompt
    assert sample.as_chat().messages[0] == {"role": "user", "content": "Say hi."}


def test_an_alpaca_row_with_input_gives_the_model_both_texts():
    sample = parse("alpaca", ALPACA)
    prompt = "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
    assert sample.as_pair() == Pair(prompt, "3")
    assert sample.as_chat() == Chat([{"role": "user", "content": "Add.\n\n1 and 2"}, ANSWER])


def message(role: object, content: object, **more: object) -> dict:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("name", "row", "flaw"),
    [
        ("alpaca", {"output": "x"}, r"'instruction' is missing"),
        ("alpaca", {"instruction": "x"}, r"'output' is missing"),
        ("alpaca", {**ALPACA, "instruction": None}, r"'instruction' must be text, got null"),
        ("alpaca", {**ALPACA, "input": ["x"]}, r"'input' must be text, got \['x'\]"),
        ("alpaca", {**ALPACA, "output": 3}, r"'output' must be text, got 3"),
        ("alpaca", {**ALPACA, "output": " \n"}, r"'output' is empty"),
        ("prompt_completion", {"completion": "x"}, r"'prompt' is missing"),
        ("prompt_completion", {**PAIR, "prompt": True}, r"'prompt' must be text, got True"),
        ("prompt_completion", {**PAIR, "completion": {"text": "3"}}, r"'completion' must be text, got \{'text': '3'\}"),
        ("prompt_completion", {**PAIR, "completion": ""}, r"'completion' is empty"),
        ("text", {}, r"'text' is missing"),
        ("text", {"text": 1e5}, r"'text' must be text, got 100000\.0"),
        ("text", {"text": "\t"}, r"'text' is empty"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_field_and_what_was_found(name, row, flaw):
    with pytest.raises(RowFlaw, match=f"^field {flaw}"):
        parse(name, row)


@pytest.mark.parametrize(
    ("field", "messages", "flaw"),
    [
        ("messages", None, r"must be a list of messages, got null"),
        ("messages", [], r"must be a list of messages, got \[\]"),
        ("messages", "[]", r"must be a list of messages, got '\[\]'"),
        ("messages", {"role": ["user"]}, r"must be a list of messages, got \{'role'"),
        ("messages", [QUESTION], r"has no message of the assistant"),
        ("conversations", None, r"must be a list of messages, got null"),
        ("conversations", [{"from": "human", "value": "x"}], r"has no message of the assistant"),
    ],
)
def test_a_conversation_must_be_a_list_with_an_answer(field, messages, flaw):
    with pytest.raises(RowFlaw, match=f"^field '{field}' {flaw}"):
        parse({"messages": "messages", "conversations": "sharegpt"}[field], {field: messages})


@pytest.mark.parametrize(
    ("entry", "flaw"),
    [
        ("3", r"messages\[1\]' must be a message with role and content, got '3'"),
        (None, r"messages\[1\]' must be a message with role and content, got null"),
        ({"content": "x"}, r"messages\[1\]\.role' is missing; there is 'content'"),
        (
            {"role": None, "content": "x"},
            r"messages\[1\]\.role' must be one of system, user, assistant, tool, got null",
        ),
        (message("bot", "x"), r"messages\[1\]\.role' must be one of system, user, assistant, tool, got 'bot'"),
        (message("human", "x"), r"messages\[1\]\.role' must be .*, got 'human'"),
        (message("User", "x"), r"messages\[1\]\.role' must be .*, got 'User'"),
        (message(["user"], "x"), r"messages\[1\]\.role' must be .*, got \['user'\]"),
        ({"role": "user", "text": "x"}, r"messages\[1\]\.content' is missing; there are 'role', 'text'"),
        (message("user", 5), r"messages\[1\]\.content' must be text, got 5"),
        (message("tool", None, tool_calls=[CALL]), r"messages\[1\]\.content' must be text, got null"),
        (message("user", [{"type": "image"}]), r"messages\[1\]\.content\[0\]' must be a part of text, .* \{'type'"),
        (message("assistant", None), r"messages\[1\]\.content' must be text, got null"),
        (message("assistant", " \n"), r"messages\[1\]\.content' is empty"),
        (message("assistant", "", tool_calls=[]), r"messages\[1\]\.content' is empty"),
    ],
)
def test_a_message_that_cannot_be_used_is_refused_with_its_number(entry, flaw):
    with pytest.raises(RowFlaw, match=f"^field '{flaw}"):
        parse("messages", {"messages": [QUESTION, entry, ANSWER]})


@pytest.mark.parametrize(
    ("entry", "flaw"),
    [
        (7, r"conversations\[1\]' must be a message with from and value, got 7"),
        ({"from": "bot", "value": "x"}, r"conversations\[1\]\.from' must be one of system, human, .*, got 'bot'"),
        ({"from": "gpt", "value": 1}, r"conversations\[1\]\.value' must be text, got 1"),
        ({"from": "gpt", "value": ""}, r"conversations\[1\]\.value' is empty"),
        (message("user", "x"), r"conversations\[1\]\.from' is missing; there are 'role', 'content'"),
    ],
)
def test_a_turn_that_cannot_be_used_is_refused_with_its_number(entry, flaw):
    with pytest.raises(RowFlaw, match=f"^field '{flaw}"):
        parse("sharegpt", {"conversations": [SHAREGPT["conversations"][0], entry]})


@pytest.mark.parametrize(
    ("tools", "flaw"),
    [
        ("{", r"must be a list of JSON schemas, and cannot be read as JSON"),
        (
            '[{"name": "a", "name": "b"}]',
            r"must be .* cannot be read as JSON: the key 'name' stands twice in one object",
        ),
        (["add"], r"must be a list of JSON schemas, got \['add'\]"),
        ({"name": "add"}, r"must be a list of JSON schemas, got \{'name': 'add'\}"),
        (3, r"must be a list of JSON schemas, got 3"),
    ],
)
def test_tools_that_are_no_list_of_schemas_are_refused(tools, flaw):
    with pytest.raises(RowFlaw, match=f"^field 'tools' {flaw}"):
        parse("messages", {**MESSAGES, "tools": tools})


def test_a_key_that_stands_twice_in_the_arguments_of_a_call_is_refused():
    call = {"name": "add", "arguments": '{"a": 1, "a": 2}'}
    with pytest.raises(RowFlaw, match=r"arguments' cannot be read as JSON: the key 'a' stands twice in one object"):
        parse("messages", {"messages": [QUESTION, {"role": "assistant", "tool_calls": [call]}]})


def test_a_system_text_that_is_no_text_is_refused():
    with pytest.raises(RowFlaw, match=r"^field 'system' must be text, got 7"):
        parse("sharegpt", {**SHAREGPT, "system": 7})


def test_a_long_value_is_shown_by_its_beginning():
    with pytest.raises(RowFlaw) as caught:
        parse("text", {"text": ["x" * 1000]})
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(
    ("sender", "role"),
    [
        ("system", "system"),
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("assistant", "assistant"),
        ("model", "assistant"),
        ("tool", "tool"),
        ("observation", "tool"),
    ],
)
def test_senders_of_sharegpt_have_a_role_each(sender, role):
    turns = [{"from": sender, "value": "x"}, {"from": "gpt", "value": "y"}]
    assert parse("sharegpt", {"conversations": turns}).messages == [message(role, "x"), message("assistant", "y")]


def test_sharegpt_rows_may_have_the_system_text_in_a_column():
    sample = parse("sharegpt", {**SHAREGPT, "system": "Be brief."})
    assert sample.messages == [message("system", "Be brief."), QUESTION, ANSWER]


def test_the_system_column_is_kept_for_conversations_with_role_and_content_too():
    sample = parse("sharegpt", {"conversations": [QUESTION, ANSWER], "system": "Be brief."})
    assert sample.messages == [message("system", "Be brief."), QUESTION, ANSWER]


def test_conversations_with_role_and_content_are_read_as_messages():
    assert parse("sharegpt", {"conversations": [QUESTION, ANSWER]}) == Chat([QUESTION, ANSWER])


@pytest.mark.parametrize(("num_after", "after"), [(0, []), (1, [QUESTION]), (2, [QUESTION, message("tool", "x")])])
def test_messages_after_the_last_answer_are_left_out_and_counted(num_after, after):
    assert parse("messages", {"messages": [QUESTION, ANSWER, *after]}) == Chat([QUESTION, ANSWER], None, num_after)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": "I add."}])
def test_an_answer_may_be_a_call_of_a_tool_with_or_without_text(content):
    calling = {"role": "assistant", "tool_calls": [CALL], **content}
    sample = parse("messages", {"messages": [QUESTION, calling, message("tool", "3", tool_call_id="1"), ANSWER]})
    text = {name: value for name, value in content.items() if value}
    assert sample.messages[1] == {"role": "assistant", "tool_calls": [CALL], **text}
    assert sample.messages[2] == message("tool", "3", tool_call_id="1")


@pytest.mark.parametrize("calls", [None, []])
def test_columns_that_a_table_fills_up_with_nothing_are_no_part_of_a_message(calls):
    filled = [{**entry, "tool_calls": calls, "name": None, "weight": None} for entry in (QUESTION, ANSWER)]
    filled[1]["weight"] = 1
    assert parse("messages", {"messages": filled, "tools": None}) == Chat([QUESTION, ANSWER])


@pytest.mark.parametrize("written", [lambda tools: tools, json.dumps])
def test_tools_are_a_list_or_its_json(written):
    schemas = [{"type": "function", "function": {"name": "add"}}]
    assert parse("messages", {**MESSAGES, "tools": written(schemas)}).tools == schemas


@pytest.mark.parametrize("tools", [None, "", " ", [], "[]", "null"])
def test_no_tools_are_none(tools):
    assert parse("messages", {**MESSAGES, "tools": tools}).tools is None


def test_rows_of_two_formats_in_turn_are_named():
    alpaca, chat = {"instruction": "i", "output": "o"}, {"messages": [QUESTION, ANSWER]}
    with pytest.raises(
        ValueError, match="mixed: row 1 is written as alpaca, row 2 as messages: give rows of each format"
    ):
        tell_format([alpaca, chat, alpaca], "mixed", {})
    assert tell_format([alpaca, {"instruction": "i"}, alpaca], "one has no answer", {}) == "alpaca"
    assert tell_format([{**alpaca, **chat}, chat], "one is both", {}) == "messages"
