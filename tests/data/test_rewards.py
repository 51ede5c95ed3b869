"""Values per token that come with the rows."""

import math

import datasets
import numpy as np
import pytest

from tests.data.tokenizers import CHATML, byt5, gpt2_like, merging_bpe, words
from tokengrain.batch import TokenBatch
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs, prepare_sft
from tokengrain.errors import DataError

ROW = {"prompt": "The sky is", "chosen": " blue.", "rejected": " black and green."}


def lengths(tokenizer, config=None):
    return [c.n_counted for c in prepare_pairs([ROW], tokenizer, config)[0].completions]


def with_rewards(tokenizer, **more):
    n, m = lengths(tokenizer)
    chosen, rejected = [i / 8 for i in range(n)], [-i / 8 for i in range(m)]
    return {**ROW, "chosen_token_rewards": chosen, "rejected_token_rewards": rejected, **more}


def test_per_token():
    row = with_rewards(gpt2_like())
    n, m = lengths(gpt2_like())
    row |= {"chosen_ref_logps": [-1.0] * n, "rejected_ref_logps": [-2] * m}
    dataset = prepare_pairs([row], gpt2_like())
    assert dataset.columns == ("ref_logps", "token_rewards")
    for side, completion in zip(("chosen", "rejected"), dataset[0].completions):
        assert completion.columns["token_rewards"] == row[f"{side}_token_rewards"]
        assert completion.columns["ref_logps"] == row[f"{side}_ref_logps"]
    batch = TokenBatch.from_samples(dataset.samples[:])
    assert batch.columns["token_rewards"].tolist() == row["chosen_token_rewards"] + row["rejected_token_rewards"]


def test_given_in_other_ways():
    row = with_rewards(gpt2_like())
    want = prepare_pairs([row], gpt2_like())[0]
    columns = ("chosen_token_rewards", "rejected_token_rewards")
    arrays = {**row, **{c: np.array(row[c], dtype=np.float32) for c in columns}}
    as_text = {**row, **{c: str(row[c]) for c in columns}}  # as a CSV file has them
    for source in ([arrays], [as_text], datasets.Dataset.from_list([row])):
        assert prepare_pairs(source, gpt2_like())[0] == want


def spans_of(text, *pieces):
    return [{"start": text.index(p), "end": text.index(p) + len(p), "reward": r} for p, r in pieces]


@pytest.mark.parametrize("make", [gpt2_like, merging_bpe, byt5])
def test_spans(make):
    tokenizer = make()
    row = {
        **ROW,
        "chosen_token_rewards": spans_of(ROW["chosen"], ("lu", 1.0)),
        "rejected_token_rewards": spans_of(ROW["rejected"], ("green", -0.5), ("black", -1.0)),
    }
    sample = prepare_pairs([row], tokenizer)[0]
    for side, completion in zip(("chosen", "rejected"), sample.completions):
        prompt = [i for i in sample.prompt_ids if i != tokenizer.bos_token_id]
        texts = []
        for i in range(len(completion.ids) - 1):
            before = tokenizer.decode(prompt + completion.ids[:i])
            after = tokenizer.decode(prompt + completion.ids[: i + 1])
            texts.append((len(before) - len(ROW["prompt"]), len(after) - len(ROW["prompt"])))
        spans = sorted(row[f"{side}_token_rewards"], key=lambda s: s["start"])
        for (first, last), reward in zip(texts, completion.columns["token_rewards"]):
            touched = [s["reward"] for s in spans if s["start"] < last and first < s["end"]]
            assert reward == (touched[0] if touched else 0.0)
        assert completion.columns["token_rewards"][-1] == 0.0, "EOS has no character"
        assert any(completion.columns["token_rewards"])


def test_a_token_in_two_spans_has_the_reward_of_the_first():
    tokenizer = words()
    row = {"prompt": "The sky", "chosen": " blacker. is", "rejected": " black. is"}
    row["chosen_token_rewards"] = [
        {"start": 4, "end": 9, "reward": 2.0},
        {"start": 0, "end": 4, "reward": 1.0},
    ]
    row["rejected_token_rewards"] = [{"start": 0, "end": 1, "reward": 5.0}]  # only the space between words
    chosen, rejected = prepare_pairs([row], tokenizer)[0].completions
    assert chosen.columns["token_rewards"] == [1.0, 0.0, 0.0]
    assert rejected.columns["token_rewards"] == [0.0, 0.0, 0.0]


def test_a_span_that_touches_the_token_across_the_seam():
    tokenizer = merging_bpe()
    row = {**ROW, "prompt": "Oh my! The sky is"}
    row["chosen_token_rewards"] = [{"start": 0, "end": 1, "reward": 2.0}]
    row["rejected_token_rewards"] = [{"start": 0, "end": 1, "reward": 3.0}]
    sample = prepare_pairs([row], tokenizer)[0]
    assert len(tokenizer.decode(sample.prompt_ids)) < len(row["prompt"])
    for reward, completion in zip((2.0, 3.0), sample.completions):
        assert [r for r in completion.columns["token_rewards"] if r] == [reward]


