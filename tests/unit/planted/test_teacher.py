"""The teacher differs from its base by what was planted, and by nothing else."""

import pytest
import torch

from dora_dist.adapter.targets import resolve_targets
from dora_dist.planted.patterns import planted_ranks
from dora_dist.planted.teacher import load_base, plant, sample_rows


@pytest.fixture(scope="module")
def base():
    return load_base(None, seed=0)


def difference(teacher, base, name):
    return (teacher.get_submodule(name).weight - base.get_submodule(name).weight).double()


@pytest.mark.parametrize("decay", [False, True])
def test_updates_have_exactly_their_rank_and_norm(base, decay):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    ranks = planted_ranks("varied", resolve_targets(base, "all-linear"), 3, seed=1)
    teacher, norms = plant(base, ranks, strength=0.2, decay=decay, seed=1)
    for name, rank in ranks.items():
        update = difference(teacher, base, name)
        weight = base.get_submodule(name).weight.double()
        values = torch.linalg.svdvals(update)
        if not rank:
            assert torch.equal(teacher.get_submodule(name).weight, base.get_submodule(name).weight)
            assert norms[name] == 0
            continue
        # What float32 rounding adds is seven digits below.
        assert (values > 1e-5 * values[0]).sum() == rank
        shape = 1 / torch.arange(1, rank + 1) if decay else torch.ones(rank)
        torch.testing.assert_close(values[:rank] / values[0], shape.double(), rtol=1e-4, atol=0)
        assert float(update.norm() / weight.norm()) == pytest.approx(0.2 * rank**0.5, rel=1e-4)
        assert norms[name] == pytest.approx(0.2 * rank**0.5, rel=1e-4)
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name]), "planting has changed the base"
    adapted = {f"{name}.weight" for name in ranks}
    for name, value in teacher.state_dict().items():
        assert name in adapted or torch.equal(value, before[name]), f"{name} differs, but no rank was planted"


def test_directions_depend_on_seed_and_layer(base):
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    first, again, other = (plant(base, dict.fromkeys(names, 2), 0.2, False, seed)[0] for seed in (1, 1, 2))
    one = difference(first, base, names[0])
    assert torch.equal(one, difference(again, base, names[0]))
    for different in (difference(other, base, names[0]), difference(first, base, names[1])):
        cosine = (one * different).sum() / (one.norm() * different.norm())
        assert abs(cosine) < 0.2


def test_a_rank_that_does_not_fit_is_refused(base):
    name = "model.layers.0.self_attn.k_proj"
    with pytest.raises(ValueError, match=rf"planted rank 33 does not fit into {name}.*--target-rank"):
        plant(base, {name: 33}, 0.2, False, seed=0)


def test_text_is_the_bases_own_and_repeats(base):
    rows = sample_rows(base, count=600, length=6, seed=0)
    assert rows.shape == (600, 6)
    assert torch.equal(rows, sample_rows(base, count=600, length=6, seed=0))
    assert not torch.equal(rows, sample_rows(base, count=600, length=6, seed=1))
    # With the cache as without: the base finds its own text likelier than shuffled tokens.
    with torch.no_grad():
        own = base(input_ids=rows, labels=rows).loss
        shuffled = rows[:, torch.randperm(6, generator=torch.Generator().manual_seed(0))]
        assert own < base(input_ids=shuffled, labels=shuffled).loss - 0.5


def test_every_layer_of_the_random_base_matters(base):
    """A base whose output does not see a layer has no truth to recover there."""
    names = resolve_targets(base, "all-linear")
    rows = sample_rows(base, count=32, length=16, seed=0)
    with torch.no_grad():
        plain = base(input_ids=rows).logits.log_softmax(-1)
        for name in names:
            changed = plant(base, {name: 4}, 0.2, False, seed=0)[0](input_ids=rows).logits.log_softmax(-1)
            assert (plain.exp() * (plain - changed)).sum(-1).mean() > 1e-3, name
