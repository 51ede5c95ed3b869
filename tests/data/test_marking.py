"""Spans of rows: from every source, on every kind of tokenizer, cut, streamed and counted."""

import json
import time
from pathlib import Path

import datasets
import pytest

from tests.data.tokenizers import CHATML, all_tokenizers, byt5, gpt2_like, greedy, merging_bpe, words
from tokengrain.batch import TokenBatch
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs, prepare_sft
from tokengrain.data.rows import load_rows
from tokengrain.data.tokens import tokenizer_fingerprint
from tokengrain.errors import DataError, RecipeError

HH = Path(__file__).parents[3] / "shared" / "data" / "hh-harmless-pairs.jsonl.gz"
ROW = {"prompt": "The sky is", "chosen": " blue. The sea is green.", "rejected": " black. The sea is cold, not."}
# By words: "black" and "blue", "cold" and "green"; ", not" belongs to what "green" was replaced by.
WHERE = {"chosen": ("blue", "green"), "rejected": ("black", "cold, not")}
TAGGED = {
    "prompt": ROW["prompt"],
    "chosen": " <MASK>blue</MASK>. The sea is <MASK> green </MASK>.",
    "rejected": " <MASK>black</MASK>. The sea is <MASK>cold, not</MASK>.",
}


def place(text, piece):
    start = text.rindex(piece)
    return {"start": start, "end": start + len(piece)}


def spans_of(row, where=WHERE):
    return {f"{side}_spans": [place(row[side], piece) for piece in where[side]] for side in ("chosen", "rejected")}


def user_function(row):
    return tuple([(s["start"], s["end"]) for s in spans_of(row)[f"{side}_spans"]] for side in ("chosen", "rejected"))


def masked(row):
    return {**ROW, "chosen_masked": row["chosen"], "rejected_masked": row["rejected"]}


SOURCES = {
    "diff": (ROW, "diff"),
    "tags": (TAGGED, "tags"),
    "masked columns": (masked(TAGGED), "tags"),
    "column": ({**ROW, **spans_of(ROW)}, "column"),
    "column as text": ({**ROW, **{k: json.dumps(v) for k, v in spans_of(ROW).items()}}, "column"),
    "function": (ROW, {"source": user_function}),
    "import string": (ROW, "tests.data.test_marking:user_function"),
}


def spans(row, tokenizer, source="diff", **settings):
    return [c.columns["spans"] for c in prepared(row, tokenizer, source, **settings).completions]


def prepared(row, tokenizer, source="diff", **settings):
    return prepare_pairs([row], tokenizer, TokenizeConfig(spans=source, **settings))[0]


def by_characters(sample, tokenizer, side, where):
    """What the column must be, from the decoded beginnings of the completion; EOS has no characters."""
    text, completion = ROW[side], sample.completions[("chosen", "rejected").index(side)]
    prompt = [i for i in sample.prompt_ids if i != tokenizer.bos_token_id]
    out, at = [], 0
    for end in range(1, len(completion.ids)):
        now = len(tokenizer.decode(prompt + completion.ids[:end])) - len(ROW["prompt"])
        inside = [
            k for k, piece in enumerate(where[side], 1) if at < place(text, piece)["end"] and now > text.rindex(piece)
        ]
        out.append(float(inside[0] if inside else 0))
        at = now
    return [*out, 0.0]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("make", [gpt2_like, merging_bpe, byt5])
def test_all_sources_mark_the_same(source, make):
    row, config = SOURCES[source]
    tokenizer = make()
    sample = prepared(row, tokenizer, config)
    plain = prepare_pairs([ROW], tokenizer)[0]
    assert [c.ids for c in sample.completions] == [c.ids for c in plain.completions], "training sees no tags"
    assert sample.raw == plain.raw
    for side, completion in zip(("chosen", "rejected"), sample.completions):
        want = by_characters(sample, tokenizer, side, WHERE)
        assert completion.columns["spans"] == want
        assert set(want) == {0.0, 1.0, 2.0}


def test_a_token_across_the_border_is_in_the_span():
    tokenizer = greedy()  # has the pieces "is bl" and "e s", and letters
    row = {"prompt": "The sky", "chosen": " is blue soon", "rejected": " is green soon"}
    sample = prepared(row, tokenizer)
    pieces = [tokenizer.convert_ids_to_tokens(i) for i in sample.completions[0].ids]
    assert list(zip(pieces, sample.completions[0].columns["spans"])) == [
        *((" ", 0.0), ("is bl", 1.0), ("u", 1.0), ("e s", 1.0), ("o", 0.0), ("o", 0.0), ("n", 0.0), ("</s>", 0.0)),
    ]


def test_a_token_in_two_spans_is_in_the_first():
    row = {"prompt": "The sky", "chosen": " blacker. is", "rejected": " black. is"}
    row["chosen_spans"] = [{"start": 4, "end": 9}, {"start": 0, "end": 4}]
    row["rejected_spans"] = []
    assert spans(row, words(), "column") == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_every_tokenizer_marks_both_sides():
    for name, tokenizer in all_tokenizers().items():
        for level in ("word", "token"):
            chosen, rejected = spans(ROW, tokenizer, {"level": level})
            assert any(chosen), name
            assert any(rejected), name
            assert set(chosen) == set(rejected) or level == "token", name
            assert chosen[-1] == rejected[-1] == 0.0, "EOS"


def test_token_level():
    row = {"prompt": "The sky", "chosen": " is blue. The", "rejected": " is black. The"}
    assert spans(row, words(), {"level": "token"}) == [[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    # The same words are different tokens here, and the sign belongs to its word.
    row = {"prompt": "The sky", "chosen": " is blue. sea", "rejected": " is blue, sea"}
    assert spans(row, words(), {"level": "token"}) == [[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    # Letters in common break the span up; a longer least match does not let them.
    row = {"prompt": "The sky", "chosen": " is blue.", "rejected": " is black."}
    assert sum(spans(row, byt5(), {"level": "token"})[0]) < sum(spans(row, byt5())[0])
    assert spans(row, byt5(), {"level": "token", "min_match_size": 3})[0][:6] == [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_token_level_has_no_eos_even_where_short_matches_count_as_different():
    row = {"prompt": "The sky", "chosen": " is blue.", "rejected": " is black."}
    for side in spans(row, gpt2_like(), {"level": "token", "min_match_size": 50}):
        assert side[-1] == 0.0
        assert all(side[:-1])


def test_one_sided_and_moved():
    row = {"prompt": "The sky", "chosen": " is blue and green.", "rejected": " is blue and very green."}
    assert not any(map(any, spans(row, words())))
    assert spans(row, words(), {"keep_one_sided": True}) == [[0.0] * 5, [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]]
    row = {"prompt": "The sky", "chosen": " is blue and the sea", "rejected": " the sea is blue and"}
    assert not any(map(any, spans(row, words()))), "moved text is an insertion and a deletion"


def test_own_ids():
    row = {**ROW, **spans_of(ROW)}
    for side, first, second in (("chosen", 2, 1), ("rejected", 7, 7)):
        for span, number in zip(row[f"{side}_spans"], (first, second)):
            span["id"] = number
    chosen, rejected = spans(row, gpt2_like(), "column")
    assert [v for v in chosen if v] == [2.0] * chosen.count(2.0) + [1.0] * chosen.count(1.0)
    assert set(rejected) == {0.0, 7.0}
    read = datasets.Dataset.from_list([row])  # parquet and arrow give absent keys as None
    assert [
        c.columns["spans"] for c in prepare_pairs(read, gpt2_like(), TokenizeConfig(spans="column"))[0].completions
    ] == [
        chosen,
        rejected,
    ]


def test_other_tags():
    row = {"prompt": "The sky is", "chosen": " [blue] now", "rejected": " [black] now"}
    plain = {k: v.replace("[", "").replace("]", "") for k, v in row.items()}
    assert spans(row, gpt2_like(), {"source": "tags", "tags": ["[", "]"]}) == spans(plain, gpt2_like())


def test_implicit_prompts():
    row = {"chosen": "The sky is blue and green.", "rejected": "The sky is black and green."}
    tagged = {k: v.replace("bl", "<MASK>bl").replace(" and", "</MASK> and") for k, v in row.items()}
    assert spans(tagged, gpt2_like(), "tags") == spans(row, gpt2_like())
    hh = {
        side: f"\n\nHuman: the sky?\n\nAssistant: It is {word}.\n\nHuman: the sea?\n\nAssistant: <MASK>{word}</MASK>."
        for side, word in (("chosen", "Green"), ("rejected", "Black"))
    }
    with pytest.raises(DataError, match="differ before their last"):
        prepared(hh, gpt2_like(), "tags")
    hh = {k: v.replace("It is Green", "It is").replace("It is Black", "It is") for k, v in hh.items()}
    sample = prepared(hh, gpt2_like(), "tags")
    text = "".join(
        gpt2_like().decode(i) for i, s in zip(sample.completions[1].ids, sample.completions[1].columns["spans"]) if s
    )
    assert text.strip() == "Black"
    hh = {k: v.replace("the sky?", "<MASK>the sky?</MASK>") for k, v in hh.items()}
    with pytest.raises(DataError, match="row 0: field 'chosen': has tags in the prompt"):
        prepared(hh, gpt2_like(), "tags")


CHAT = {
    "prompt": [{"role": "user", "content": "the sky?"}],
    "chosen": [
        {"role": "assistant", "content": "It is blue."},
        {"role": "user", "content": "it is not blue"},
        {"role": "assistant", "content": "It is green and the end."},
    ],
    "rejected": [{"role": "assistant", "content": "It is black."}],
}


def marked_text(tokenizer, completion):
    counted = [i for i, keep in zip(completion.ids, completion.counted or [True] * len(completion.ids)) if keep]
    runs = {}
    for token, span in zip(counted, completion.columns["spans"]):
        if span:
            runs[span] = runs.get(span, "") + tokenizer.decode(token)
    return [text.strip() for text in runs.values()]


@pytest.mark.parametrize("level", ["word", "token"])
def test_turns(level):
    tokenizer = gpt2_like(CHATML)
    chosen, rejected = prepared(CHAT, tokenizer, {"level": level, "keep_one_sided": True}).completions
    if level == "word":
        assert marked_text(tokenizer, rejected) == ["black"]
        assert marked_text(tokenizer, chosen) == ["blue", "It is green and the end."]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    counted = [i for i, keep in zip(chosen.ids, chosen.counted) if keep]
    assert counted.count(end) == 2
    assert all(not span for i, span in zip(counted, chosen.columns["spans"]) if i == end)
    assert any(chosen.columns["spans"])


def test_a_span_over_two_turns_leaves_out_what_is_between_them():
    tokenizer = gpt2_like(CHATML)
    turns = [*CHAT["chosen"]]
    turns[0], turns[2] = {**turns[0], "content": "It is blue"}, {**turns[2], "content": "so green the end"}
    row = {**CHAT, "chosen": turns, "rejected": [{"role": "assistant", "content": "It is black the end"}]}
    for level in ("word", "token"):
        chosen, rejected = prepared(row, tokenizer, {"level": level, "min_match_size": 2}).completions
        assert marked_text(tokenizer, rejected) == ["black"]
        assert marked_text(tokenizer, chosen) == ["blueso green"]


def test_tags_and_columns_name_the_message():
    tokenizer = gpt2_like(CHATML)
    tagged = json.loads(json.dumps(CHAT).replace("green", "<MASK>green</MASK>").replace("black", "<MASK>black</MASK>"))
    row = {
        **CHAT,
        "chosen_spans": [{"message": 2, "start": 6, "end": 11}],
        "rejected_spans": [{"start": 6, "end": 11}],
    }
    whole = {side: [*CHAT["prompt"], *tagged[side]] for side in ("chosen", "rejected")}  # the prompt repeated
    both = {**CHAT, "chosen_masked": tagged["chosen"], "rejected_masked": tagged["rejected"]}
    for given, source in ((tagged, "tags"), (row, "column"), (whole, "tags"), (both, "tags")):
        sample = prepared(given, tokenizer, source)
        assert marked_text(tokenizer, sample.completions[0]) == ["green"]
        assert marked_text(tokenizer, sample.completions[1]) == ["black"]
        assert "MASK" not in tokenizer.decode(sample.completions[0].ids)


def test_spans_are_cut_with_the_completion():
    tokenizer = gpt2_like()
    whole = prepared(ROW, tokenizer)
    prompt = len(whole.prompt_ids)
    for room in range(4, max(len(c.ids) for c in whole.completions)):
        cut = prepared(ROW, tokenizer, max_length=prompt + room)
        for part, full in zip(cut.completions, whole.completions):
            assert part.columns["spans"] == full.columns["spans"][:room]


def test_single_completions_lose_their_tags():
    plain = prepare_sft([ROW], gpt2_like())[0].completions
    config = TokenizeConfig(spans={"source": "tags", "on_none": "error"})
    assert prepare_sft([TAGGED], gpt2_like(), config)[0].completions == plain
    row = {"prompt": ROW["prompt"], "completion": TAGGED["chosen"]}
    assert prepare_sft([row], gpt2_like(), config)[0].completions == plain
    assert prepare_sft([ROW], gpt2_like(), TokenizeConfig(spans="diff"))[0].completions == plain


# ---- pairs without a span


INSERTED = {"prompt": "The sky is", "chosen": " blue.", "rejected": " very blue."}


def test_pairs_without_a_span_are_kept_and_counted():
    dataset = prepare_pairs([ROW, INSERTED, INSERTED], gpt2_like(), TokenizeConfig(spans="diff"))
    assert dataset.report.without_spans == 2
    assert dataset.report.notable
    assert str(dataset.report) == "3 of 3 rows; 2 pairs without a span"
    assert dataset.columns == ("spans",)
    batch = TokenBatch.from_samples(dataset.samples[:])
    assert batch.columns["spans"].shape == (batch.segments.total,)
    assert batch.select([1]).columns["spans"].tolist() == [0.0] * batch.select([1]).segments.total
    assert not prepare_pairs([ROW], gpt2_like(), TokenizeConfig(spans="diff")).report.notable


def test_pairs_without_a_span_are_skipped_or_refused():
    rows = [ROW, INSERTED, {**ROW, "chosen": ""}, INSERTED]

    def config(on_none, on_invalid):
        return TokenizeConfig(spans={"on_none": on_none}, on_invalid=on_invalid)

    report = prepare_pairs(rows, gpt2_like(), config("skip", "skip")).report
    assert report.skipped == {"no span": 2, "empty completion": 1}
    assert report.without_spans == 0
    with pytest.raises(DataError, match=r"row 2: field 'chosen': completion is empty"):
        prepare_pairs(rows, gpt2_like(), config("skip", "error"))
    message = (
        r"row 1: field 'chosen': no token of either completion is in a span; got ' blue.'.*3 of 4 rows are invalid"
    )
    with pytest.raises(DataError, match=message + r".*spans: {on_none: skip}` leaves them out"):
        prepare_pairs(rows, gpt2_like(), config("error", "skip"))
    with pytest.raises(DataError, match=r"row 1: field 'chosen': no token"):
        prepare_pairs(rows, gpt2_like(), config("error", "error"))
    with pytest.raises(DataError, match=r"No row is left: 2 no span"):
        prepare_pairs([INSERTED] * 2, gpt2_like(), config("skip", "skip"))


def test_a_span_that_is_cut_away():
    sample = prepare_pairs([ROW], gpt2_like())[0]
    row = {**ROW, **spans_of(ROW, {"chosen": ("green",), "rejected": ("not",)})}
    config = TokenizeConfig(spans="column", max_length=len(sample.prompt_ids) + 5)
    assert prepare_pairs([row], gpt2_like(), config).report.without_spans == 1


def test_streams(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [ROW, INSERTED, TAGGED, ROW] * 100))
    for source in ("diff", "tags", {"on_none": "skip"}):
        config = TokenizeConfig(spans=source)
        stored = prepare_pairs(path, gpt2_like(), config)
        stream = prepare_pairs(load_rows(path, streaming=True), gpt2_like(), config)
        assert list(stream) == list(stored.samples)
        assert stream.report == stored.report
        assert stored.report.without_spans + stored.report.skipped.get("no span", 0) >= 100
    refused = prepare_pairs(
        load_rows(path, streaming=True), gpt2_like(), TokenizeConfig(spans={"on_none": "error"}, on_invalid="skip")
    )
    with pytest.raises(DataError, match=r"pairs.jsonl: row 1 \(line 2\): field 'chosen': no token"):
        list(refused)


# ---- what is refused


def bad_rows():
    yield (
        "tags",
        {**TAGGED, "rejected": " <MASK>black"},
        "'rejected': <MASK> at character 1 is not closed; expected <MASK>",
    )
    yield "tags", {**TAGGED, "chosen": " a <MASK>b <MASK>c</MASK>"}, "'chosen': <MASK> at character 11 stands within"
    yield "tags", {**TAGGED, "prompt": "The <MASK>sky</MASK> is"}, "'prompt': has a tag"
    yield "tags", {**ROW, "chosen_masked": TAGGED["chosen"]}, "'rejected_masked': is missing while the other"
    yield (
        "tags",
        {**masked(TAGGED), "rejected_masked": " <MASK>red</MASK>. The sea is cold, not."},
        "'rejected_masked': without its tags it differs from character 1 ",
    )
    yield "column", ROW, r"'chosen_spans': column is missing; expected a list of .* or \[\]"
    yield "column", {**ROW, "choosen_spans": []}, "'chosen_spans': column is missing; 'choosen_spans' has a similar"
    column = {**ROW, **spans_of(ROW)}
    yield "column", {**column, "chosen_spans": [{"start": 3, "end": 99}]}, "'chosen_spans': span 0 is out of range"
    yield "column", {**column, "rejected_spans": [{"start": 3}]}, "'rejected_spans': span 0 is not a span"
    yield "column", {**column, "rejected_spans": 3}, "'rejected_spans': is of type int; got 3; expected a list of"
    two = [{"start": 1, "end": 5}, {"start": 4, "end": 8}]
    yield "column", {**column, "rejected_spans": two}, "'rejected_spans': two spans overlap"
    numbered = [{"start": 1, "end": 2, "id": 1}, {"start": 4, "end": 8}]
    yield "column", {**column, "chosen_spans": numbered}, "'chosen_spans': a span's id is not usable"
    yield "column", {**column, "chosen_spans": [{"start": 1, "end": 2, "id": 0}]}, "a span's id is not usable; got 0"
    yield {"source": lambda row: None}, ROW, "gave no two lists; got None; expected .chosen spans, rejected spans."
    yield {"source": lambda row: ([(0, 99)], [])}, ROW, "'chosen': span 0 is out of range"
    yield {"source": lambda row: 1 / 0}, ROW, "raised ZeroDivisionError: division by zero"


@pytest.mark.parametrize("case", range(16))
def test_bad_rows(case):
    source, row, message = list(bad_rows())[case]
    good = {**masked(TAGGED), **spans_of(ROW)} if not isinstance(source, dict) else None
    rows = [good, row] if good else [row]
    with pytest.raises(DataError, match=rf"list of rows: row {len(rows) - 1}: .*{message}"):
        prepare_pairs(rows, gpt2_like(), TokenizeConfig(spans=source))


def test_functions_that_are_not_there(tmp_path):
    for name in ("no.such:thing", f"{tmp_path}/none.py:f"):
        with pytest.raises(RecipeError, match=r"no (module|file)"):
            prepare_pairs([ROW], gpt2_like(), TokenizeConfig(spans=name))


def test_fingerprints(tmp_path):
    tokenizer = gpt2_like()

    def mark(spans=None):
        return tokenizer_fingerprint(tokenizer, TokenizeConfig(spans=spans))

    path = tmp_path / "mine.py"
    path.write_text("def f(row):\n    return [], []\n")
    first = mark(f"{path}:f")
    path.write_text("def f(row):\n    return [(0, 1)], []\n")
    found = [
        mark(),
        mark("diff"),
        mark("tags"),
        mark({"level": "token"}),
        mark(f"{path}:f"),
        first,
        mark(user_function),
    ]
    assert len(set(found)) == len(found)
    assert mark({"source": "diff"}) == mark("diff")
    assert (
        prepare_pairs([ROW], tokenizer, TokenizeConfig(spans="diff")).fingerprint
        != prepare_pairs([ROW], tokenizer).fingerprint
    )


# ---- the real pairs


@pytest.mark.skipif(not HH.exists(), reason="shared data is not here")
def test_hh_pairs():
    from tokengrain.data.marking import SpanMarker

    seconds = 0.0
    mark = SpanMarker.__call__

    def timed(self, *arguments):
        nonlocal seconds
        start = time.perf_counter()
        columns = mark(self, *arguments)
        seconds += time.perf_counter() - start
        return columns

    rows = load_rows(HH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpanMarker, "__call__", timed)
        dataset = prepare_pairs(rows, gpt2_like(trim=False), TokenizeConfig(on_invalid="skip", spans="diff"))
    assert dataset.report.kept == 1794
    assert dataset.report.without_spans == 9
    assert seconds < 2 * 1.8, "at most 2 s for 1,000 pairs"
    for sample in dataset.samples:
        chosen, rejected = ([int(v) for v in c.columns["spans"]] for c in sample.completions)
        assert set(chosen) - {0} == set(rejected) - {0}
        assert chosen[-1] == rejected[-1] == 0
        for side in (chosen, rejected):
            assert [v for v in side if v] == sorted(v for v in side if v)
