import html
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml
from support.byte_tokenizer import byte_tokenizer
from support.repository import REPOSITORY
from support.tiny_run import write_config, write_rows

from dora_dist.config.parse import load_config
from dora_dist.preview.__main__ import _in_colour, main
from dora_dist.preview.contents import build_preview
from dora_dist.preview.selection import ExampleSelection
from dora_dist.preview.terminal import BOLD, RESET, SHADES
from dora_dist.setup import run_data

BYTES = byte_tokenizer("chatml")


def run(capsys, *arguments) -> str:
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def write_json(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """50 training examples of 11 to 25 tokens, 12 steps of 4 rows on one process."""
    return write_config(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Three sources of several kinds and languages in bytes, 3 examples of which are longer than ``max_length``."""
    folder = tmp_path_factory.mktemp("bytes")
    chat = [
        [("user", 'Say <b>hi</b> & "bye"\nin 中文'), ("assistant", "你好\x1b[31m</script>"), ("user", "עברית")],
        [("user", "q" * 300)],
    ]
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in [*turns, ("assistant", "שלום (abc) 1")]]}
        for turns in (chat[0], chat[1], chat[1], chat[1], chat[0])
    ]
    pairs = [{"instruction": "i" * n, "output": "o" * n} for n in range(1, 31)]
    sources = [
        write_json(folder / "chat.jsonl", rows),
        {"path": write_json(folder / "pairs\u202e.jsonl", [*pairs, {"nothing": 1}]), "name": "a<b>&"},
        write_json(folder / "documents.jsonl", [{"text": "文" * n} for n in range(10, 20)]),
    ]
    path = write_config(
        folder, data={"train": sources, "max_length": 200, "overlong": "truncate", "bad_rows": "skip", "eval": None}
    )
    BYTES.save_pretrained(folder / "model")
    return path


def shown(text: str, spans: str = "⟦([^⟧]*)⟧") -> list[str]:
    return re.findall(spans, text)


def test_the_first_examples_of_the_training_with_trained_tokens_in_brackets(config, capsys):
    text = run(capsys, config, "--examples", 2, "--world-size", 2)
    rows = [json.loads(line) for line in (config.parent / "train.jsonl").read_text().splitlines()]
    titles = re.findall(r"^train, .*train.jsonl, line (\d+): (\d+) tokens, (\d+) trained .*step 1$", text, re.MULTILINE)
    assert len(titles) == 2
    assert "shown as one" not in text
    for (line, tokens, trained), run_of_tokens in zip(titles, shown(text)[1:], strict=True):
        answer = rows[int(line) - 1]["output"]
        assert run_of_tokens.replace("│", "") == f" {answer} </s>"
        assert int(trained) == len(answer.split()) + 1
        assert int(tokens) == 2 * len(answer.split()) + 9


def test_the_examples_are_those_of_the_plan(config):
    loaded = load_config(config)
    _, data = run_data.read_data(loaded)
    order = run_data.build_mixture(loaded.data, data.train, loaded.seed).plan(12, 4).examples
    expected = [data.train[0].dataset[int(index)]["place"] for index in order[:5]]
    examples = build_preview(loaded, ExampleSelection(number=5), 1).examples
    assert [example.title.split(": ")[0] for example in examples] == [f"train, {place}" for place in expected]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], "12 optimizer steps, as training.max_steps says = 0.96 epochs x 50 rows / (4 per device x 1 accumulated x "
         "1 process); computed for 1 process"),
        (
            ["--training.max_steps", "-1", "--training.num_train_epochs", "3", "--world-size", "2"],
            "19 optimizer steps = 3 epochs x 50 rows / (4 per device x 1 accumulated x 2 processes), rounded up; "
            "computed for 2 processes",
        ),
        (
            ["--training.max_steps", "-1", "--training.gradient_accumulation_steps", "5"],
            "8 optimizer steps = 3 epochs x 50 rows / (4 per device x 5 accumulated x 1 process), rounded up;",
        ),
        (["--data.batching", "packed", "--data.max_length", "64"], "rows of packed examples / ("),
        (["--training.per_device_train_batch_size", "64"], "50 training examples do not fill one global batch of 64"),
    ],
)  # fmt: skip
def test_optimizer_steps(config, capsys, overrides, sentence):
    assert sentence in run(capsys, config, *overrides).splitlines()[-1]


def test_the_number_of_processes_comes_from_the_environment(config, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "computed for 2 processes" in run(capsys, config)


def test_every_source_is_there_with_its_counts(chats, capsys):
    text = run(capsys, chats)
    assert sorted(re.findall(r"^(\S+), /.*line \d+: ", text, re.MULTILINE)) == ["a<b>&", "chat", "documents"]
    table = {line.split("  ")[0]: re.split(r"  +", line) for line in text.splitlines()}
    assert table["a<b>&"][1:4] == ["alpaca", "31", "30"]
    assert table["a<b>&"][7:] == ["0", "0", "1", "30", "66.7%"]
    assert table["chat"][1:4] == ["messages", "5", "5"]
    assert table["chat"][6:] == ["200", "3", "0", "0", "5", "11.1%"]
    assert table["together"][1:3] == ["46", "45"]
    assert "truncated 3 examples by" in text
    assert "tokens that are text only together are shown as one" in text
    assert "\u202e" not in text
    assert "\x1b" not in text


def test_lengths_are_all_in_the_histogram_with_the_limit(chats, capsys):
    text = run(capsys, chats, "--examples", 1)
    bins = re.findall(r"^ +([\d,]+)(?:-[\d,]+)?  [█▏▎▍▌▋▊▉]* ?(\d+)(  ◂ .*)?$", text, re.MULTILINE)
    assert sum(int(count) for _, count, _ in bins) == 45
    assert 5 <= len(bins) <= 12
    assert bins[-1] == ("200", "3", "  ◂ data.max_length 200")


def test_only_one_source_or_the_longest_or_truncated_ones(chats, capsys):
    text = run(capsys, chats, "--source", "chat", "--truncated")
    assert len(re.findall(r"^chat, .*truncated by \d+ tokens", text, re.MULTILINE)) == 3
    assert "documents" not in text
    assert "\ntogether " not in text
    text = run(capsys, chats, "--source", "documents", "--longest", "--examples", 1)
    assert "documents.jsonl, line 10: 58 tokens, 57 trained (98.3%)" in text
    assert "no example was truncated" in run(capsys, chats, "--source", "documents", "--truncated")


def test_held_out_sources(config, capsys):
    text = run(capsys, config, "--eval", "--examples", 2)
    assert re.findall(r"^eval, .*eval.jsonl, line (\d): ", text, re.MULTILINE) == ["1", "2"]
    assert "also trained on" in text
    assert "12 optimizer steps" in text


def test_examples_that_are_too_long_for_training_can_be_seen(chats, capsys):
    text = run(capsys, chats, "--data.overlong", "error", "--longest", "--examples", 1)
    assert re.search(r"^chat, .*tokens more than data.max_length$", text, re.MULTILINE)
    assert "3 of 45 examples are longer than data.max_length 200" in text
    assert "no optimizer step: training would stop with the error: " in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "nope"], "--source is 'nope', but data.train has chat, a<b>&, documents"),
        (["--eval"], "set data.eval"),
        (["--examples", "0"], "--examples is 0"),
        (["--world-size", "0"], "--world-size is 0"),
        (["--world-size", "2", "--distributed.engine", "none"], "set distributed.engine to zero2 or ddp"),
        (["--html", "/nonexistent/page.html"], "--html is /nonexistent/page.html"),
        (["--training.max_steps", "12.5"], "training.max_steps is 12.5, but must be a whole number"),
        (["--data.bad_rows", "error"], "line 31"),
        (["--data.evl", "x"], "did you mean data.eval?"),
    ],
)
def test_what_cannot_be_is_refused(chats, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        main([str(chats), *arguments])
    with pytest.raises(ValueError, match="there is no file"):
        main(["nowhere.yaml"])


def test_colour_says_the_same_as_brackets(chats, capsys):
    plain = run(capsys, chats, "--color", "never")
    coloured = run(capsys, chats, "--color", "always")
    trained = "".join(
        text
        for style, text in re.findall(r"(\x1b\[[\d;]*m)((?:\x1b\[1m)?[^\x1b]*)", coloured.split("\n\n", 1)[1])
        if style in SHADES[True]
    ).replace(BOLD, "")
    assert trained == "".join(shown(plain.split("\n\n", 1)[1])).replace("│", "").replace("↵\n", "")
    # No background runs over the end of a line.
    assert all(line.endswith(RESET) or "\x1b" not in line for line in coloured.splitlines())


def test_colour_is_for_terminals_and_can_be_refused(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert _in_colour("auto")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not _in_colour("auto")
    assert _in_colour("always")


class Page(HTMLParser):
    """Text of the tokens by kind, and whether tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.trained = self.text = ""
        self.tips: list[str] = []
        self.bars = 0

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        assert not {"src", "href", "onclick", "onerror"} & set(values)
        assert tag not in ("script", "img", "link", "b")
        self.bars += tag == "rect"
        if tag == "span" and "title" in values:
            self.tips.append(values["title"])
        if tag not in ("meta", "rect"):
            self.open.append((tag, values))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        classes = [values.get("class", "") for _, values in self.open]
        if "tokens" in classes:
            self.text += data
            self.trained += (
                data if any(name.startswith("trained") for name in classes) and "break" not in classes else ""
            )


def test_the_page_says_the_same(chats, capsys, tmp_path):
    text = run(capsys, chats, "--examples", 50, "--html", tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(source)
    page.close()
    assert not page.open
    assert page.trained == "".join(shown(text.split("\n\n", 1)[1])).replace("│", "").replace("↵\n", "")
    assert "你好\\x1b[31m</script>" in page.text
    assert 'Say <b>hi</b> & "bye"↵' in page.text
    assert any(re.fullmatch(r"position \d+-\d+, id \d+ \d+ \d+, .*, trained", tip) for tip in page.tips)
    assert page.bars == len(re.findall(r"^ +[\d,]+(?:-[\d,]+)?  [█▏▎▍▌▋▊▉]* ?\d+", text, re.MULTILINE))
    for line in text.split("\n\n")[-1].splitlines():
        assert f"<p>{html.escape(line)}</p>" in source
    assert "◂ data.max_length 200<" in source
    assert "://" not in source
    assert "\u202e" not in source
    assert "prefers-color-scheme: dark" in source


def test_what_libraries_print_is_not_in_the_preview(config, capsys, monkeypatch):
    read_data = run_data.read_data

    def talkative(*arguments):
        print("greetings from a library")
        return read_data(*arguments)

    monkeypatch.setattr(run_data, "read_data", talkative)
    main([str(config)])
    said = capsys.readouterr()
    assert "greetings" in said.err
    assert said.out.startswith("Training data for ")


def test_as_a_command_its_output_is_the_preview_alone(tmp_path):
    config = write_config(tmp_path)
    settings = yaml.safe_load(config.read_text())
    write_rows(tmp_path / "more.jsonl", 400, seed=3)
    settings["data"]["train"] = str(tmp_path / "more.jsonl")
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "dora_dist.preview", str(config), "--examples", "300", "--color", "always"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "RANK": "0"}
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout.readline().decode() == f"{BOLD}Training data for {tmp_path / 'model'}{RESET}\n"
        process.stdout.close()  # as head and less do
        errors = process.stderr.read().decode()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors
