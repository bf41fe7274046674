"""What is chosen on which split, and what invented cells say together."""

from pathlib import Path

import pytest

from dora_dist.planted.experiment import choice_of, initial_rank, missing_students, summarize
from dora_dist.planted.options import build_parser, resolve

LAYERS = {"a": 10, "b": 20, "c": 30}
PLANTED = [0, 4, 2]
KEPT = {"uniform": [2, 2, 2], "frobenius": [3, 1, 2], "oracle": PLANTED}
SEARCH = {"uniform": (0.5, 0.4, 0.6), "frobenius": (0.3, 0.6, 0.7), "oracle": (0.2, 0.1, 0.3)}
REPORTED = {"uniform": (0.6, 0.8), "frobenius": (0.5, 0.4), "oracle": (0.2, 0.2)}
RATES = (0.01, 0.02, 0.04)


def options(*arguments):
    fixed = ["--patterns", "half", "--seeds", "2", "--learning-rates", *map(str, RATES)]
    return resolve(build_parser().parse_args([*fixed, "--methods", *KEPT, "--output", "x.json", *arguments]))


def cell(method, rate, seed, search, reported):
    seen = {"score": [0.6, 0.2, 0.4], "update_norm": [0.0, 1.0, 1.0]} if method == "frobenius" else {}
    return {
        "pattern": "half",
        "method": method,
        "learning_rate": rate,
        "seed": seed,
        "divergence": {"search": search, "reported": reported},
        "kept": KEPT[method],
        "at_final_event": seen,
    }


@pytest.fixture
def result():
    cells = []
    for method, searched in SEARCH.items():
        best = RATES[searched.index(min(searched))]
        for rate, search in zip(RATES, searched, strict=True):
            # By the reported split, every method would rather have the last rate.
            cells.append(cell(method, rate, 0, search, REPORTED[method][0] if rate == best else 0.01))
        cells.append(cell(method, best, 1, 9.0, REPORTED[method][1]))
    truths = [{"pattern": "half", "seed": seed, "planted": PLANTED} for seed in (0, 1)]
    return {"layers": LAYERS, "truths": truths, "cells": cells}


def test_learning_rates_are_chosen_on_the_search_split_of_the_search_seeds(result):
    chosen = [choice_of(result, "half", method, options()).learning_rate for method in KEPT]
    assert chosen == [0.02, 0.01, 0.02]


def test_only_students_that_the_result_lacks_are_missing(result):
    assert missing_students(options(), result, 0) == missing_students(options(), result, 1) == {}
    lost = [one for one in result["cells"] if (one["method"], one["seed"]) == ("oracle", 1)]
    result["cells"] = [one for one in result["cells"] if one not in lost]
    # A seed that is not searched has one cell a method, at the rate that was chosen.
    assert missing_students(options(), result, 1) == {"half": [("oracle", 0.02)]}
    searched = missing_students(options("--patterns", "half", "one-kind"), result, 0)
    assert searched == {"one-kind": [(method, rate) for method in KEPT for rate in RATES]}


def test_a_summary_by_hand(result):
    rows = {row["method"]: row for row in summarize(options(), result)}
    assert rows["uniform"]["divergence"]["mean"] == pytest.approx(0.7)
    assert rows["uniform"]["to_uniform"] is None
    found = rows["frobenius"]
    assert found["divergence"]["mean"] == pytest.approx(0.45)
    assert found["to_uniform"]["mean"] == pytest.approx(-0.25)
    assert found["share_of_oracle_gain"] == pytest.approx((1.4 - 0.9) / (1.4 - 0.4))
    assert rows["oracle"]["share_of_oracle_gain"] == pytest.approx(1)
    assert {method for method, row in rows.items() if row["rate_at_edge"]} == {"frobenius"}
    # min(kept, planted): 0 + 1 + 2 of 6; layer a needs nothing and has 3 of 6.
    assert found["overlap"]["mean"] == pytest.approx(3 / 6)
    assert found["idle_share"]["mean"] == pytest.approx(3 / 6)
    assert found["correlation"]["mean"] == pytest.approx(-1)
    assert rows["uniform"]["correlation"] is None
    assert found["parameters"]["mean"] == 3 * 10 + 1 * 20 + 2 * 30
    scores = found["at_final_event"]["score"]
    assert scores["idle"]["mean"] == pytest.approx(0.6)
    assert scores["planted"]["mean"] == pytest.approx(0.3)


def test_no_gain_where_the_oracle_has_none(result):
    for one in result["cells"]:
        one["divergence"]["reported"] = 0.5
    assert {row["share_of_oracle_gain"] for row in summarize(options(), result)} == {None}


def test_students_can_reach_every_planted_rank():
    assert initial_rank({"a": 0, "b": 3}, target_rank=2) == 4
    assert initial_rank({"a": 0, "b": 14}, target_rank=2) == 14


def test_the_settings_of_a_result_name_no_path_of_a_machine(tmp_path):
    (tmp_path / "config.json").touch()
    assert options("--model", str(tmp_path)).settings()["model"] == Path(tmp_path).name
