"""What has no loss in a conversation: messages that say so, and thoughts; content parts; options of the template."""

import itertools
import json

import pytest
from support.byte_tokenizer import byte_tokenizer

from dora_dist.data.encoding.chat import choose_template
from dora_dist.data.encoding.encoder import EncodingRules, Status
from dora_dist.data.encoding.template_options import with_options
from dora_dist.data.row_formats import build_encoder

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The shape of Qwen 3's: thoughts of the last answer only, an empty one where it has none, and a switch.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set said = (m.content or '').split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.reasoning_content or (m.content or '').split('</think>')[0].split('<think>')[-1] "
    "if m.reasoning_content or '</think>' in (m.content or '') else '' %}"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def user(text, **more):
    return {"role": "user", "content": text, **more}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


TALK = [user("q1"), answer("a1"), user("q2"), answer("a2")]


def encode(template, messages, **rules):
    tokenizer = byte_tokenizer("chatml")
    encoder = build_encoder(tokenizer, EncodingRules(format="messages", template=template, bad_rows="skip", **rules))
    columns = encoder(
        {"place": ["chat.jsonl, line 7"], "json": [json.dumps({"messages": messages})], "flaw": [""], "filled": [False]}
    )
    return tokenizer, columns


def marked(template, messages, **rules):
    """The example as text, with ``[[ ]]`` around what is trained; for several the last one."""
    tokenizer, columns = encode(template, messages, **rules)
    assert columns["status"][-1] == Status.KEPT, columns["note"]
    ids, spans = columns["input_ids"][-1], columns["spans"][-1]
    parts = [tokenizer.decode(ids[start:end]) for start, end in itertools.pairwise([0, *spans, len(ids)])]
    return "".join(f"[[{part}]]" if number % 2 else part for number, part in enumerate(parts))


def flaw(template, messages, **rules):
    _, columns = encode(template, messages, **rules)
    assert columns["status"] == [Status.BAD]
    return columns["note"][0]


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}, {"weight": 1, "train": False}])
def test_an_answer_that_is_marked_has_no_loss_in_any_mode(mark):
    messages = [user("q1"), answer("a1", **mark), user("q2"), answer("a2", weight=1)]
    last = (
        turn("user", "q1") + turn("assistant", "a1") + turn("user", "q2") + "<|im_start|>assistant\n[[a2<|im_end|>]]\n"
    )
    assert marked(PLAIN, messages) == last
    assert marked(PLAIN, messages, train_on="last") == last
    assert marked(PLAIN, messages, train_on="everything") == (
        f"[[{turn('user', 'q1')}<|im_start|>assistant\n]]a1<|im_end|>[[\n"
        f"{turn('user', 'q2')}{turn('assistant', 'a2')}]]"
    ).replace("<|im_end|>[[\n", "<|im_end|>\n[[")


def test_a_last_answer_that_is_marked_makes_the_one_before_it_the_last():
    messages = [*TALK[:3], answer("wrong", train=False)]
    assert marked(PLAIN, messages, train_on="last") == turn("user", "q1") + "<|im_start|>assistant\n[[a1<|im_end|>]]\n"


def test_a_message_of_another_role_loses_its_loss_where_everything_has_one():
    """Its text stands in the answer too, which keeps its loss."""
    messages = [user("secret", weight=0), answer("secret")]
    assert marked(PLAIN, messages, train_on="everything") == (
        f"[[<|im_start|>user\n]]secret[[<|im_end|>\n{turn('assistant', 'secret')}]]"
    )
    assert marked(PLAIN, messages) == turn("user", "secret") + "<|im_start|>assistant\n[[secret<|im_end|>]]\n"


@pytest.mark.parametrize(("train_on", "told"), [("assistant", "train of the role user"), ("everything", "")])
def test_a_mark_adds_no_loss_and_is_told_of_where_it_does_nothing(train_on, told):
    messages = [user("q1", train=True), answer("a1", train=True)]
    without = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    assert marked(PLAIN, messages, train_on=train_on) == marked(PLAIN, without, train_on=train_on)
    assert encode(PLAIN, messages, train_on=train_on)[1]["unread"] == [told]


@pytest.mark.parametrize("value", [0.5, 2, "false", [0]])
@pytest.mark.parametrize("number", [0, 1])
def test_other_marks_are_refused_in_messages_of_every_role(number, value):
    messages = [dict(message) for message in TALK[:2]]
    messages[number]["weight"] = value
    wanted = f"field 'messages[{number}].weight' must be 0 or 1, true or false, got {value!r}"
    assert flaw(PLAIN, messages) == wanted


