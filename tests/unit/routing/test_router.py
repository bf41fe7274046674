"""The router against its formulas, and the balancing loss against its definition."""

import pytest
import torch

from dora_dist.routing.prompts import find_prompts
from dora_dist.routing.router import Router, balance_loss, decide

ROWS, LENGTH, HIDDEN, MODULES = 3, 6, 8, 7
DEVICE = torch.device("cpu")
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def router():
    router = Router(HIDDEN, MODULES, DEVICE, torch.float64)
    router.initialize(1, "router")
    with torch.no_grad():
        router.pooler.copy_(random(HIDDEN, seed=1))
    return router


@pytest.fixture
def prompts():
    return find_prompts((ROWS, LENGTH), DEVICE, MASK)


def random_probabilities(prompts=5, seed=0):
    return random(prompts, MODULES, seed=seed).softmax(1)


def nothing(_):
    """What adding up over one rank does."""


@torch.no_grad()
def test_probabilities_are_those_of_the_formula_and_sum_to_one(router, prompts):
    hidden = random(ROWS, LENGTH, HIDDEN)
    found = router(hidden, prompts)
    for row in range(ROWS):
        states = hidden[row][MASK[row].bool()]
        attention = torch.tensor([float(state @ router.pooler) for state in states], dtype=torch.float64).exp()
        pooled = sum(weight * state for weight, state in zip(attention / attention.sum(), states, strict=True))
        gelu = pooled * 0.5 * (1 + torch.erf(pooled / 2**0.5))
        logits = (router.weight @ gelu).exp()
        torch.testing.assert_close(found[row], logits / logits.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.sum(1), torch.ones(ROWS, dtype=torch.float64), rtol=1e-14, atol=0)


def test_nothing_but_the_prompt_is_read(router, prompts):
    hidden = random(ROWS, LENGTH, HIDDEN)
    expected = router(hidden, prompts)
    hidden[MASK == 0] = torch.nan
    assert torch.equal(router(hidden, prompts), expected)


def test_the_start_depends_on_seed_and_name_only_and_is_the_mean_of_the_prompt(prompts):
    routers = [Router(HIDDEN, MODULES, DEVICE, torch.float32) for _ in range(3)]
    for router, name in zip(routers, ("routers.0", "routers.0", "routers.1"), strict=True):
        torch.rand(1)
        router.initialize(4, name)
    first, same, other = (router.weight for router in routers)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    hidden = random(ROWS, LENGTH, HIDDEN).float()
    mean = torch.stack([hidden[row][MASK[row].bool()].mean(0) for row in range(ROWS)])
    expected = (torch.nn.functional.gelu(mean) @ first.T).softmax(1)
    torch.testing.assert_close(routers[0](hidden, prompts), expected)


def test_autocast_leaves_the_precision(router, prompts):
    hidden = random(ROWS, LENGTH, HIDDEN).float()
    expected = router(hidden, prompts)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(hidden, prompts), expected)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_most_probable_modules_are_chosen_and_renormalised_times_their_number(count):
    probabilities = random_probabilities()
    decision = decide(probabilities, count)
    for row, probability in enumerate(probabilities):
        best = sorted(range(MODULES), key=lambda module: -probability[module])[:count]
        total = sum(probability[module] for module in best)
        expected = [count * probability[module] / total if module in best else 0.0 for module in range(MODULES)]
        assert decision.chosen[row].nonzero().flatten().tolist() == sorted(best)
        torch.testing.assert_close(decision.gates[row], torch.tensor(expected, dtype=torch.float64))


def test_all_modules_at_uniform_routing_have_the_gate_of_plain_lora():
    gates = decide(torch.full((2, MODULES), 1 / MODULES, dtype=torch.float64), MODULES).gates
    torch.testing.assert_close(gates, torch.ones(2, MODULES, dtype=torch.float64), rtol=1e-15, atol=0)


def test_a_choice_that_was_made_before_is_kept():
    before = decide(random_probabilities(seed=1), 3).chosen
    again = decide(random_probabilities(seed=2), 3, before)
    assert torch.equal(again.chosen, before)
    assert torch.equal(again.gates != 0, before)
    torch.testing.assert_close(again.gates.sum(1), torch.full((5,), 3.0, dtype=torch.float64))


def test_the_balancing_loss_is_one_at_uniform_routing():
    uniform = torch.full((5, MODULES), 1 / MODULES)
    loss = balance_loss([uniform] * 4, torch.ones(5, dtype=torch.bool), nothing, 1)
    assert float(loss) == pytest.approx(1, rel=1e-6)


def test_the_balancing_loss_is_that_of_the_definition():
    blocks = [random_probabilities(seed=seed) for seed in range(3)]
    trained = torch.tensor([True, True, False, True, True])
    losses = []
    for probabilities in blocks:
        mine = probabilities[trained]
        share = [sum(int(row.argmax() == module) for row in mine) / len(mine) for module in range(MODULES)]
        mean = [sum(float(row[module]) for row in mine) / len(mine) for module in range(MODULES)]
        losses.append(MODULES * sum(f * p for f, p in zip(share, mean, strict=True)))
    found = balance_loss(blocks, trained, nothing, 1)
    assert float(found) == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_the_balancing_loss_moves_probability_away_from_the_module_that_all_prompts_take():
    probabilities = torch.tensor([[0.4, 0.3, 0.3], [0.5, 0.2, 0.3], [0.3, 0.6, 0.1]], requires_grad=True)
    balance_loss([probabilities], torch.ones(3, dtype=torch.bool), nothing, 1).backward()
    # 3 modules / 3 prompts times the share of prompts: the gradient of the mean probability alone.
    expected = torch.tensor([2 / 3, 1 / 3, 0.0]).expand(3, 3)
    torch.testing.assert_close(probabilities.grad, expected)


def test_a_batch_without_an_answer_has_no_balancing_loss():
    assert float(balance_loss([random_probabilities()], torch.zeros(5, dtype=torch.bool), nothing, 1)) == 0
