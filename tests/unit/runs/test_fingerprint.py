"""The fingerprint of a run: its names on disk, and what it says of differences."""

import json
from pathlib import Path

import pytest
from support.tiny_run import some_fingerprint

from dora_dist.runs.fingerprint import Fingerprint

RUN = Path("runs/x/run.json")


@pytest.mark.parametrize("labels", [None, ["no", "yes"], "regression"])
def test_what_is_written_is_read_back(labels):
    written = some_fingerprint(labels=labels, others={"adalora.beta1": 0.85})
    assert Fingerprint.from_dict(json.loads(json.dumps(written.as_dict())), RUN) == written


def test_settings_have_the_names_that_a_user_knows():
    names = some_fingerprint(labels=["no", "yes"]).as_dict()
    assert {"optimizer steps", "global batch", "distributed.engine", "data.batching", "model.path"} <= names.keys()
    assert {
        "adapter.target_modules",
        "pruning.smoothing",
        "training.learning_rate",
        "examples of train",
    } <= names.keys()


def test_a_setting_of_another_version_is_kept_and_is_a_difference():
    later = Fingerprint.from_dict({**some_fingerprint().as_dict(), "new.key": 3}, RUN)
    assert later.others == {"new.key": 3}
    assert later.differences(some_fingerprint()) == ["new.key was 3 and is now None"]


def test_a_setting_of_a_section_that_only_one_version_has_is_a_difference():
    earlier, now = some_fingerprint(pruning={}), some_fingerprint(pruning={"smoothing": 0.9})
    assert earlier.differences(now) == ["pruning.smoothing was None and is now 0.9"]


def test_other_weights_of_the_base_are_a_difference_where_both_are_known():
    unknown, first, second = (some_fingerprint(weights=weights) for weights in (None, "1 files, ab", "1 files, cd"))
    assert first.differences(second) == ["weights of model.path was '1 files, ab' and is now '1 files, cd'"]
    assert unknown.differences(first) == first.differences(unknown) == first.differences(first) == []
    assert Fingerprint.from_dict(first.as_dict(), RUN) == first


def test_a_damaged_record_is_refused_with_the_setting_that_is_missing():
    settings = some_fingerprint().as_dict()
    del settings["global batch"]
    with pytest.raises(ValueError, match=r"runs/x/run.json lacks the setting 'global batch'"):
        Fingerprint.from_dict(settings, RUN)


MEASURED = {"held_out": {"dev": "10, 0123"}, "evaluation": {"max_examples": None, "num_beams": 1}}


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"held_out": {"dev": "10, 4567"}}, "data.eval: examples of dev was '10, 0123' and is now '10, 4567'"),
        ({"held_out": {}, "evaluation": {}}, "data.eval: examples of dev was '10, 0123' and is now None"),
        (
            {"held_out": {"dev": "10, 0123", "more": "2, 89"}},
            "data.eval: examples of more was None and is now '2, 89'",
        ),
        ({"evaluation": {"max_examples": 4, "num_beams": 1}}, "evaluation.max_examples was None and is now 4"),
    ],
)
def test_what_is_measured_stays_the_same(changes, difference):
    before, now = some_fingerprint(**MEASURED), some_fingerprint(**{**MEASURED, **changes})
    read_back = Fingerprint.from_dict(json.loads(json.dumps(before.as_dict())), RUN)
    assert difference in read_back.differences(now)
    assert read_back.differences(before) == []


def test_held_out_data_may_come_to_a_run_that_had_none_or_did_not_record_it():
    assert some_fingerprint().differences(some_fingerprint(**MEASURED)) == []
