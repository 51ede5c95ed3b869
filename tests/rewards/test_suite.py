"""Functions, weights, failures, token rewards."""

import asyncio
import functools
import math
import threading
import time

import numpy as np
import pytest
import torch

from tests.credit.small import tokenizer
from tests.data.tokenizers import byt5, gpt2_like, merging_bpe
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import DataError, RecipeError
from tokengrain.rewards.builtin import make_reward
from tokengrain.rewards.suite import RewardError, RewardFailure, RewardFunction, RewardSuite, located_tokens
from tokengrain.rollout.sampler import PromptItem, Rollouts, SampledCompletion, SamplingConfig

WORDS = ["the sea was calm", "the sun", "cruel and deep", "not"]


def rollouts(texts=WORDS, tok=None, raws=None, per_group=2):
    tok = tok or tokenizer()
    done = [
        SampledCompletion([*tok(t, add_special_tokens=False)["input_ids"], tok.eos_token_id], None, None, "stop")
        for t in texts
    ]
    groups = tuple(tuple(done[i : i + per_group]) for i in range(0, len(done), per_group))
    raws = raws or [{"prompt": f"p{i}", "answer": f"a{i}"} for i in range(len(groups))]
    prompts = tuple(PromptItem([1, 3], row=f"r{i}", raw=raw) for i, raw in enumerate(raws))
    return Rollouts(prompts, groups, SamplingConfig())


def words(completions):
    return [len(c.split()) for c in completions]


def suite(*functions, **kwargs):
    return RewardSuite(
        [RewardFunction(f, **kwargs) if not isinstance(f, RewardFunction) else f for f in functions],
        tokenizer=tokenizer(),
    )


def test_what_a_function_is_given():
    seen = {}

    def look(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.0] * len(completions)

    result = suite(look).score(rollouts())
    assert seen["prompts"] == ["p0", "p0", "p1", "p1"]
    assert seen["completions"] == WORDS
    assert seen["answer"] == ["a0", "a0", "a1", "a1"]
    assert seen["truncated"] == [False] * 4
    assert [len(i) for i in seen["completion_ids"]] == [5, 3, 4, 2]
    assert result.total.tolist() == [0.0] * 4
    assert result.token_rewards is None

    def answers(answer):
        return [int(a[1:]) for a in answer]

    assert suite(answers).score(rollouts()).total.tolist() == [0, 0, 1, 1]
    with pytest.raises(RewardError, match="'need' needs gold; the rows have answer, completion_ids"):
        suite(RewardFunction(lambda gold: gold, name="need")).score(rollouts())


def test_weights_and_metrics():
    result = suite(
        RewardFunction(words, weight=0.5), RewardFunction(lambda completions: [True, 0, np.float32(2), 0], name="b")
    ).score(rollouts())
    assert result.total.tolist() == [2 + 1, 1, 1.5 + 2, 0.5]
    assert result.by_name["words"].tolist() == [4, 2, 3, 1]
    assert result.by_name["b"].tolist() == [1, 0, 2, 0]
    assert result.valid.all()
    metrics = result.metrics()
    assert metrics["reward/words/mean"] == 2.5
    assert metrics["reward/mean"] == 2.0
    assert metrics["reward/failures"] == 0
    with pytest.raises(RecipeError, match="two rewards have the name 'words'"):
        suite(words, words)


def test_tensors_and_plain_functions():
    plain = RewardSuite([lambda completions: torch.tensor([1.0, 2.0, 3.0, 4.0])])
    assert plain.score(rollouts(), texts=WORDS).total.tolist() == [1, 2, 3, 4]
    with pytest.raises(RewardError, match="no texts"):
        plain.score(rollouts())


