"""Components that are granted to a layer, and reserves, under the real engines."""

import pytest
import torch
from support.rank_functions import grow_under_engine
from support.ranks import run_ranks
from support.tiny_models import tiny_model

from dora_dist.training.rules.grow import RESERVE_GATE


@pytest.mark.parametrize("engine", ["none", "ddp", "zero2", "zero2 in bfloat16"])
def test_a_grant_changes_nothing_and_what_is_new_learns_slowly(engine, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    outcomes = run_ranks(grow_under_engine, 1 if engine == "none" else 2, engine, str(tmp_path))
    assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
    looked_at = dict.fromkeys(("lora_a", "lora_b", "gate", "other gate"), 0)
    for seen in (outcome.value for outcome in outcomes):
        before, granted, later = (seen[key] for key in ("before", "granted", "a step later"))
        # Not the function, nor what an engine keeps, but for the gate in the slot of the new reserve.
        assert torch.equal(seen["output before"], seen["output after"])
        for name, value in granted.items():
            change = value != before[name]
            assert change.nonzero().tolist() == ([[2]] if name in ("gate", "gate master") else [])
        waiting = torch.tensor(RESERVE_GATE).to(granted["gate"].dtype).float()
        for name, place in (("gate", 1), ("other gate", 1), ("gate", 2)):
            assert granted[name][place].float() == granted[f"{name} master"][place] == waiting
        assert before["lora_b master"][:, 1].ne(0).all()
        # The gate of what was granted is free, those of reserves are not.
        assert later["gate master"][1] != granted["gate master"][1]
        assert later["gate master"][2] == granted["gate master"][2]
        assert later["other gate"][1] == granted["other gate"][1]
        assert later["other gate exp_avg"][1] != 0
        for name, (start, raw) in seen["raw"].items():
            share = torch.tensor([1.0, 1.0, 1.0, 1.0] if name == "other gate" else [1.0, 0.25, 1.0, 1.0])
            if "gate" in name:
                share[1 if name == "other gate" else 2] = 0
            whole = (share[:, None] if name == "lora_a" else share).expand_as(before[name]).flatten()
            share = whole[start : start + len(raw)]
            old, new = (state[f"{name} master"].flatten()[start : start + len(raw)] for state in (granted, later))
            torch.testing.assert_close(new, old + share * (raw - old), rtol=1e-6, atol=1e-9)
            assert torch.equal(new[share == 0], old[share == 0])
            assert torch.equal(new[share == 1], raw[share == 1])
            looked_at[name] += len(raw)
        for name in looked_at:
            assert torch.equal(later[name], later[f"{name} master"].to(later[name].dtype))
            assert torch.equal(later[name], outcomes[0].value["a step later"][name])
    assert all(count >= granted[name].numel() for name, count in looked_at.items())