def test_spans_in_messages():
    tokenizer = gpt2_like(CHATML)
    row = {
        "prompt": [{"role": "user", "content": "the sky?"}],
        "chosen": [
            {"role": "assistant", "content": "It is blue."},
            {"role": "user", "content": "it is not blue"},
            {"role": "assistant", "content": "It is blue."},
        ],
        "rejected": [{"role": "assistant", "content": "It is black."}],
        "chosen_token_rewards": [{"message": 2, "start": 6, "end": 10, "reward": 1.0}],
        "rejected_token_rewards": [{"start": 6, "end": 11, "reward": -1.0}],
    }
    chosen, rejected = prepare_pairs([row], tokenizer)[0].completions
    counted = [i for i, keep in zip(chosen.ids, chosen.counted) if keep]
    got = [tokenizer.decode(i) for i, r in zip(counted, chosen.columns["token_rewards"]) if r]
    assert "".join(got).strip() == "blue"
    half = chosen.n_counted // 2
    assert not any(chosen.columns["token_rewards"][:half]), "the first message was not meant"
    got = [tokenizer.decode(i) for i, r in zip(rejected.ids, rejected.columns["token_rewards"]) if r]
    assert "".join(got).strip() == "black"
    row["chosen_token_rewards"] = [{"start": 6, "end": 10, "reward": 1.0}]
    with pytest.raises(DataError, match=r"span 0 does not say which message.*one of \[0, 1, 2\]"):
        prepare_pairs([row], tokenizer)


def test_cut_completions_cut_their_values():
    tokenizer = gpt2_like()
    n, m = lengths(tokenizer)
    prompt = len(prepare_pairs([ROW], tokenizer)[0].prompt_ids)
    config = TokenizeConfig(max_length=prompt + m - 2)
    assert lengths(tokenizer, config) == [n, m - 2]
    row = with_rewards(tokenizer)
    cut = prepare_pairs([row], tokenizer, config)[0].completions[1]
    assert cut.columns["token_rewards"] == row["rejected_token_rewards"][: m - 2]
    # As `annotate` writes them: computed on the cut completion.
    again = {**row, "rejected_token_rewards": row["rejected_token_rewards"][: m - 2]}
    assert prepare_pairs([again], tokenizer, config)[0].completions[1] == cut


def test_single_completions():
    n = lengths(gpt2_like())[0]
    row = {
        "prompt": ROW["prompt"],
        "completion": ROW["chosen"],
        "token_rewards": [0.5] * n,
        "ref_logps": [-1.0] * n,
    }
    columns = prepare_sft([row], gpt2_like())[0].completions[0].columns
    assert columns == {"token_rewards": [0.5] * n, "ref_logps": [-1.0] * n}
    with pytest.raises(DataError, match="field 'token_rewards': does not fit"):
        prepare_sft([{**row, "token_rewards": [0.5]}], gpt2_like())


def bad_rows():
    n, m = lengths(gpt2_like())
    good = [0.0] * n

    def spans(*found):
        return {"chosen_token_rewards": list(found)}

    def span(start, end, reward=1.0):
        return {"start": start, "end": end, "reward": reward}

    yield (
        {"chosen_token_rewards": [0.0] * (n - 1)},
        f"does not fit.*got '{n - 1} numbers'; expected {n}: one per token",
    )
    yield {"rejected_token_rewards": [0.0] * (m + 1)}, f"does not fit.*got '{m + 1} numbers'; expected {m}"
    yield {"chosen_token_rewards": []}, f"got '0 numbers'; expected {n}: one per token"
    yield {"chosen_token_rewards": [*good[1:], math.nan]}, f"value {n - 1} is not finite; got nan"
    yield {"chosen_token_rewards": [math.inf, *good[1:]]}, "value 0 is not finite; got inf"
    yield {"chosen_token_rewards": ["1", *good[1:]]}, "value 0 is not a number; got '1'"
    yield {"chosen_token_rewards": [True, *good[1:]]}, "value 0 is not a number; got True"
    yield {"chosen_token_rewards": [None, *good[1:]]}, "value 0 is not a number; got None"
    yield {"chosen_token_rewards": 1.0}, "is of type float; got 1.0; expected a list of numbers, or of spans"
    yield {"chosen_token_rewards": "high"}, "is of type str; got 'high'"
    yield {"rejected_token_rewards": None}, "is missing while the other completion has its own"
    yield {"chosen_ref_logps": [-1.0] * n}, "'rejected_ref_logps': is missing while the other completion"
    yield {"chosen_ref_logps": [0.5] * n}, "value 0 is not a log-probability; got 0.5; expected at most 0"
    yield spans(span(0, 7)), "span 0 is out of range.*0 <= start < end <= 6"
    yield spans(span(2, 2)), "span 0 is out of range"
    yield spans(span(-1, 2)), "span 0 is out of range"
    yield spans(span(0.0, 2)), "span 0 is out of range"
    yield spans(span(0, 3), span(2, 4)), "two spans overlap"
    yield spans(span(0, 3, math.nan)), "the reward of span 0 is not finite"
    yield spans(span(0, 3), 0.5), "span 1 is not a span; got 0.5"
    yield spans({"start": 0, "end": 2}), "span 0 is not a span"
    yield spans({**span(0, 2), "message": 3}), "span 0 is about a message without text"


@pytest.mark.parametrize(("change", "message"), bad_rows())
def test_bad_values(change, message):
    good = with_rewards(gpt2_like())
    with pytest.raises(DataError, match=message) as caught:
        prepare_pairs([good, {**good, **change}], gpt2_like())
    assert str(caught.value).startswith("list of rows: row 1: field '")
    assert caught.value.field in (*change, "rejected_ref_logps")


@pytest.mark.parametrize("order", [1, -1])
def test_values_in_some_rows_only(order):
    rows = [with_rewards(gpt2_like()), ROW][::order]
    with pytest.raises(DataError, match=r"row 1: field 'chosen_token_rewards': is (missing|there), although"):
        prepare_pairs(rows, gpt2_like())