def test_token_and_span_rewards():
    def tokens(completion_ids):
        return [[0.5] * len(ids) for ids in completion_ids]

    def spans(completions):
        return [
            [{"start": c.index("s"), "end": c.index("s") + 1, "reward": 2.0}] if "s" in c else [] for c in completions
        ]

    result = suite(RewardFunction(tokens, weight=2.0), spans, lambda completions: [10, 20, 30, 40]).score(rollouts())
    want = [1, 3, 1, 1, 1, 1, 3, 1, *[1] * 4, 1, 1]
    assert result.token_rewards.tolist() == want
    assert result.outcome.tolist() == [10, 20, 30, 40]
    assert result.total.tolist() == [17, 25, 34, 42]
    assert result.by_name["spans"].tolist() == [2, 2, 0, 0]


def test_a_batch_with_tokens_that_do_not_count():
    tok = tokenizer()
    ids = [[*tok(t, add_special_tokens=False)["input_ids"], 2] for t in WORDS[:2]]
    counted = [True, False, True, True, True]
    sample = Sample([1], [Completion(ids[0], counted), Completion(ids[1])], row="x", raw={"prompt": "p"})
    batch = TokenBatch.from_samples([sample])
    spans = lambda completions: [[{"start": 0, "end": 7, "reward": 1.0}]] * 2  # noqa: E731
    result = RewardSuite([spans], tokenizer=tok).score(batch)
    assert result.token_rewards.tolist() == [1, 0, 0, 0, 1, 1, 0]
    per_token = lambda completions: [[1, 2, 3, 4], [1, 2, 3]]  # noqa: E731
    assert RewardSuite([per_token], tokenizer=tok).score(batch).total.tolist() == [10, 6]


@pytest.mark.parametrize("make", [gpt2_like, merging_bpe, byt5])
def test_places_of_sampled_tokens(make):
    """Ids that no tokenizer would make of the text: one piece at a time, characters cut in half."""
    tok = make()
    pieces = ["naï", "ve ca", "fé 日", "本", "語 😀", "👍 e", "nd"]
    ids = [i for p in pieces for i in tok(p, add_special_tokens=False)["input_ids"]]
    ids = [*ids[:4], tok.eos_token_id, *ids[4:], tok.eos_token_id]
    text = tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    tokens = located_tokens(tok, ids, text)
    assert text == "".join(pieces)
    assert tokens.starts[0] == 0
    assert tokens.ends[-1] == len(text)
    for token, start, end in zip(ids, tokens.starts, tokens.ends):
        piece = tok.decode([token], skip_special_tokens=True)
        if piece and "�" not in piece:
            assert text[start:end] == piece
        assert (end - start == 0) == (token == tok.eos_token_id)


