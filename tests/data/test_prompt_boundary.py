"""Prompt and completion on token ids, for many kinds of tokenizer."""

import random

import pytest

from tests.data.tokenizers import (
    all_tokenizers,
    byt5,
    gpt2_like,
    greedy,
    llama_like,
    merging_bpe,
    trimming_bpe,
    unigram,
    words,
)
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs, prepare_sft
from tokengrain.data.tokens import Encoder, tokenizer_fingerprint
from tokengrain.errors import DataError, ModelError

PIECES = [
    "the", "sky", "is", "blue", "black", "sea", "Human:", "Assistant:", "it's", "café", "日本語", "😀",
    "e\u0301", " ", "  ", "\n\n", ".", ", ", "x", "\t",
]  # fmt: skip


# Whose offsets are what they say, too; see test_trimmed_offsets_are_completed for the others.
WITH_OFFSETS = [n for n in all_tokenizers() if n not in ("byt5", "greedy", "trimming bpe", "gpt2")]


def random_text(rng: random.Random, most: int) -> str:
    return "".join(rng.choice(PIECES) + rng.choice(["", " "]) for _ in range(rng.randint(1, most)))


def random_rows(seed: int, count: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    rows = []
    while len(rows) < count:
        row = {k: random_text(rng, 6) for k in ("prompt", "chosen", "rejected")}
        if all(v.strip() for v in row.values()) and row["chosen"].split() != row["rejected"].split():
            rows.append(row)
    return rows


def ids_of(tokenizer, text):
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", all_tokenizers())
def test_ids_are_those_of_the_whole_text(name):
    tokenizer = all_tokenizers()[name]
    rows = random_rows(seed=len(name), count=150)
    dataset = prepare_pairs(rows, tokenizer, TokenizeConfig(on_invalid="skip"))
    # Unknown words can make two texts equal; everything else must get through.
    assert set(dataset.report.skipped) <= {"chosen equals rejected", "empty prompt"}
    assert dataset.report.kept > 100
    bos = [tokenizer.bos_token_id]
    adds_bos = tokenizer("the").input_ids[:1] == bos
    for sample in dataset.samples:
        for side, completion in zip(("chosen", "rejected"), sample.completions):
            full = ids_of(tokenizer, rows[sample.row]["prompt"] + rows[sample.row][side])
            got = sample.prompt_ids + completion.ids
            assert got[-1] == tokenizer.eos_token_id
            if adds_bos:
                assert got == [*bos, *full, tokenizer.eos_token_id]
            else:  # BOS stands for a prompt that has no token of its own
                assert got[:-1] == full or (got[:-1] == bos + full and len(sample.prompt_ids) == 1)
        assert sample.prompt_ids
        assert all(c.ids[:-1] for c in sample.completions)


def test_trimmed_offsets_are_completed():
    """As by the same tokenizer that does not trim; else the spaces of a token would be overlooked."""
    texts = [row["prompt"] + row["chosen"] for row in random_rows(seed=5, count=100)] + ["   ", " a ", "a  "]
    pairs = ((trimming_bpe(), merging_bpe()), (gpt2_like(), gpt2_like(trim=False)))
    for trimming, plain in pairs:
        raw = trimming(texts, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert raw != plain(texts, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        found, expected = (Encoder(t, TokenizeConfig())(texts) for t in (trimming, plain))
        assert [(t.ids, t.starts, t.ends) for t in found] == [(t.ids, t.starts, t.ends) for t in expected]


@pytest.mark.parametrize("name", WITH_OFFSETS)
def test_no_prompt_token_holds_a_character_of_the_completion(name):
    tokenizer = all_tokenizers()[name]
    rows = random_rows(seed=1, count=100)
    for sample in prepare_pairs(rows, tokenizer, TokenizeConfig(on_invalid="skip")).samples:
        row = rows[sample.row]
        own = [i for i in sample.prompt_ids if i != tokenizer.bos_token_id]
        ends = []
        for side in ("chosen", "rejected"):
            found = tokenizer(row["prompt"] + row[side], add_special_tokens=False, return_offsets_mapping=True)
            ends.append([end for _, end in found["offset_mapping"]])
            assert found["input_ids"][: len(own)] == own
            assert all(end <= len(row["prompt"]) for end in ends[-1][: len(own)])
        # It is the longest such prompt: the next token straddles in one of them, or differs between them.
        following = [
            (ids_of(tokenizer, row["prompt"] + row[side])[len(own)], end[len(own)])
            for side, end in zip(("chosen", "rejected"), ends)
        ]
        assert any(end > len(row["prompt"]) for _, end in following) or following[0][0] != following[1][0]


def test_a_token_across_the_seam_belongs_to_the_completion():
    tokenizer = merging_bpe()
    prompt, chosen, rejected = "Oh my! The sky is", " blue.", " black."
    full = ids_of(tokenizer, prompt + chosen)
    prompt_alone = ids_of(tokenizer, prompt)
    assert full[: len(prompt_alone)] != prompt_alone, "the tokenizer must merge across this boundary"
    sample = prepare_pairs([{"prompt": prompt, "chosen": chosen, "rejected": rejected}], tokenizer)[0]
    text = tokenizer.decode(sample.prompt_ids)
    assert prompt.startswith(text)
    assert len(text) < len(prompt)
    assert tokenizer.decode(sample.completions[0].ids[:-1]) == (prompt + chosen)[len(text) :]


def test_tokens_that_differ_before_the_seam_go_to_the_completions():
    """ "ab" + "c" is [a, bc], "ab" + "x" is [ab, x]: the shared prompt is empty, BOS stands for it."""
    from tests.data.tokenizers import GreedyTokenizer

    tokenizer = GreedyTokenizer(["a", "b", "c", "x", "q", "abd", "ab", "bc"])
    # Greedy takes "ab" first in both, so make the merge depend on what follows: "abd" against "ab" + "x".
    sample = prepare_pairs([{"prompt": "qab", "chosen": "d", "rejected": "x"}], tokenizer)[0]
    vocabulary = tokenizer.get_vocab()
    assert sample.prompt_ids == [vocabulary["q"]]
    assert sample.completions[0].ids == [vocabulary["abd"], tokenizer.eos_token_id]
    assert sample.completions[1].ids == [vocabulary["ab"], vocabulary["x"], tokenizer.eos_token_id]
    sample = prepare_pairs([{"prompt": "ab", "chosen": "d", "rejected": "x"}], tokenizer)[0]
    assert sample.prompt_ids == [tokenizer.bos_token_id]
    assert sample.completions[1].ids == [vocabulary["ab"], vocabulary["x"], tokenizer.eos_token_id]


def test_prompt_without_a_token_and_without_bos_is_an_error():
    tokenizer = words(bos_token=None)
    row = {"prompt": "The", "chosen": "sky", "rejected": "sea"}  # one word each once they are joined
    with pytest.raises(DataError, match=r"row 0: field 'prompt': prompt has no token of its own"):
        prepare_pairs([row, row], tokenizer)


def test_unknown_words_do_not_hide_the_seam():
    """The ids of the prompt alone are a beginning of the whole, and yet the last of them straddles."""
    tokenizer = words()
    row = {"prompt": "The sk", "chosen": "ies are", "rejected": "unk is"}
    sample = prepare_pairs([row], tokenizer)[0]
    assert sample.prompt_ids == ids_of(tokenizer, "The")


def test_bos_is_never_doubled():
    for tokenizer in (llama_like(), unigram(), merging_bpe(bos=True)):
        for prompt in ("The sky is", "<s>The sky is"):
            sample = prepare_pairs([{"prompt": prompt, "chosen": " blue.", "rejected": " sea"}], tokenizer)[0]
            assert sample.prompt_ids[0] == tokenizer.bos_token_id
            assert sample.prompt_ids.count(tokenizer.bos_token_id) == 1


def test_eos_is_added_once_or_not_at_all():
    tokenizer = gpt2_like()
    eos = tokenizer.eos_token_id
    rows = [{"prompt": "The sky is", "chosen": " blue.</s>", "rejected": " sea"}]
    assert [c.ids.count(eos) for c in prepare_pairs(rows, tokenizer)[0].completions] == [1, 1]
    without = prepare_pairs(rows, tokenizer, TokenizeConfig(add_eos=False))[0]
    assert [c.ids.count(eos) for c in without.completions] == [1, 0]


def test_tokenizer_without_eos():
    tokenizer = words(eos_token=None)
    rows = [{"prompt": "The sky is", "chosen": " blue.", "rejected": " black."}]
    with pytest.raises(ModelError, match=r"no EOS token.*add_eos: false"):
        prepare_pairs(rows, tokenizer)
    sample = prepare_pairs(rows, tokenizer, TokenizeConfig(add_eos=False))[0]
    assert sample.completions[0].ids == ids_of(tokenizer, "blue.")


def test_what_a_tokenizer_adds_by_itself():
    assert Encoder(llama_like(), TokenizeConfig()).prefix == [llama_like().bos_token_id]
    assert Encoder(gpt2_like(), TokenizeConfig()).prefix == []
    assert Encoder(byt5(), TokenizeConfig()).prefix == []  # it adds EOS, behind


def test_offsets_and_prefixes_place_characters_alike():
    """The way without offsets agrees with the way with them, wherever both can tell."""
    fast = gpt2_like()
    config = TokenizeConfig()
    encoder = Encoder(fast, config)
    for row in random_rows(seed=3, count=40):
        text = row["prompt"] + row["chosen"]
        (tokens,) = encoder([text])
        for position in range(1, len(text)):
            without = type(tokens)(text, tokens.ids, ids_of=encoder._ids)
            # A prefix cut inside a word is tokenised in other ways; it can only know less.
            assert without.within(position) <= tokens.within(position)
            assert without.touching(position) <= tokens.touching(position)
            if text[position].isspace() and not text[position - 1].isspace():
                assert without.within(position) == tokens.within(position)


def test_plain_text_has_bos_or_its_first_token_as_prompt():
    for tokenizer, prompt in (
        (llama_like(), [llama_like().bos_token_id]),
        (gpt2_like(), [gpt2_like().bos_token_id]),
    ):
        sample = prepare_sft([{"text": "The sky is blue."}], tokenizer)[0]
        assert sample.prompt_ids == prompt
        assert sample.completions[0].ids == [*ids_of(tokenizer, "The sky is blue."), tokenizer.eos_token_id]
    tokenizer = words(bos_token=None)
    sample = prepare_sft([{"text": "The sky is blue."}], tokenizer)[0]
    assert sample.prompt_ids == ids_of(tokenizer, "The")
    assert sample.completions[0].ids == [*ids_of(tokenizer, "sky is blue."), tokenizer.eos_token_id]


def test_tokenizer_fingerprint():
    assert tokenizer_fingerprint(gpt2_like()) == tokenizer_fingerprint(gpt2_like())
    before = tokenizer_fingerprint(merging_bpe())
    merging_bpe()(["The sky", "is"], padding=False, truncation=True, max_length=3)
    assert tokenizer_fingerprint(merging_bpe()) == before
    assert len({tokenizer_fingerprint(t) for t in all_tokenizers().values()}) == len(all_tokenizers())
    configs = [TokenizeConfig(), TokenizeConfig(max_length=9), TokenizeConfig(on_invalid="skip")]
    first, shorter, skipping = (tokenizer_fingerprint(greedy(), c) for c in configs)
    assert first != shorter
    assert first == skipping  # it does not change any ids