@pytest.mark.parametrize(
    "spoken",
    [
        answer("four", reasoning_content="two and two make four"),
        answer("<think>\ntwo and two make four\n</think>\n\nfour"),
        answer("<think>two and two make four</think>four"),
    ],
)
def test_thoughts_have_no_loss_where_the_run_leaves_them_out(spoken):
    """The answer's own word stands in the thought and in the question."""
    messages = [user("is it four?"), answer("yes"), user("2 + 2?"), spoken]
    text = marked(THINKING, messages, thoughts=False)
    assert text.endswith("<|im_start|>assistant\n<think>\ntwo and two make four\n</think>\n\n[[four<|im_end|>]]\n") or (
        text.endswith("\n\ntwo and two make four\n\n</think>\n\n[[four<|im_end|>]]\n")
    )
    assert text.count("[[") == 1
    assert "[[<think>" in marked(THINKING, messages)
    tokenizer, columns = encode(THINKING, messages, thoughts=False)
    asked = tokenizer.decode(columns["input_ids"][-1][: columns["answer_start"][-1]])
    assert asked.endswith("<|im_start|>assistant\n"), "evaluation asks where generation begins, before the thought"


def test_the_empty_thought_that_a_template_writes_has_no_loss_either():
    """It would teach the model not to think."""
    assert marked(THINKING, TALK[:2], thoughts=False) == (
        turn("user", "q1") + "<|im_start|>assistant\n<think>\n\n</think>\n\n[[a1<|im_end|>]]\n"
    )


def test_calls_after_a_thought_keep_their_loss():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [user("q"), answer(None, reasoning_content="t", tool_calls=[call])]
    text = marked(THINKING, messages, thoughts=False)
    assert text.endswith('<think>\nt\n</think>\n\n[[<call>f {"x": 1}<|im_end|>]]\n')


def test_thoughts_of_all_answers_have_no_loss_where_everything_is_trained():
    keeping = PLAIN.replace(
        "{{ m.content }}", "{% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}{{ m.content }}"
    )
    messages = [user("q1"), answer("a1", thinking="t1"), user("q2"), answer("a2", thinking="t2")]
    assert marked(keeping, messages, train_on="everything", thoughts=False) == (
        f"[[{turn('user', 'q1')}<|im_start|>assistant\n]]<think>t1</think>[[a1<|im_end|>\n"
        f"{turn('user', 'q2')}<|im_start|>assistant\n]]<think>t2</think>[[a2<|im_end|>\n]]"
    )


@pytest.mark.parametrize(
    ("said", "rules", "message"),
    [
        ("<think>t", {}, "begins a thought with <think> and does not end it"),
        ("<think>t</think>\n", {}, "is nothing but a thought, which has no loss under data.train_on_thoughts: false"),
    ],
)
def test_thoughts_that_cannot_be_left_out_are_refused(said, rules, message):
    assert message in flaw(PLAIN, [user("q"), answer(said)], thoughts=False, **rules)


def test_thoughts_in_plain_text_are_refused_where_they_are_to_be_left_out():
    rules = EncodingRules(format="prompt_completion", thoughts=False)
    encoder = build_encoder(byte_tokenizer("chatml"), rules)
    row = json.dumps({"prompt": "q", "completion": "<think>t</think>a"})
    with pytest.raises(
        ValueError, match=r"here: field 'completion' holds <think>, but data\.train_on_thoughts is false"
    ):
        encoder({"place": ["here"], "json": [row], "flaw": [""], "filled": [False]})


LISTS = PLAIN.replace("{{ m.content }}", "{% if m.content is string %}{{ m.content }}{% else %}{{ LOOP }}{% endif %}")


@pytest.mark.parametrize(
    ("template", "joined"),
    [
        (PLAIN, "one\ntwo"),
        (LISTS.replace("{{ LOOP }}", "{% for p in m.content %}{{ p.text }}{% endfor %}"), "onetwo"),
        (LISTS.replace("{{ LOOP }}", "{{ m.content | map(attribute='text') | join(' ') }}"), "one two"),
    ],
    ids=["the template reads texts only", "the template joins them", "the template joins them by spaces"],
)
def test_content_parts_of_text_are_joined_as_the_template_joins_them(template, joined):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    text = marked(template, [user(parts), answer(parts)])
    assert text == turn("user", joined) + f"<|im_start|>assistant\n[[{joined}<|im_end|>]]\n"


