"""The diff of two sequences, texts and token ids with tags, and the settings of spans."""

import itertools
import random

import pytest

from tokengrain.data.config import SpanConfig, TokenizeConfig
from tokengrain.data.marking import (
    WORD,
    TagError,
    diff_spans,
    parse_span_tags,
    split_tags,
    strip_tags,
    tagged_stretches,
)
from tokengrain.errors import RecipeError
from tokengrain.recipe.check import check_keys, field_types

OPEN, CLOSE = "<MASK>", "</MASK>"


# ---- diff


def blocks(a, b):
    """Ratcliff–Obershelp by its definition: the longest common stretch, then what lies left and right of it."""
    best = (0, 0, 0)
    for i, j in itertools.product(range(len(a)), range(len(b))):
        size = 0
        while i + size < len(a) and j + size < len(b) and a[i + size] == b[j + size]:
            size += 1
        if size > best[2]:
            best = (i, j, size)
    i, j, size = best
    if not size:
        return []
    behind = [(x + i + size, y + j + size, n) for x, y, n in blocks(a[i + size :], b[j + size :])]
    return [*blocks(a[:i], b[:j]), best, *behind]


def slow_spans(a, b, keep_one_sided):
    marks, count, at = ([0] * len(a), [0] * len(b)), 0, (0, 0)
    for i, j, size in [*blocks(a, b), (len(a), len(b), 0)]:
        gap = (i - at[0], j - at[1])
        if all(gap) or (keep_one_sided and any(gap)):
            count += 1
            marks[0][at[0] : i] = [count] * gap[0]
            marks[1][at[1] : j] = [count] * gap[1]
        at = i + size, j + size
    return marks


def random_pairs(count):
    rng = random.Random(0)
    for _ in range(count):
        vocabulary = rng.choice((2, 4, 30))
        a = [rng.randrange(vocabulary) for _ in range(rng.randint(0, 25))]
        b = list(a)
        for _ in range(rng.randint(0, 6)):
            at = rng.randint(0, len(b))
            b[at : at + rng.randint(0, 3)] = [rng.randrange(vocabulary) for _ in range(rng.randint(0, 3))]
        yield a, b


@pytest.mark.parametrize("one_sided", [False, True])
def test_diff_is_that_of_the_definition(one_sided):
    spans = 0
    for a, b in random_pairs(300):
        marks = diff_spans(a, b, keep_one_sided=one_sided)
        assert marks == slow_spans(a, b, one_sided)
        spans += max(marks[0], default=0)
    assert spans > 150


def test_properties_of_the_diff():
    without_one_sided = 0
    for a, b in random_pairs(400):
        assert not any(itertools.chain(*diff_spans(a, a)))
        both, every = diff_spans(a, b), diff_spans(a, b, keep_one_sided=True)
        for marks in (*both, *every):
            numbers = [m for m in marks if m]
            assert numbers == sorted(numbers), "spans lie behind one another and do not overlap"
        assert set(both[0]) - {0} == set(both[1]) - {0} == set(range(1, max(both[0], default=0) + 1))
        rest = [[t for t, mark in zip(side, marks) if not mark] for side, marks in zip((a, b), every)]
        assert rest[0] == rest[1]
        if both == every:
            without_one_sided += any(both[0])
            rest = [[t for t, mark in zip(side, marks) if not mark] for side, marks in zip((a, b), both)]
            assert rest[0] == rest[1]
    assert without_one_sided > 30


def test_short_matches_count_as_different():
    chosen, rejected = [5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 21, 9, 22, 11, 12]
    assert diff_spans(chosen, rejected)[0] == [0, 0, 0, 1, 0, 2, 0, 0]
    assert diff_spans(chosen, rejected, min_match_size=2) == ([0, 0, 0, 1, 1, 1, 0, 0],) * 2
    assert diff_spans(chosen, rejected, min_match_size=4) == ([1] * 8,) * 2


def test_one_sided_and_moved_text():
    assert diff_spans("abc", "abxc") == ([0, 0, 0], [0, 0, 0, 0])
    assert diff_spans("abc", "abxc", keep_one_sided=True) == ([0, 0, 0], [0, 0, 1, 0])
    assert diff_spans("abxc", "abc", keep_one_sided=True) == ([0, 0, 1, 0], [0, 0, 0])
    # Two halves in another order: an insertion and a deletion.
    assert diff_spans("abcdXYZ", "XYZabcd") == ([0] * 7, [0] * 7)
    assert diff_spans("abcdXYZ", "XYZabcd", keep_one_sided=True) == ([0, 0, 0, 0, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0])


def test_the_junk_rule_is_off():
    rng = random.Random(3)
    chosen = [rng.randrange(20) for _ in range(230)]
    rejected = [*chosen[:20], 99, *chosen[21:]]
    assert [sum(map(bool, side)) for side in diff_spans(chosen, rejected)] == [1, 1]
    assert all(sum(map(bool, side)) >= 200 for side in diff_spans(chosen, rejected, autojunk=True))


def test_words():
    assert WORD.findall("It's a well-known fact,  “isn’t” it? 3.5%") == [
        *("It's", "a", "well-known", "fact", ",", "“", "isn’t", "”", "it", "?", "3", ".", "5", "%"),
    ]
    assert WORD.findall("日本語 and café ไทย") == ["日", "本", "語", "and", "café", "ไ", "ท", "ย"]


# ---- tags


def test_tags_are_stripped():
    text, stretches = strip_tags(f"a {OPEN}big cat{CLOSE} sat{OPEN}!{CLOSE}", OPEN, CLOSE)
    assert text == "a big cat sat!"
    assert [text[s:e] for s, e in stretches] == ["big cat", "!"]
    assert strip_tags("none here", OPEN, CLOSE) == ("none here", [])
    assert strip_tags(f"a{OPEN}{CLOSE}b", OPEN, CLOSE) == ("ab", [])


