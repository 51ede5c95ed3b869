"""The experiments about R3's limits and about a value in two slots: their parts. Quick runs: `test_claims_online`."""

from __future__ import annotations

import math

import pytest
import torch
from experiments.claims import online_r3, online_r3_limits, online_slots
from experiments.claims.framework import SeedAndSizes
from experiments.claims.slots_task import (
    CHAIN,
    IDS,
    KEYS,
    LENGTH,
    MARKER,
    P_FIRST,
    P_FOLLOWS,
    PAIRS,
    PROMPT,
    SLOTS,
    VALUES,
    VOCABULARY,
    Slots,
    draw_prompts,
    texts,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_share_of_pairs_in_order_is_what_the_normal_law_says() -> None:
    # The mean of L tokens: correlation r of reward and quality, ½ + asin(r)/π of the pairs in order.
    length, noise = 50, 0.3
    quality = torch.randn(2000, 4, generator=generator())
    drawn = noise * torch.randn(2000, 4, length, generator=generator(1))
    signal = online_r3.TELLING * online_r3.TRACE_GAIN
    r = signal / math.hypot(signal, noise * length**0.5)
    assert online_r3.ranked(quality, drawn, 0.0) == pytest.approx(0.5 + math.asin(r) / math.pi, abs=0.012)
    assert online_r3.ranked(quality, torch.zeros_like(drawn), 1.0) == 1.0


def test_laws_of_noise_are_what_they_are_said_to_be() -> None:
    def of(law: str) -> torch.Tensor:
        return online_r3_limits.deviations(law, 4000, 10, generator())

    telling, gain = online_r3.TELLING, online_r3.TRACE_GAIN
    assert torch.equal(of("small"), torch.full((4000, 10), 0.15))
    assert torch.equal(of("large"), torch.full((4000, 10), gain))
    logs = of("heavy").log()
    assert float(logs.median().exp()) == pytest.approx(0.15, abs=0.005)
    assert float(logs.std()) == pytest.approx(1.0, abs=0.02)
    alike = of("alike")
    in_all = alike.square()
    in_all[:, :telling] += gain**2
    assert torch.allclose(in_all, in_all[:1, :1])


def test_what_is_ranked_in_the_limits_is_what_group_r3_ranks() -> None:
    scale = online_r3_limits.Scale(traces=4800, length=200)
    context = SeedAndSizes(0, scale)
    small = {a.settings["power"]: a for a in online_r3_limits.ARMS if a.name.endswith("small noise, G 16")}
    before = SeedAndSizes(0, online_r3.Scale(traces=300))
    for power in (0.0, 1.0, 2.0):
        found = online_r3_limits.run(context, small[power])["ranked"]
        assert found == pytest.approx(online_r3._ranked(before, power, 200), abs=0.02)


def test_prompts_have_four_pairs_and_ask_for_one() -> None:
    prompts, values = draw_prompts(500, generator())
    assert prompts.shape == (500, PROMPT)
    for ids, right in zip(prompts.tolist(), values[:, 0].tolist(), strict=True):
        text = "".join(VOCABULARY[i] for i in ids)
        pairs = text[len("<s>") : -2]
        table = dict(zip(pairs[::2], pairs[1::2], strict=True))
        assert len(table) == len(set(table.values())) == PAIRS
        assert set(table) <= set(KEYS)
        assert set(table.values()) <= set(VALUES)
        assert text[-2] == "?"
        assert table[text[-1]] == VOCABULARY[right]
    asked = (prompts[:, 1:-2:2] == prompts[:, -1:]).float().mean(0)
    assert asked.tolist() == pytest.approx([0.25] * PAIRS, abs=0.06)  # it may stand anywhere


def test_texts_have_right_chains_and_answers_that_follow_them() -> None:
    (batch,) = texts(1, 2000, generator())
    prompts, text = batch.prompt_ids.view(2000, PROMPT), batch.completion_ids.view(2000, -1)
    at = (prompts[:, 1:-2:2] == prompts[:, -1:]).int().argmax(1)
    said, right = text[:, 0], prompts[:, 2:-2:2].gather(1, at[:, None])[:, 0]
    assert float((said == right).float().mean()) == pytest.approx(0.4, abs=0.03)
    assert bool((prompts[:, 2:-2:2] == said[:, None]).any(1).all())  # a wrong value is another one of the prompt
    assert bool((text[:, 1] == IDS[MARKER]).all())
    assert bool((text[:, -1] == IDS["<end>"]).all())
    answer = text[:, CHAIN:-1]
    assert answer.shape[1] == LENGTH
    slots = answer[:, list(SLOTS)]
    follows = (slots == said[:, None]).float()
    assert follows.mean(0).tolist() == pytest.approx([P_FOLLOWS + (1 - P_FOLLOWS) / PAIRS] * 2, abs=0.012)
    assert bool((prompts[:, None, 2:-2:2] == slots[..., None]).any(2).all())
    words = answer[:, [t for t in range(LENGTH) if t not in SLOTS]]
    first = words == words.min(0).values
    assert float(first.float().mean()) == pytest.approx(P_FIRST, abs=0.01)
    by_chain = [float(first[said == said[i]].float().mean()) for i in range(20)]
    assert by_chain == pytest.approx([P_FIRST] * 20, abs=0.03)


def test_rows_read_like_the_tensors() -> None:
    task = Slots(3, 20)
    rows = task.prompts()
    assert rows == Slots(3, 20).prompts()
    assert rows != Slots(4, 20).prompts()
    ids = [task.tokenizer(row["prompt"])["input_ids"] for row in rows]
    assert torch.equal(torch.tensor(ids), draw_prompts(20, generator(3))[0])
    assert all([row["reference"][t] for t in SLOTS] == [row["value"]] * 2 for row in rows)
    marker, values = IDS[MARKER], [row["value"] for row in rows[:3]]
    chains = [[values[0], marker], [0, marker], [values[2], 0]]  # right, another value, no marker
    assert task.reward(["", "", ""], ["", "", ""], chains, value=values) == [1.0, 0.0, 0.0]


def test_slots_on_top_counts_prompts_whose_chains_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, values = draw_prompts(3, generator())
    chains = torch.tensor([[5, 4], [5, 4], [6, 4], [7, 4], [6, 4], [7, 4]])  # the first prompt's are the same
    monkeypatch.setattr(online_slots, "sample", lambda *args: chains)

    def logps(model: object, batch: object) -> torch.Tensor:
        found = torch.zeros(6, LENGTH)
        found[2, list(SLOTS)] = -1.0
        found[4, [SLOTS[0], 0]] = -1.0  # here a word varies instead of the second slot
        return found.flatten()

    monkeypatch.setattr(online_slots, "logps_of", logps)
    top, words = online_slots.found_slots(None, prompts, values[:, 0], 2, generator())
    assert top == 0.5
    assert words == pytest.approx(0.5 / (2 * (LENGTH - 2)))