FAULTS = {
    "raises": lambda completions: [1 / (c != "the sun") for c in completions],
    "none": lambda completions: [None if c == "the sun" else 1.0 for c in completions],
    "nan": lambda completions: [math.nan if c == "the sun" else 1.0 for c in completions],
    "infinite": lambda completions: [math.inf if c == "the sun" else 1.0 for c in completions],
    "endless": lambda completions: [10**400 if c == "the sun" else 1.0 for c in completions],
    "text": lambda completions: ["1" if c == "the sun" else 1.0 for c in completions],
    "failure": lambda completions: [RewardFailure("bad") if c == "the sun" else 1.0 for c in completions],
    "tokens": lambda completions: [[1.0] * 2 if c == "the sun" else 1.0 for c in completions],
    "span": lambda completions: [
        [{"start": 0, "end": 99, "reward": 1}] if c == "the sun" else 1.0 for c in completions
    ],
}
MESSAGES = {
    "raises": "ZeroDivisionError",
    "none": "gave None",
    "nan": "gave nan",
    "infinite": "gave inf",
    "endless": "gave inf",
    "text": "gave '1'",
    "failure": "bad",
    "tokens": "2 numbers.*expected 3",
    "span": "out of range",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_failures_of_one_completion(kind, caplog):
    with pytest.raises(RewardError, match=rf"'f': row r0 \(completion 1\): .*{MESSAGES[kind]}"):
        suite(RewardFunction(FAULTS[kind], name="f")).score(rollouts())
    skipped = suite(RewardFunction(FAULTS[kind], name="f", on_error="skip"), words).score(rollouts())
    assert skipped.valid.tolist() == [True, False, True, True]
    assert skipped.total.isnan().tolist() == [False, True, False, False]
    assert skipped.total[[0, 2, 3]].tolist() == [5, 4, 2]
    assert skipped.by_name["f"].isnan().tolist() == [False, True, False, False]
    assert [(f.row, f.completion) for f in skipped.failures] == [("r0", 1)]
    assert "row r0 (completion 1)" in caplog.text
    assert skipped.metrics()["reward/mean"] == pytest.approx(11 / 3)
    assert skipped.metrics()["reward/invalid"] == 0.25
    value = RewardFunction(FAULTS[kind], name="f", on_error="value", error_value=-7, weight=2)
    replaced = suite(value, words).score(rollouts())
    assert replaced.total.tolist() == [6, -12, 5, 3]
    assert replaced.valid.all()
    assert len(replaced.failures) == 1


def test_none_may_mean_that_a_reward_does_not_apply():
    result = suite(RewardFunction(FAULTS["none"], on_none="ignore", name="f"), words).score(rollouts())
    assert result.total.tolist() == [5, 2, 4, 2]
    assert result.valid.all()
    assert not result.failures
    with pytest.raises(RewardError, match="gave nan"):
        suite(RewardFunction(FAULTS["nan"], on_none="ignore")).score(rollouts())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions: [1.0], "gave 1 entries for 4 completions"),
        (lambda completions: 1.0, "gave 1.0; expected a list"),
        (lambda completions: None, "gave None; expected a list"),
    ],
)
def test_failures_of_a_whole_call(function, message):
    with pytest.raises(RewardError, match=message):
        suite(RewardFunction(function, name="f")).score(rollouts())
    assert not suite(RewardFunction(function, on_error="skip")).score(rollouts()).valid[1:].any()


def test_a_fault_that_only_all_together_have():
    def picky(completions):
        if len(completions) > 1:
            raise MemoryError("too many")
        return [1.0]

    with pytest.raises(RewardError, match="MemoryError: too many, for all completions together but for none"):
        suite(picky).score(rollouts())


def test_hanging_functions_are_left_behind():
    release = threading.Event()

    def hangs(completions):
        release.wait(20)
        return [1.0] * len(completions)

    async def hangs_too(completions):
        await asyncio.sleep(20)

    async def blocks(completions):
        release.wait(20)

    try:
        for function in (hangs, hangs_too, blocks):
            started = time.perf_counter()
            with pytest.raises(RewardError, match=r"row r0 .*did not return within 0.1 s"):
                suite(RewardFunction(function, timeout=0.1)).score(rollouts())
            value = RewardFunction(function, timeout=0.1, on_error="value", error_value=3)
            assert suite(value).score(rollouts()).total.tolist() == [3.0] * 4
            assert time.perf_counter() - started < 5
    finally:
        release.set()


def _times_out(completions):
    if WORDS[1] in completions:
        raise TimeoutError("the socket")
    return [1.0] * len(completions)


async def _times_out_later(completions):
    return _times_out(completions)


@pytest.mark.parametrize("function", [_times_out, _times_out_later])
@pytest.mark.parametrize("timeout", [5.0, None])
def test_a_time_out_of_its_own_is_an_error_of_one_completion(function, timeout):
    result = suite(RewardFunction(function, timeout=timeout, on_error="skip")).score(rollouts())
    assert result.valid.tolist() == [True, False, True, True]
    assert result.failures[0].what == "raised TimeoutError: the socket"


