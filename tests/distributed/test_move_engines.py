"""Components that move between layers under the real engines, and scores by ablation on several ranks."""

import pytest
import torch
from support.rank_functions import move_under_engine, score_by_ablation
from support.ranks import run_ranks
from support.tiny_models import tiny_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("engine", ["none", "ddp", "zero2", "zero2 in bfloat16"])
def test_a_component_starts_anew_in_parameters_master_copies_and_moments(engine, model_folder):
    outcomes = run_ranks(move_under_engine, 1 if engine == "none" else 2, engine, str(model_folder))
    assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
    for seen in (outcome.value for outcome in outcomes):
        first, last = seen["first and last"]
        assert seen["masks"][first].tolist() == [True, False, False, True]
        assert seen["masks"][last].tolist() == [True, True, True, True]
        assert all(torch.equal(seen["masks"][name], mask) for name, mask in seen["wanted"].items())
        # The function is that without the component that went: the one that came changes nothing.
        assert torch.equal(seen["output before"], seen["output after"])
        assert seen["gate gone"][1] == 0
        for name, place, start in (("lora_b", (slice(None), 2), 0.0), ("gate", (2,), 1.0)):
            assert (seen[name][place] == start).all()
            assert (seen[f"{name} master"][place] == start).all()
        new = seen["lora_a master"][2]
        assert not torch.equal(new, seen["master before"][2])
        assert 0 < new.abs().max() <= new.numel() ** -0.5
        assert torch.equal(seen["lora_a"][2], new.to(seen["lora_a"].dtype))
        for name, place in (("lora_a", 2), ("lora_b", (slice(None), 2)), ("gate", 2)):
            for moment in seen[f"{name} moments"]:
                assert (moment[place] == 0).all()
                moment[place] = 1
                assert moment.any(-1).all() if name == "lora_a" else moment.ne(0).any(0).all()
        # The others keep what they had, and the new one trains.
        assert torch.equal(seen["lora_a"][[0, 1, 3]], seen["before"][[0, 1, 3]])
        assert seen["trained"][:, 2].abs().max() > 0
        for key in ("lora_a", "lora_b", "trained"):
            assert torch.equal(seen[key], outcomes[0].value[key])


def test_a_component_starts_anew_where_gates_are_not_trained(model_folder):
    """Such a gate belongs to no group of the optimizer, so that ZeRO has linked nothing to it."""
    outcomes = run_ranks(move_under_engine, 2, "zero2", str(model_folder), False)
    assert [outcome.error for outcome in outcomes] == [None, None]
    for seen in (outcome.value for outcome in outcomes):
        assert all(torch.equal(seen["masks"][name], mask) for name, mask in seen["wanted"].items())
        assert torch.equal(seen["output before"], seen["output after"])
        assert seen["gate"][2] == 1
        for name, place in (("lora_a", 2), ("lora_b", (slice(None), 2))):
            assert all((moment[place] == 0).all() for moment in seen[f"{name} moments"])
        assert (seen["lora_b master"][:, 2] == 0).all()
        assert seen["trained"][:, 2].abs().max() > 0
        assert torch.equal(seen["trained"], outcomes[0].value["trained"])


def test_scores_by_ablation_do_not_depend_on_the_number_of_ranks():
    alone, *several = [run_ranks(score_by_ablation, size)[0].value for size in (1, 2, 4)]
    for other in several:
        assert torch.equal(other["exact"], alone["exact"])
        torch.testing.assert_close(other["gradient"], alone["gradient"], rtol=1e-9, atol=1e-12)
    assert alone["exact"].ne(0).all()


def test_a_rank_that_cannot_score_ends_all():
    outcomes = run_ranks(score_by_ablation, 2, 1)
    for outcome in outcomes:
        assert outcome.error_type == "RankFailedError"
        assert "scoring components by ablation failed on 1 of 2 ranks: rank 1" in outcome.error
        assert "no such row" in outcome.error
