"""Formats of rows, and what is wrong with bad ones."""

import json
import random

import pytest

from tests.data.tokenizers import gpt2_like
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs, prepare_sft
from tokengrain.data.formats import pair_example, single_example
from tokengrain.errors import DataError

GOOD = {"prompt": "The sky is", "chosen": " blue.", "rejected": " black."}


def parts(row):
    example = pair_example(row)
    return (example.prompt, *example.completions)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("The sky is blue.", "The sky is black.", ("The sky is", " blue.", " black.")),  # not "The sky is bl"
        ("Q: why?\nA: yes", "Q: why?\nA: no", ("Q: why?\nA:", " yes", " no")),
        ("Q: why?\n\nyes", "Q: why?\n\nno", ("Q: why?\n\n", "yes", "no")),
        ("问：天空？答：蓝", "问：天空？答：黑", ("问：天空？答：", "蓝", "黑")),
        ("The sky is it", "The sky is it.", ("The sky is", " it", " it.")),
        ("It was (so", "It was [so", ("It was", " (so", " [so")),
    ],
)
def test_implicit_prompt(chosen, rejected, expected):
    if expected[1:] == (" it", " it."):  # one goes on where the other ends: nothing is left of the first
        with pytest.raises(DataError, match="field 'chosen': completion is empty"):
            pair_example({"chosen": chosen, "rejected": rejected})
        return
    assert parts({"chosen": chosen, "rejected": rejected}) == expected


def test_implicit_prompt_is_a_common_beginning():
    rng = random.Random(0)
    for _ in range(300):
        texts = [" ".join(rng.choice(["ab", "abc", "b", "c.", "\n"]) for _ in range(8)) for _ in range(2)]
        try:
            prompt, *completions = parts({"chosen": texts[0], "rejected": texts[1]})
        except DataError:
            continue
        assert [prompt + c for c in completions] == texts
        assert not (prompt[-1].isalnum() and any(c[0].isalnum() for c in completions)), "no word is torn"


DIALOGUE = "\n\nHuman: what colour?\n\nAssistant: which?\n\nHuman: the sky's\n\nAssistant:"


def test_dialogues():
    row = {"chosen": DIALOGUE + " Blue.\n\nReally.", "rejected": DIALOGUE + " Blue."}
    assert parts(row) == (DIALOGUE, " Blue.\n\nReally.", " Blue.")
    short = {"chosen": DIALOGUE + " Blue.", "rejected": DIALOGUE + " "}
    with pytest.raises(DataError, match="field 'rejected': completion is empty; got ' '"):
        pair_example(short)
    other = {"chosen": DIALOGUE + " Blue.", "rejected": "\n\nHuman: what?\n\nAssistant: Black."}
    with pytest.raises(DataError, match="the dialogues differ before their last 'Assistant:', from character"):
        pair_example(other)
    human = {"chosen": DIALOGUE + " Blue.\n\nHuman: oh", "rejected": DIALOGUE + " Black."}
    with pytest.raises(DataError, match="field 'chosen': the dialogue ends with a turn of the human"):
        pair_example(human)


def test_single_completions():
    def single(row):
        example = single_example(row)
        assert len(example.completions) == len(example.fields) == len(example.token_columns) == 1
        return example.prompt, example.completions[0]

    assert single({"prompt": "a", "completion": " b"}) == ("a", " b")
    assert single({"prompt": "a", "chosen": " b"}) == ("a", " b")
    assert single({"prompt": "a", "chosen": " b", "rejected": " c"}) == ("a", " b")
    assert single({"chosen": "a b", "rejected": "a c"}) == ("a", " b")
    assert single({"text": "a b"}) == ("", "a b")
    with pytest.raises(DataError, match=r"none of the columns that hold a completion; got \['question'"):
        single_example({"question": "a", "answer": "b"})
    with pytest.raises(DataError, match="field 'completion': column is missing; 'compeltion' has"):
        single_example({"prompt": "a", "compeltion": "b"})
    with pytest.raises(DataError, match="field 'messages': is text"):
        single_example({"messages": "a"})
    with pytest.raises(DataError, match="field 'text': is not text"):
        single_example({"text": [{"role": "user", "content": "a"}]})
    with pytest.raises(DataError, match="field 'completion': completion is empty"):
        single_example({"prompt": "a", "completion": ""})


def test_extra_columns_are_ignored():
    row = {**GOOD, "prompt_id": "7", "score_chosen": 8.0, "chosen_rewards": 3, "source": "x", "tools": None}
    assert parts(row) == parts(GOOD)
    assert parts({"chosen": "a b", "rejected": "a c", "prompt_id": "7"}) == ("a", " b", " c")