def test_a_partial_of_an_async_function_is_async():
    async def scaled(completions, factor):
        await asyncio.sleep(0)
        return [factor] * len(completions)

    assert suite(functools.partial(scaled, factor=2.0)).score(rollouts()).total.tolist() == [2.0] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_error": "skp"}, "on_error = 'skp'"),
        ({"on_none": "none"}, "on_none = 'none'"),
        ({"weight": math.nan}, "weight = nan"),
        ({"timeout": 0}, "timeout = 0"),
        ({"error_value": math.inf}, "error_value = inf"),
    ],
)
def test_settings_given_in_python_are_checked(settings, message):
    with pytest.raises(RecipeError, match=f"reward 'words': {message}"):
        RewardFunction(words, **settings)


def test_async_functions_run_together():
    started = threading.Barrier(2, timeout=5)

    async def one(completions):
        await asyncio.to_thread(started.wait)
        return [1.0] * len(completions)

    class Two:
        name = "two"

        async def __call__(self, completions):
            await asyncio.to_thread(started.wait)
            return [2.0] * len(completions)

    async def bad(completions):
        return [1 / (c != "not") for c in completions]

    assert suite(one, Two(), words).score(rollouts()).total.tolist() == [7, 5, 6, 4]
    with pytest.raises(RewardError, match=r"'bad': row r1 \(completion 3\): raised ZeroDivisionError"):
        suite(bad).score(rollouts())


def test_inside_a_running_loop():
    async def one(completions):
        return [1.0] * len(completions)

    async def notebook():
        return suite(one).score(rollouts())

    assert asyncio.run(notebook()).total.tolist() == [1.0] * 4


def test_without_a_limit_it_runs_in_the_calling_thread():
    names = []

    def where(completions):
        names.append(threading.current_thread())
        return [0.0] * len(completions)

    suite(RewardFunction(where, timeout=None)).score(rollouts())
    assert names == [threading.current_thread()]


def test_columns():
    with pytest.raises(RewardError, match="a column 'completions'"):
        suite(words).score(rollouts(raws=[{"completions": 1}, {}]))
    seen = {}

    def look(prompts, extra):
        seen.update(prompts=prompts, extra=extra)
        return [0.0] * 4

    suite(look).score(rollouts(raws=[{"extra": 1}, {}]))
    assert seen == {"extra": [1, 1, None, None], "prompts": ["write"] * 4}
    with pytest.raises(RewardError, match="3 texts and 4 rows for 4 completions"):
        suite(words).score(rollouts(), texts=WORDS[:3])


def test_right_answers_are_read_before_anything_is_sampled():
    rows = [("f.jsonl", i, {"answer": answer}) for i, answer in enumerate(["1", "2k+2", ["3", "x"]])]
    with pytest.raises(DataError) as error:
        RewardSuite([make_reward("exact"), make_reward("numeric")]).check_golds(rows)
    assert str(error.value) == (
        "f.jsonl: row 1: field 'answer': reward 'numeric': the column 'answer' has no number; got '2k+2' (2 of 3 rows)"
    )
    with pytest.raises(DataError, match="row 1: field 'answer': reward 'cosine': the column 'answer' has no number"):
        RewardSuite([make_reward("cosine", base="numeric", max_length=8)]).check_golds(rows)
    RewardSuite([make_reward("numeric", on_error="skip"), words]).check_golds(rows)
    RewardSuite([make_reward("numeric")]).check_golds(rows[:1])


def test_a_column_of_right_answers_that_no_row_has():
    rows = [("f.jsonl", i, {"prompt": "1 + 1", "gold": "2"}) for i in range(3)]
    message = r"f.jsonl: field 'answer': reward 'numeric': needs the column 'answer'; the rows have \['gold'"
    with pytest.raises(DataError, match=message):
        RewardSuite([make_reward("numeric")]).check_golds(rows)