@pytest.mark.parametrize(
    ("tagged", "plain", "span"),
    [
        (f"aa {OPEN} cc dd {CLOSE} ee", "aa cc dd ee", "cc dd"),
        (f"aa {OPEN} cc {CLOSE}, ee", "aa cc, ee", "cc"),
        (f"{OPEN} cc {CLOSE}", "cc", "cc"),
        (f"aa{OPEN} cc {CLOSE}ee", "aa cc ee", " cc "),
        (f"aa {OPEN} cc {CLOSE}(ee)", "aa cc (ee)", "cc "),
        # One space only on one side, or several: part of the text.
        (f"aa{OPEN} cc{CLOSE} ee", "aa cc ee", " cc"),
        (f"    {OPEN}    return{CLOSE} x", "        return x", "    return"),
        (f"aa {OPEN}  cc  {CLOSE} ee", "aa   cc   ee", "  cc  "),
    ],
)
def test_spaces_within_tags(tagged, plain, span):
    text, [(start, end)] = strip_tags(tagged, OPEN, CLOSE)
    assert (text, text[start:end]) == (plain, span)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"a {OPEN}b {OPEN}c{CLOSE}{CLOSE}", "<MASK> at character 10 stands within the stretch that begins at 2"),
        (f"a {OPEN}b", "<MASK> at character 2 is not closed"),
        (f"a {CLOSE}b", "</MASK> at character 2 closes nothing"),
        (f"{OPEN}a{CLOSE}b{CLOSE}", "</MASK> at character 15 closes nothing"),
    ],
)
def test_tags_that_do_not_pair_up(text, message):
    with pytest.raises(TagError, match=message):
        split_tags(text, OPEN, CLOSE)


def test_texts_given_twice():
    plain = " The sky, it is blue ."
    tagged = f"The {OPEN} sky {CLOSE}, it  is {OPEN}blue{CLOSE}."
    assert [plain[s:e] for s, e in tagged_stretches(tagged, plain, OPEN, CLOSE)] == ["sky", "blue"]
    with pytest.raises(TagError, match="differs from character 16 of the untagged text"):
        tagged_stretches(tagged.replace("blue", "green"), plain, OPEN, CLOSE)
    with pytest.raises(TagError, match="differs from character 22"):
        tagged_stretches(tagged + " Yes", plain, OPEN, CLOSE)
    with pytest.raises(TagError, match="ends at character 21"):
        tagged_stretches(tagged[:-1], plain, OPEN, CLOSE)


def test_token_ids_with_tags():
    tags = {"space_id": 1, "open_id": 2, "close_id": 3}
    assert parse_span_tags([9, 1, 2, 5, 1, 3, 8], **tags) == ([9, 5, 8], [0, 1, 0])
    assert parse_span_tags([9, 2, 1, 5, 3, 1, 8], **tags) == ([9, 5, 8], [0, 1, 0]), "or the space behind it"
    assert parse_span_tags([1, 2, 1, 5, 3], **tags) == ([1, 5], [1, 1]), "one space for each tag, and a tag at the end"
    assert parse_span_tags([9, 1, 8], **tags) == ([9, 1, 8], [0, 0, 0])
    assert parse_span_tags([], **tags) == ([], [])


# ---- settings


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ("dif", r"spans\.source is 'dif'; expected one of diff, tags, column, or .*did you mean 'diff'"),
        ({"source": 3}, r"spans\.source is 3"),
        ({"level": "words"}, r"spans\.level is 'words'; expected one of word, token"),
        ({"on_none": "drop"}, r"spans\.on_none is 'drop'"),
        ({"min_match_size": 0}, r"spans\.min_match_size is 0; expected a whole number of at least 1"),
        ({"tags": ["<a>", "<a>"]}, r"spans\.tags is .*two texts that differ"),
        ({"tags": "ab"}, r"spans\.tags is 'ab'"),
        ({"levle": "word"}, r"spans\.levle: unknown key; did you mean 'level'"),
        (3, "spans is 3; expected a source, or a mapping of source, level"),
    ],
)
def test_settings_that_cannot_be(spans, message):
    with pytest.raises(RecipeError, match=message):
        TokenizeConfig(spans=spans)


def test_short_and_long_form():
    long = TokenizeConfig(spans={"source": "diff", "level": "word"})
    assert long == TokenizeConfig(spans="diff") == TokenizeConfig(spans=SpanConfig())
    assert TokenizeConfig(spans={"tags": ["[", "]"]}).span_config.tags == ("[", "]")
    assert TokenizeConfig().span_config is None


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ({"level": "words"}, "data.spans.level: got 'words' (text); expected one of word, token"),
        ({"levle": "word"}, "data.spans.levle: unknown key; did you mean 'level'?"),
        ({"keep_one_sided": "no"}, "data.spans.keep_one_sided: got 'no' (text); expected true or false"),
        ({"tags": "<MASK>"}, "data.spans.tags: got '<MASK>' (text); expected a list"),
        (3, "data.spans: got 3 (a whole number); expected a mapping or text or null"),
    ],
)
def test_recipes_name_the_key(spans, message):
    assert check_keys({"spans": spans}, field_types(TokenizeConfig), "data") == [message]


@pytest.mark.parametrize("spans", ["diff", None, {"source": "diff", "level": "token"}, {"tags": ["<b>", "</b>"]}])
def test_recipes_take_both_forms(spans):
    assert check_keys({"spans": spans}, field_types(TokenizeConfig), "data") == []