def test_a_control_token_that_joining_makes_is_refused():
    template = LISTS.replace("{{ LOOP }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
    parts = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    assert "holds the control token '<|im_end|>'" in flaw(template, [user(parts), answer("a")])


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, "text"])
def test_other_content_parts_are_refused(part):
    messages = [user([{"type": "text", "text": "q"}, part]), answer("a")]
    assert "field 'messages[0].content[1]' must be a part of text" in flaw(PLAIN, messages)


def test_options_are_defaults_of_the_template_that_a_caller_can_override():
    tokenizer = byte_tokenizer("chatml")
    tokenizer.chat_template = THINKING
    tokenizer.chat_template = choose_template(tokenizer, "auto", {"enable_thinking": False}).text

    def prompt(**given):
        return tokenizer.apply_chat_template([user("q")], tokenize=False, add_generation_prompt=True, **given)

    closed = "<think>\n\n</think>\n\n"
    assert prompt() == f"{turn('user', 'q')}<|im_start|>assistant\n{closed}"
    assert prompt(enable_thinking=True) == f"{turn('user', 'q')}<|im_start|>assistant\n"
    text = marked(tokenizer.chat_template, [user("q"), answer("a")])
    assert text == turn("user", "q") + f"<|im_start|>assistant\n{closed}[[a<|im_end|>]]\n", "training begins there, too"
    again = choose_template(tokenizer, "auto", {"enable_thinking": True}).text
    tokenizer.chat_template = again
    assert prompt() == f"{turn('user', 'q')}<|im_start|>assistant\n", "a later run decides anew"


@pytest.mark.parametrize("value", ['a "quote" %} }} \\ ä\n', -2.5e-07, 3, True, None, ["x", {"k": [None, False]}]])
def test_an_option_of_any_kind_reaches_the_template_as_it_is(value):
    template = with_options("\n{{ option | tojson }}", {"option": value}, [])
    tokenizer = byte_tokenizer("chatml")
    rendered = tokenizer.apply_chat_template([user("q")], chat_template=template, tokenize=False)
    assert rendered == "\n" + json.dumps(value, ensure_ascii=False), "the template's first line break is kept, too"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("enable_thinkin", r"enable_thinkin is never read by the chat template; did you mean enable_thinking\?"),
        ("messages", "messages is set by the program itself: leave it out"),
        ("eos_token", "eos_token is set by the program itself: leave it out"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        with_options(THINKING, {name: False}, ["eos_token"])


@pytest.mark.parametrize("value", ["true", "false", "False", "yes", "NO", "on", "off", "none", " false "])
def test_a_text_that_is_meant_as_true_false_or_null_is_refused(value):
    """Every text is true to a template."""
    with pytest.raises(
        ValueError, match=r"kwargs\.enable_thinking is the text '.*', .* true: write true, false or null without"
    ):
        with_options(THINKING, {"enable_thinking": value}, [])


@pytest.mark.parametrize(
    "template",
    [
        "{% if effort == 'none' %}a{% endif %}",
        "{% if effort | default('x') not in ['none', 'high'] %}a{% endif %}",
        "{% set known = ('none', 'high') %}{% if effort in known %}a{% endif %}",
        "{{ {'none': 1}[effort] }}",
        "{% if effort %}{{ 'Reasoning: ' ~ effort }}{% endif %}",
        "{% if effort | lower == 'true' %}a{% endif %}",
        "{% if effort and effort.startswith('no') %}a{% endif %}",
        "{% set chosen = effort if effort is defined else 'high' %}{{ chosen }}",
        "{% if effort is string %}a{% endif %}",
    ],
)
@pytest.mark.parametrize("value", ["none", "no", "true"])
def test_such_a_text_is_taken_where_the_template_writes_it_or_asks_for_more_than_its_truth(template, value):
    assert with_options(template, {"effort": value}, []).endswith(template)


@pytest.mark.parametrize(
    "template",
    [
        "{% if not (effort and messages) %}a{% elif effort or messages %}b{% endif %}{{ 'off' }}",
        "{% if effort is defined and effort is false %}a{% endif %}",
        "{% if effort == false %}a{% endif %}",
        "{{ 'a' if effort | default(true) else 'off' }}{{ effort is defined }}",
        "{% if effort is not defined %}{% set effort = false %}{% endif %}{% if effort %}a{% endif %}",
        "{% set chosen = effort if effort is defined else true %}{% set on = not chosen %}{% if on %}a{% endif %}",
        "{% for m in messages if effort %}a{% endfor %}",
    ],
)
def test_such_a_text_is_refused_where_the_template_asks_for_its_truth_only(template):
    with pytest.raises(ValueError, match=r"kwargs\.effort is the text 'off', and the chat template asks only whether"):
        with_options(template, {"effort": "off"}, [])