def test_special_tokens_are_seen_where_a_reward_asks_for_them(caplog):
    tok = tokenizer()
    tok.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ids = [*tok("<think>the sea</think>not", add_special_tokens=False)["input_ids"], tok.eos_token_id]
    batch = TokenBatch.from_samples([Sample([1], [Completion(ids)], row=0, raw={})])
    seen = {}

    def look(completions):
        seen["text"] = completions
        return [[{"start": 0, "end": 7, "reward": 1.0}]]

    plain = RewardSuite([RewardFunction(look), make_reward("format", pattern="<think>.*</think>not")], tokenizer=tok)
    assert "reward 'format' looks for ['</think>', '<think>']" in caplog.text
    assert plain.score(batch).by_name["format"].tolist() == [0]
    assert "think" not in seen["text"][0]
    kept = [
        RewardFunction(look, special_tokens=True),
        make_reward("format", pattern="<think>.*</think> *not", special_tokens=True),
    ]
    result = RewardSuite(kept, tokenizer=tok).score(batch)
    assert result.by_name["format"].tolist() == [1]
    assert seen["text"][0].startswith("<think>")
    assert result.token_rewards.tolist() == [1, *[0] * (len(ids) - 1)]


def test_functions_written_for_messages():
    def for_chats(completions, **kwargs):
        return [float(len(completion[0]["content"])) for completion in completions]

    result = suite(RewardFunction(for_chats, messages=True)).score(rollouts())
    assert result.total.tolist() == [float(len(text)) for text in WORDS]
    with pytest.raises(RewardError, match=r"as TRL's do for chats.* Set messages: true"):
        suite(for_chats).score(rollouts())


def test_where_no_reward_applies_there_is_none():
    none = RewardFunction(lambda completions: [1.0, None, 0.0, None], name="a", on_none="ignore")
    other = RewardFunction(lambda completions: [None, None, None, 0.9], name="b", on_none="ignore")
    result = suite(none, other).score(rollouts())
    assert result.total.isnan().tolist() == [False, True, False, False]
    assert result.valid.tolist() == [True, False, True, True]
    assert not result.failures
    assert result.correct()[[0, 2, 3]].tolist() == [1, 0, 1]
    assert result.correct("a").isnan().tolist() == [False, True, False, True]
    assert bool(result.correct().isnan()[1])


def test_rewards_that_are_only_looked_at():
    """Weight 0 and `evaluate_only` add nothing, and do not make a completion scored to which nothing else applies."""

    def some(completions):
        return [1.0, None, 2.0, None]

    def broken(completions):
        raise ValueError("no")

    functions = [
        RewardFunction(some, on_none="ignore"),
        RewardFunction(words, weight=0.0),
        RewardFunction(broken, evaluate_only=True, on_error="skip"),
    ]
    both = suite(*functions).score(rollouts())
    assert both.total.tolist() == pytest.approx([1.0, math.nan, 2.0, math.nan], nan_ok=True)
    assert both.by_name["words"].tolist() == [4.0, 2.0, 3.0, 1.0]
    assert both.by_name["broken"].isnan().all()
    trained = suite(*functions).score(rollouts(), evaluating=False)
    assert list(trained.by_name) == ["some", "words"]
    assert trained.valid.tolist() == [True, False, True, False]
    assert trained.correct().tolist() == both.correct().tolist() == [1.0, 1.0, 1.0, 1.0]
    alone = suite(RewardFunction(words, weight=0)).score(rollouts())
    assert alone.total.tolist() == [0.0] * 4


def test_the_trainers_state_is_given_as_it_is():
    seen = []

    def asks(completions, trainer_state):
        seen.append(trainer_state)
        return [0.0] * len(completions)

    def takes_all(completions, **columns):
        if len(completions) > 1:
            raise ValueError("one at a time")
        seen.append(columns["trainer_state"])
        return [0.0]

    state = object()
    suite(asks, RewardFunction(takes_all, on_error="skip")).score(rollouts(), trainer_state=state)
    assert seen == [state] * 5
    suite(asks).score(rollouts())
    assert seen[-1] is None
    with pytest.raises(RewardError, match="have a column 'trainer_state', a name that rewards use"):
        suite(asks).score(rollouts(raws=[{"prompt": "p", "trainer_state": 1}] * 2))
