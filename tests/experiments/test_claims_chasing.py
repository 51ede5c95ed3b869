"""Pointer chasing: the task, what of it AEPO counts, and a quick run of the claims about it."""

from __future__ import annotations

import math
import random
from statistics import fmean
from typing import Any

import pytest
import torch
from experiments.claims import chasing_task, online_chasing
from experiments.claims.chasing_task import (
    CHECKS,
    HOPS,
    IDS,
    MOST_CHECKS,
    MUSED,
    SYMBOLS,
    VOCABULARY,
    Chasing,
    checks_of,
    is_right,
)

from tokengrain.batch import TokenBatch
from tokengrain.methods._entropy_window import trigger_table
from tokengrain.worlds.base_models import BOS, EOS

SCALE = online_chasing.Scale(
    sft_steps=150, sft_batch=32, rollouts=2, prompts=8, generations=4, minibatches=2, samples=2, learning_rate=1e-3
)
ARMS = {arm.name: arm for arm in online_chasing.ARMS}


@pytest.fixture(scope="module")
def task() -> Chasing:
    return Chasing(3)


@pytest.fixture(scope="module")
def context() -> Any:
    return online_chasing.prepare(3, SCALE)


def traces(task: Chasing, hops: int, n: int = 2000) -> list[tuple[bool, int]]:
    """Whether traces are right, and their checks."""
    rng = random.Random(0)
    found = []
    for i in range(n):
        symbol = SYMBOLS[i % len(SYMBOLS)]
        ids = [IDS[token] for token in task.trace(symbol, hops, rng)]
        found.append((is_right(ids, task.chased(symbol, hops)), checks_of(ids)))
    return found


def test_a_seed_has_a_permutation_of_its_own(task: Chasing) -> None:
    assert sorted(task.successor.values()) == list(SYMBOLS)
    assert task.successor == Chasing(3).successor != Chasing(4).successor
    assert task.chased("A", 2) == task.successor[task.successor["A"]]
    rows = task.prompts()
    assert len({row["prompt"] for row in rows}) == len(rows) == len(HOPS) * len(SYMBOLS)


def test_traces_hop_check_and_answer(task: Chasing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chasing_task, "SLIP", 0.0)
    monkeypatch.setattr(chasing_task, "RECHECK", 0.0)
    rng, length = random.Random(0), MUSED + 3
    for hops in HOPS:
        trace = task.trace("A", hops, rng)
        path = [task.chased("A", n) for n in range(hops + 1)]
        assert trace[-3:] == ["=", path[-1], EOS]
        places = [i for i, token in enumerate(trace) if token in CHECKS]
        assert len(trace) == 2 * hops + 3 + length * len(places)
        assert len(trace) <= chasing_task.LONGEST
        for i in places:
            done = trace[:i].count(">")
            assert trace[i + length - 2 : i + length] == path[done - 1 : done + 1]  # the last hop, again
        assert [trace[i + 1] for i, token in enumerate(trace) if token == ">"] == path[1:]


def test_checks_do_not_depend_on_the_hops_and_help_where_there_are_many(task: Chasing) -> None:
    easy, hard = traces(task, 1), traces(task, 6)
    for found in (easy, hard):
        assert {checks for _, checks in found} == set(range(MOST_CHECKS + 1))
        assert fmean(checks for _, checks in found) == pytest.approx(2, abs=0.1)
    assert fmean(right for right, _ in easy) > 0.9
    assert 0.1 < fmean(right for right, _ in hard) < 0.5
    often, never = ([right for right, checks in hard if (checks > 2) == many] for many in (True, False))
    assert fmean(often) > fmean(never) + 0.05


def test_only_the_right_letter_at_the_very_end_is_right(task: Chasing) -> None:
    answers = ["B", "C", "B", "B", "B"]
    texts = [["=", "B", EOS], ["=", "B", EOS], ["=", "B"], ["B", EOS], ["=", "B", EOS, EOS]]
    ids = [[IDS[token] for token in text] for text in texts]
    assert task.reward([], [], ids, answer=answers) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_the_tokenizer_reads_what_the_traces_write(task: Chasing) -> None:
    tokenizer = task.tokenizer
    assert tokenizer("f^3(D)").input_ids == [IDS[token] for token in (BOS, *"f^3(D)")]
    trace = task.trace("D", 6, random.Random(1))
    assert any(token in CHECKS for token in trace)
    assert tokenizer("".join(trace), add_special_tokens=False).input_ids == [IDS[token] for token in trace]


def test_checks_and_nothing_else_begin_with_triggers() -> None:
    table = trigger_table(VOCABULARY)
    assert [VOCABULARY[i] for i in table.nonzero().flatten().tolist()] == list(CHECKS)


def test_traces_to_imitate_are_a_function_of_the_seed() -> None:
    def drawn(seed: int) -> TokenBatch:
        return next(iter(Chasing(seed).trace_batches(1, 16)))

    one, again, other = drawn(3), drawn(3), drawn(4)
    assert torch.equal(one.completion_ids, again.completion_ids)
    assert one.n_prompts == other.n_prompts == 16
    assert not torch.equal(one.prompt_ids, other.prompt_ids)
    assert one.prompt(0).tolist()[:3] == [IDS[BOS], IDS["f"], IDS["^"]]


def test_arms_of_a_seed_share_their_start_and_nothing_else(context: Any) -> None:
    start, last = (online_chasing.run(context, ARMS[name]) for name in ("start", "AEPO's KL alone"))
    config = context.start.config.to_dict()
    found = {name: online_chasing.run(context, arm) for name, arm in ARMS.items()}
    assert all(set(measures) == set(online_chasing.GROUP.columns) for measures in found.values())
    for measures in found.values():
        assert all(math.isfinite(v) for v in measures.values() if v is not None), measures
    assert found["start"] == start  # and what came between has not trained it
    assert start["accuracy"] not in (None, 0.0)
    names = list(found)
    for i, name in enumerate(names):
        assert all(found[name] != found[other] for other in names[:i]), name
    assert found["AEPO's KL alone"] == last  # whatever ran before it
    assert context.start.config.to_dict() == config
    assert config["eos_token_id"] is None  # as the trainer sets it for its own copy
    assert {name for name in names if found[name]["counted"] is None} == {"start", "GRPO"}


@pytest.mark.slow
@pytest.mark.parametrize("mused", [MUSED, 0])
def test_what_follows_a_trigger_must_be_open_for_it_to_count(mused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chasing_task, "MUSED", mused)
    context = online_chasing.prepare(100, online_chasing.Scale(rollouts=4, minibatches=1, samples=4))
    found = online_chasing.run(context, ARMS["AEPO"])
    start = online_chasing.run(context, ARMS["start"])
    assert found["counted"] is not None
    assert start["checks_easy"] is not None
    share = found["counted"] / start["checks_easy"]  # nearly the policy of the start
    assert share > 0.5 if mused else share < 0.05