# ---- bad rows: what the message must hold, besides file, row and field

BAD = {
    "missing column": (
        {"prompt": "a", "chosen": "b"},
        "rejected",
        "column is missing; expected 'rejected' among ['prompt', 'chosen'], or made from these by `data.columns`",
    ),
    "misspelt column": (
        {"prompt": "a", "choosen": "b", "rejected": "c"},
        "chosen",
        "column is missing; 'choosen' has a similar name; expected 'chosen'",
    ),
    "misspelt prompt": (
        {"promt": "a", "chosen": "a b", "rejected": "a c"},
        "prompt",
        "column is missing; 'promt' has a similar name; expected 'prompt'",
    ),
    "misspelt rewards": (
        {**GOOD, "chosen_token_reward": [1.0]},
        "chosen_token_reward",
        "unknown column; expected 'chosen_token_rewards'",
    ),
    "empty prompt": ({**GOOD, "prompt": ""}, "prompt", "is empty; got ''; expected some text"),
    "blank prompt": ({**GOOD, "prompt": " \n"}, "prompt", "is empty; got ' \\n'; expected some text"),
    "empty completion": (
        {**GOOD, "rejected": ""},
        "rejected",
        "completion is empty; got ''; expected some text",
    ),
    "both empty": ({**GOOD, "chosen": "", "rejected": ""}, "chosen", "completion is empty; got ''"),
    "equal": (
        {**GOOD, "rejected": " blue."},
        "rejected",
        "is equal to 'chosen'; got ' blue.'; expected two different",
    ),
    "number": (
        {**GOOD, "chosen": 3},
        "chosen",
        "is of type int; got 3; expected a string, or a list of messages",
    ),
    "null": ({**GOOD, "chosen": None}, "chosen", "is of type NoneType; got None; expected a string"),
    "mixed": (
        {**GOOD, "chosen": [{"role": "assistant", "content": "b"}]},
        "rejected",
        "is text while the other completion is messages",
    ),
    "mixed prompt": (
        {**GOOD, "prompt": [{"role": "user", "content": "b"}]},
        "chosen",
        "is text while the prompt is messages",
    ),
    "no prompt": (
        {"chosen": "yes", "rejected": "no"},
        "prompt",
        "there is no prompt: no such column, and the completions do not begin alike",
    ),
    "surrogate": ({**GOOD, "chosen": " bl\ud83due"}, "chosen", "half of a surrogate pair at character 3"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("kind", ["list", "file"])
def test_bad_rows(name, kind, tmp_path):
    row, field, message = BAD[name]
    source = [GOOD, GOOD, row]
    where = "list of rows: row 2"
    if kind == "file":
        source = tmp_path / "pairs.jsonl"
        source.write_text("".join(json.dumps(r) + "\n" for r in [GOOD, GOOD, row]))
        where = f"{source}: row 2 (line 3)"
    with pytest.raises(DataError) as caught:
        prepare_pairs(source, gpt2_like())
    assert str(caught.value).startswith(f"{where}: field {field!r}: {message}")
    assert str(caught.value).endswith("It is the only invalid row of 3 (`on_invalid: skip` leaves it out)")
    dataset = prepare_pairs(source, gpt2_like(), TokenizeConfig(on_invalid="skip"))
    assert (dataset.report.kept, sum(dataset.report.skipped.values())) == (2, 1)
    assert str(caught.value).startswith(next(iter(dataset.report.first.values())))


def test_every_row_is_bad():
    rows = [{"prompt": "a", "chosen": "b"}] * 2 + [{**GOOD, "prompt": ""}]
    for config in (TokenizeConfig(), TokenizeConfig(on_invalid="skip")):
        with pytest.raises(DataError, match=r"No row is left: 2 missing column, 1 empty prompt$"):
            prepare_pairs(rows, gpt2_like(), config)


def test_different_tokens_only_in_case():
    """A tokenizer for which both completions are the same."""
    from tests.data.tokenizers import words

    row = {"prompt": "The sky", "chosen": " xyz", "rejected": " zyx"}
    with pytest.raises(DataError, match="field 'rejected': is the same as 'chosen' in the tokenizer's eyes"):
        prepare_pairs([row], words())


def test_sft_takes_the_chosen_side_of_pairs():
    pair, single = prepare_pairs([GOOD], gpt2_like())[0], prepare_sft([GOOD], gpt2_like())[0]
    assert single.completions == pair.completions[:1]
    assert single.prompt_ids == pair.prompt_ids
    assert single.raw == {"prompt": "The sky is", "chosen": " blue."}
