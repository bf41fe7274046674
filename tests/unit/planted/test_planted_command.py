"""``python -m dora_dist.planted`` as a command, tiny."""

import json

import pytest
from support.forked_run import run_forked

PNG = b"\x89PNG"
TINY = "--steps 12 --interval 2 --batch 2 --length 4 --held-out 4 --target-rank 1 --patterns half".split()


def planted(*arguments):
    return run_forked("planted", *arguments, timeout=200)


@pytest.mark.full("benchmark")
def test_the_command_ends_with_all_figures_goes_on_and_refuses_other_settings(tmp_path):
    output = tmp_path / "planted.json"
    fixed = [*TINY, "--learning-rates", "0.01", "0.03", "--output", output]
    done = planted(*fixed, "--seeds", 1, "--methods", "uniform", "frobenius", "oracle")
    assert done.status == 0, done.output
    result = json.loads(output.read_text())
    assert len(result["cells"]) == 3 * 2
    budget = len(result["layers"])
    assert {sum(cell["kept"]) for cell in result["cells"]} == {budget}
    (truth,) = result["truths"]
    assert sum(truth["planted"]) == budget
    assert truth["base_divergence"] > 0
    rows = {row["method"]: row for row in result["rows"]}
    assert rows["oracle"]["overlap"]["mean"] == 1
    assert rows["oracle"]["idle_share"]["mean"] == 0
    assert rows["uniform"]["correlation"] is None
    assert set(rows["frobenius"]["at_final_event"]["score"]) == {"idle", "planted"}
    assert output.with_suffix(".png").read_bytes().startswith(PNG)

    more = planted(*fixed, "--seeds", 2, "--methods", "uniform", "frobenius", "oracle", "gate_sensitivity")
    assert more.status == 0, more.output
    grown = json.loads(output.read_text())
    assert grown["cells"][: len(result["cells"])] == result["cells"]
    # Seed 0 searches the new method's rate; seed 1 has one cell a method.
    assert len(grown["cells"]) == 3 * 2 + 2 + 4
    assert len(grown["sessions"]) == 2
    assert str(tmp_path) not in output.read_text()
    assert {row["divergence"]["number"] for row in grown["rows"]} == {2}
    for cell in grown["cells"]:
        if "score" in cell["at_final_event"]:
            assert any(score > 0 for score in cell["at_final_event"]["score"])

    other = planted(*fixed, "--seeds", 1, "--strength", 0.3)
    assert other.status == 2
    assert "whose strength is 0.2 and not 0.3" in other.output
    assert json.loads(output.read_text()) == grown


@pytest.mark.parametrize(
    "arguments",
    [
        "--target-rank 1 --methods uniform grow",
        "--patterns none",
        "--methods frobenius",
        "--search-seeds 9",
        "--steps 0",
        "--strength -1",
        "--model nowhere",
    ],
)
def test_what_cannot_be_ends_with_a_message_and_status_2(arguments, tmp_path):
    done = planted(*arguments.split(), "--output", tmp_path / "planted.json")
    assert done.status == 2
    assert done.output.startswith(f"error: {arguments.split()[0]}")
    assert not (tmp_path / "planted.json").exists()


@pytest.mark.full("benchmark")
def test_rules_are_methods_too(tmp_path):
    tiny = "--steps 24 --interval 2 --batch 2 --length 4 --held-out 4 --patterns half --seeds 1 --learning-rates 0.02"
    output = tmp_path / "planted.json"
    done = planted(*tiny.split(), "--methods", "uniform", "move", "grow", "--output", output)
    assert done.status == 0, done.output
    result = json.loads(output.read_text())
    assert {sum(cell["kept"]) for cell in result["cells"]} == {2 * len(result["layers"])}
    for cell in result["cells"][1:]:
        assert cell["method"] in ("move", "grow")
        assert len(set(cell["kept"])) > 1
        assert any(cell["at_final_event"]["score"])
    assert output.with_suffix(".png").read_bytes().startswith(PNG)
