"""Dynamic programming against the enumeration of every completion of small grammars."""

import math

import pytest
import torch

from tokengrain.worlds import stories
from tokengrain.worlds.stories_grammar import SIZES, Grammar

SMALL = ("one-sentence", "one-phrase")


def enumerate_completions(grammar, prompt):
    """Every grammatical completion as (token ids, probability, total reward), by plain recursion on strings.

    Uses the rules' edges and nothing of the tensors or the dynamic programming.
    """
    place = prompt.table % grammar.n_places
    edges = grammar.rules.explore()
    out = []

    def grow(state, ids, probability, reward):
        if not edges[state]:
            out.append((ids, probability, reward))
        for edge in edges[state]:
            if edge.weights[place]:
                more = probability * edge.weights[place]
                grow(edge.next, (*ids, grammar.token[edge.word]), more, reward + edge.reward)

    grow(grammar.states[prompt.start], (), 1.0, 0.0)
    return out


@pytest.fixture(scope="module", params=SMALL)
def enumerated(request):
    grammar = Grammar(SIZES[request.param])
    prompt = grammar.plain[0]
    return grammar, prompt, enumerate_completions(grammar, prompt)


def test_probabilities_of_all_completions_sum_to_one(enumerated):
    _, _, completions = enumerated
    assert len(completions) > 1000
    assert len({ids for ids, _, _ in completions}) == len(completions)
    assert math.fsum(p for _, p, _ in completions) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_optimum_equals_the_tilted_distribution_over_completions(enumerated, beta):
    grammar, prompt, completions = enumerated
    # π*(y) = P(y) exp(R(y)/β) / Z, the optimum over all distributions of whole completions.
    weights = [p * math.exp(r / beta) for _, p, r in completions]
    z = math.fsum(weights)
    best = [w / z for w in weights]
    reward = math.fsum(q * r for q, (_, _, r) in zip(best, completions))
    kl = math.fsum(q * math.log(q / p) for q, (_, p, _) in zip(best, completions))
    entropy = -math.fsum(q * math.log(q) for q in best)
    length = math.fsum(q * len(ids) for q, (ids, _, _) in zip(best, completions))

    where = prompt.table, prompt.start
    assert float(stories.soft_values(grammar, beta)[where]) == pytest.approx(beta * math.log(z), abs=1e-10)
    value = stories.evaluate_logp(grammar, stories.optimal_logp(grammar, beta))
    assert float(value.reward[where]) == pytest.approx(reward, abs=1e-9)
    assert float(value.kl[where]) == pytest.approx(kl, abs=1e-9)
    assert float(value.entropy[where]) == pytest.approx(entropy, abs=1e-9)
    assert float(value.length[where]) == pytest.approx(length, abs=1e-9)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_advantage_of_every_token_from_prefix_sums(enumerated, beta):
    grammar, prompt, completions = enumerated
    # V(prefix) from the completions that begin with it; A of a token is the change of (reward so far + V).
    masses: dict = {}
    for ids, p, r in completions:
        for n in range(len(ids) + 1):
            total, base = masses.get(ids[:n], (0.0, 0.0))
            masses[ids[:n]] = (total + p * math.exp(r / beta), base + p)
    level = {prefix: beta * math.log(total / base) for prefix, (total, base) in masses.items()}
    advantages = stories.advantages(grammar, stories.soft_values(grammar, beta))
    for ids, _, _ in completions[:: max(1, len(completions) // 60)]:
        walk = grammar.walk([prompt], torch.tensor([ids]))
        found = advantages[prompt.table, walk.states[0], torch.tensor(ids)]
        expected = [level[ids[: n + 1]] - level[ids[:n]] for n in range(len(ids))]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


def test_limit_of_the_sweep_is_the_best_completions_in_base_proportion(enumerated):
    grammar, prompt, completions = enumerated
    top = max(r for _, _, r in completions)
    mass = math.fsum(p for _, p, r in completions if r > top - 1e-9)
    value = stories.evaluate_logp(grammar, stories.optimal_logp(grammar, 0.0))
    where = prompt.table, prompt.start
    assert float(stories.soft_values(grammar, 0.0)[where]) == pytest.approx(top)
    assert float(value.reward[where]) == pytest.approx(top, abs=1e-9)
    assert float(value.kl[where]) == pytest.approx(-math.log(mass), abs=1e-9)


@pytest.fixture(scope="module")
def full():
    grammar = Grammar(SIZES["full"])
    return grammar, stories.frontier(grammar)


@pytest.mark.parametrize("beta", [100.0, 10.0, 1.0, 0.3, 0.12])
def test_frontier_by_derivative_equals_policy_evaluation(full, beta):
    grammar, frontier = full
    at = stories.evaluate_logp(grammar, stories.optimal_logp(grammar, beta)).at_prompts(grammar)
    assert float(frontier.best_reward(at["kl"])) == pytest.approx(at["reward"], abs=2e-3)
    betas = stories.BETAS.tolist()
    if any(math.isclose(beta, b) for b in betas):
        k = min(range(len(betas)), key=lambda i: abs(betas[i] - beta)) + 1
        assert frontier.kl[k] == pytest.approx(at["kl"], abs=1e-8)
        assert frontier.reward[k] == pytest.approx(at["reward"], abs=1e-8)


def test_sweep_ends_where_the_design_says():
    assert len(stories.BETAS) == 120
    assert float(stories.BETAS[0]) == pytest.approx(100)
    assert float(stories.BETAS[-1]) == pytest.approx(0.12)


def test_frontier_starts_at_the_base_and_is_concave(full):
    _, frontier = full
    assert frontier.kl[0] == 0
    assert frontier.base_reward == pytest.approx(0, abs=1e-9)
    kl, reward = torch.tensor(frontier.kl), torch.tensor(frontier.reward)
    slopes = reward.diff() / kl.diff()
    assert (slopes[1:] <= slopes[:-1] + 1e-3).all()


def random_policies(grammar, n, generator):
    """Policies of very different kinds: noise, greedy for the next reward, close to the optimum."""
    advantage = stories.edge_advantages(grammar, stories.soft_values(grammar, 1.0))
    for i in range(n):
        scale = 10 ** float(torch.empty(()).uniform_(-2, 1, generator=generator))
        noise = torch.randn(grammar.edge_logp.shape, generator=generator, dtype=torch.float64)
        score = (noise, grammar.edge_reward, advantage + 0.3 * noise, advantage)[i % 4] * scale
        logits = grammar.edge_logp + score
        norm = logits.logsumexp(-1, keepdim=True)
        yield logits - norm.where(norm.isfinite(), 0.0)


def test_no_policy_passes_the_frontier(full):
    grammar, frontier = full
    shares = []
    for logp in random_policies(grammar, 16, torch.Generator().manual_seed(0)):
        at = stories.evaluate_logp(grammar, logp).at_prompts(grammar)
        assert at["reward"] <= float(frontier.best_reward(at["kl"])) + 2e-3
        shares.append(float(frontier.share(at["reward"], at["kl"])))
    assert max(shares) > 0.95  # the test would see a frontier that lies too high
    assert min(shares) < 0.2
