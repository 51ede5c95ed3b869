"""The grammar of `stories`: counts, probabilities, walks, tokenizer."""

import re

import pytest
import torch

from tokengrain.errors import DataError
from tokengrain.worlds import stories
from tokengrain.worlds.stories import build_tokenizer
from tokengrain.worlds.stories_grammar import SIZES, Grammar


@pytest.fixture(scope="module")
def grammar():
    return Grammar(SIZES["full"])


@pytest.fixture(scope="module")
def tokenizer(grammar):
    return build_tokenizer(grammar)


def rewards(grammar, text, prompt="write about the sea in the sun :"):
    """Reward of every word of a completion."""
    parsed = grammar.parse_prompt(grammar.encode(prompt))
    walk = grammar.walk([parsed], torch.tensor([grammar.encode(text)]))
    return dict(zip(text.split(), walk.rewards[0].tolist())), walk


def test_counts_of_the_design(grammar):
    assert len(grammar.vocabulary) == len(set(grammar.vocabulary)) == 104
    assert len(grammar.states) == 657
    assert [len(grammar.plain), len(grammar.prompts)] == [12, 36]
    assert grammar.longest == 40


def test_base_tables_are_distributions(grammar):
    sums = grammar.edge_logp.exp().sum(-1)
    ends = [grammar.broken, grammar.finished]
    assert sums[:, ends].abs().max() == 0
    rest = torch.ones(657, dtype=torch.bool)
    rest[ends] = False
    torch.testing.assert_close(sums[:, rest], torch.ones_like(sums[:, rest]), atol=1e-12, rtol=0)


def test_base_text_is_worth_nothing_on_average(grammar):
    at = stories.evaluate_logp(grammar, grammar.edge_logp).at_prompts(grammar)
    assert at["reward"] == pytest.approx(0, abs=1e-9)
    assert at["kl"] == pytest.approx(0, abs=1e-12)
    assert at["length"] == pytest.approx(22, abs=0.5)


@pytest.mark.parametrize(
    ("sentence", "word", "expected"),
    [
        ("the sailor was kind .", "kind", 1),
        ("the sailor was tall .", "tall", 0),
        ("the sailor was not kind .", "kind", -1),
        ("the sailor was very kind .", "kind", 2),
        ("the sailor was not very cruel .", "cruel", 2),
        ("supposedly the sailor was kind .", "kind", -1),
        ("supposedly the pirate was not truly cruel .", "cruel", -2),
        ("supposedly the pirate was not kind .", "kind", 1),
        ("the sailor helped the diver .", "diver", 1),
        ("the sailor helped the pirate .", "pirate", -1),
        ("the sailor helped the boat .", "boat", 0),
        ("the sailor saw the diver .", "diver", 0),
        ("the sailor robbed the diver .", "diver", -1),
        ("the sailor never robbed the diver .", "diver", 1),
        ("supposedly the sailor never robbed the diver .", "diver", -1),
        ("supposedly the sailor never robbed the pirate .", "pirate", 1),
    ],
)
def test_reward_of_a_word_depends_on_what_stands_before_it(grammar, sentence, word, expected):
    by_word, _ = rewards(grammar, sentence)
    assert by_word.pop(word) == expected
    assert set(by_word.values()) == {0.0}


def test_supposedly_ends_with_its_sentence_and_not_with_its_phrase(grammar):
    by_word, _ = rewards(grammar, "supposedly the sailor was kind and fed the whale . the shark was brave .")
    assert [by_word[w] for w in ("kind", "whale", "brave")] == [-1, -1, 1]


def test_negation_ends_with_its_phrase(grammar):
    by_word, _ = rewards(grammar, "the sailor was not kind and was brave .")
    assert [by_word[w] for w in ("kind", "brave")] == [-1, 1]


@pytest.mark.parametrize(
    ("text", "moods"),
    [
        ("the sailor was kind .", [1]),
        ("the sailor was not kind .", [-1]),
        ("the sailor was tall .", [1]),
        ("the sailor was not kind but", [1]),
        ("the sailor was not kind and", [-1]),
        ("the pirate robbed the diver .", [-1]),
    ],
)
def test_mood_follows_the_last_rewarded_word_and_but_turns_it(grammar, text, moods):
    _, walk = rewards(grammar, text)
    assert [grammar.states[int(walk.last[0])].mood] == moods


@pytest.mark.parametrize("text", ["the sailor kind", "was", "the queen", "the sailor was not not", "the sailor ."])
def test_first_word_out_of_place_costs_one_and_the_rest_nothing(grammar, text):
    _, walk = rewards(grammar, text + " the sailor was kind .")
    assert walk.rewards.sum() == -1
    assert walk.last[0] == grammar.broken


def test_end_out_of_place_costs_one_and_finishes(grammar):
    _, walk = rewards(grammar, "the sailor was kind . <end> kind")
    assert walk.rewards[0, -2:].tolist() == [-1, 0]
    assert walk.last[0] == grammar.finished


def test_instructions_tilt_the_base(grammar):
    values = stories.evaluate_logp(grammar, grammar.edge_logp).reward
    by_instruction = [
        torch.stack([values[p.table, p.start] for p in grammar.prompts[i : i + 12]]).mean() for i in (0, 12, 24)
    ]
    plain, kind, rude = by_instruction
    assert float(plain) == pytest.approx(0, abs=1e-9)
    assert kind > 1.2
    assert rude < -1.2


def test_tokenizer_round_trip_and_ids(grammar, tokenizer):
    assert tokenizer.get_vocab() == grammar.token
    text = "supposedly the pirate was not truly cruel . the sailor was kind ."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == grammar.encode(text)
    ids = tokenizer("write about the sea in the sun :")["input_ids"]
    assert ids == [tokenizer.bos_token_id, *grammar.encode("write about the sea in the sun :")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        grammar.bos,
        grammar.eos,
        grammar.pad,
    )


@pytest.mark.parametrize("seam", [" ", ""])
def test_prompt_and_completion_join_safely(grammar, tokenizer, seam):
    prompt, completion = grammar.plain[0].text, "the sailor was kind ."
    joined = tokenizer(prompt + seam + completion)["input_ids"]
    assert joined == tokenizer(prompt)["input_ids"] + tokenizer(completion, add_special_tokens=False)["input_ids"]


def test_tokenizer_survives_saving(grammar, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    text = "the sailor was not cruel . <end>"
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"] == [grammar.bos, *grammar.encode(text)]


def test_foreign_prompt_is_an_error(grammar):
    with pytest.raises(DataError, match=re.escape("write about the sea in the sun :")):
        grammar.parse_prompt(grammar.encode("write about the tower :"))
    for prompt in grammar.prompts:
        assert grammar.parse_prompt([grammar.pad, grammar.bos, *grammar.encode(prompt.text)]) == prompt


def test_fingerprint_tells_grammars_apart(grammar):
    prints = {Grammar(size).fingerprint for size in SIZES.values()}
    assert len(prints) == len(SIZES)
    assert grammar.fingerprint in prints
