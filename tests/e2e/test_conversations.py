"""Options of conversations, from the configuration through a run to what is asked afterwards."""

import json

import pytest
from support.forked_run import run_forked, run_to_the_end
from support.tiny_run import write_config
from transformers import AutoTokenizer

pytestmark = pytest.mark.full("data")

TEMPLATE = (
    "{% for m in messages %}### {{ m.role }} : {{ mood | default('w0') }} "
    "{% if m.role == 'assistant' %}{% if m.reasoning_content %}<think> {{ m.reasoning_content }} </think> {% endif %}"
    "{{ m.content }} </s> {% else %}{{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### assistant : {{ mood | default('w0') }} {% endif %}"
)


def test_a_run_and_generate_render_conversations_alike_and_thoughts_have_no_loss(tmp_path):
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "w1 w2"}]},
        {"role": "assistant", "content": "w3", "train": False},
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5 w6", "reasoning_content": "w7 w8"},
    ]
    (tmp_path / "talk.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 40)
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    data = {
        "train": str(tmp_path / "talk.jsonl"),
        "eval": None,
        "chat_template": str(tmp_path / "own.jinja"),
        "chat_template_kwargs": {"mood": "w9"},
        "train_on_thoughts": False,
    }
    config = write_config(tmp_path, data=data, training={"max_steps": 12, "save_steps": 12})
    shown = run_forked("preview", str(config), "--examples", "1", "--color", "never")
    assert shown.status == 0, shown.output
    assert "3 trained" in shown.output, "w5, w6 and the end"
    run_to_the_end(config, tmp_path / "run", tmp_path / "log", ranks=1, engine="none")
    template = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter").get_chat_template()
    assert template.startswith('{% if mood is not defined %}{% set mood = "w9" %}{% endif %}')
    answered = run_forked("generate", str(tmp_path / "run"), "--prompt", "w4", "--max-new-tokens", "2")
    assert answered.status == 0, answered.output
    assert "### user : w9 w4 ### assistant : w9" in answered.output
