"""Prompts of encoders, several rejected completions, and token ids in the place of a text."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import MBart50Tokenizer, MBartTokenizer, PreTrainedTokenizerFast

from tests.data.tokenizers import byt5, merging_bpe, unigram
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs, prepare_sft
from tokengrain.data.tokens import tokenizer_fingerprint
from tokengrain.errors import DataError
from tokengrain.rollout.sampler import encode_prompts

ENCODER = TokenizeConfig(prompt_role="encoder")
ROW = {"prompt": "the sky is", "chosen": "blue and black", "rejected": "green"}


def around(single: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts special tokens around a text, as T5's and BART's do."""
    rules = merging_bpe().backend_tokenizer.to_str()  # a copy: the cached one stays as it is
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(rules),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    ids = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


def only(row: dict[str, Any], tokenizer: Any, config: TokenizeConfig = ENCODER, **options: Any) -> Any:
    (sample,) = prepare_pairs([row], tokenizer, config, **options).samples
    return sample


@pytest.mark.parametrize("tokenizer", [around("$A </s>"), around("<s> $A </s>"), byt5()], ids=["t5", "bart", "byt5"])
def test_prompt_and_completions_have_the_tokenizers_own_special_tokens(tokenizer):
    sample = only(ROW, tokenizer)
    assert sample.prompt_ids == tokenizer("the sky is")["input_ids"]
    for completion, name in zip(sample.completions, ("chosen", "rejected"), strict=True):
        assert completion.ids == tokenizer(text_target=ROW[name])["input_ids"]
        assert completion.ids[-1] == tokenizer.eos_token_id


def test_languages_of_mbart():
    words = ["<s>", "<pad>", "</s>", "<unk>", "▁the", "▁sky", "▁blue"]
    vocab = [(word, -float(i)) for i, word in enumerate(words)]
    row = {"prompt": "the sky", "chosen": "blue", "rejected": "the"}
    for cls in (MBartTokenizer, MBart50Tokenizer):
        tokenizer = cls(vocab=vocab, src_lang="en_XX", tgt_lang="ro_RO")
        english, romanian = tokenizer.convert_tokens_to_ids(["en_XX", "ro_RO"])
        sample, end = only(row, tokenizer), tokenizer.eos_token_id
        the, sky, blue = tokenizer.convert_tokens_to_ids(["▁the", "▁sky", "▁blue"])
        first = cls is MBart50Tokenizer  # its decoder is told the language; mBART's starts behind it
        assert sample.prompt_ids == ([english, the, sky, end] if first else [the, sky, end, english])
        assert [c.ids for c in sample.completions] == [[*([romanian] if first else []), w, end] for w in (blue, the)]
        other = cls(vocab=vocab, src_lang="en_XX", tgt_lang="de_DE")
        assert tokenizer_fingerprint(tokenizer, ENCODER) != tokenizer_fingerprint(other, ENCODER)


@pytest.mark.parametrize("tokenizer", [around("<s> $A </s>"), byt5()], ids=["offsets", "none"])
def test_character_spans_find_their_tokens(tokenizer):
    row = ROW | {"chosen_token_rewards": [{"start": 9, "end": 14, "reward": 1.0}], "rejected_token_rewards": []}
    sample = only(row, tokenizer)
    chosen = sample.completions[0]
    marked = [i for i, r in zip(chosen.ids, chosen.columns["token_rewards"], strict=True) if r]
    assert tokenizer.decode(marked).strip() == "black"
    assert chosen.columns["token_rewards"][-1] == 0.0


def test_cutting_keeps_the_language():
    vocab = [(word, -float(i)) for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "▁the", "▁sky", "▁blue"])]
    tokenizer = MBart50Tokenizer(vocab=vocab, src_lang="en_XX", tgt_lang="ro_RO")
    row = {"prompt": "the sky the sky the sky", "chosen": "blue", "rejected": "the"}
    for side, kept in (("left", ["▁the", "▁sky"]), ("right", ["▁the", "▁sky"])):
        config = TokenizeConfig(prompt_role="encoder", max_prompt_length=4, truncation_side=side)
        prompt = only(row, tokenizer, config).prompt_ids
        assert tokenizer.convert_ids_to_tokens(prompt) == ["en_XX", *kept, "</s>"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_cutting_keeps_all_that_begins_a_text(side):
    """Two tokens before every text, as GLM's tokenizer puts them; offline as online, and never twice."""
    tokenizer = around("<s> </s> $A")
    config = TokenizeConfig(max_prompt_length=4, truncation_side=side)
    for prompt in ("the sky is the sea", "<s></s>the sky is the sea"):
        ids = only({**ROW, "prompt": prompt}, tokenizer, config).prompt_ids
        assert (tokenizer.convert_ids_to_tokens(ids[:2]), len(ids)) == (["<s>", "</s>"], 4)
        assert tokenizer.decode(ids).count("<s>") == 1
        assert encode_prompts([{"prompt": prompt}], tokenizer, config)[0].ids[:2] == ids[:2]
        assert tokenizer.decode(encode_prompts([{"prompt": prompt}], tokenizer)[0].ids).count("<s>") == 1


def test_cutting_keeps_what_ends_a_prompt():
    tokenizer = around("<s> $A </s>")
    whole = only(ROW, tokenizer).prompt_ids
    for side in ("left", "right"):
        config = TokenizeConfig(prompt_role="encoder", max_prompt_length=len(whole) - 2, truncation_side=side)
        kept = only(ROW, tokenizer, config).prompt_ids
        assert (kept[0], kept[-1], len(kept)) == (whole[0], whole[-1], len(whole) - 2)


def test_positions_are_those_of_one_side():
    tokenizer = around("$A </s>")
    sample = only(ROW, tokenizer)
    longest = max(len(ids) for ids in (sample.prompt_ids, *(c.ids for c in sample.completions)))
    only(ROW, tokenizer, model_positions=longest)
    with pytest.raises(DataError, match="prompt or completion is longer than the model's positions"):
        only(ROW, tokenizer, model_positions=longest - 1)


def test_messages_need_a_template_and_are_split_at_the_prompts_end():
    tokenizer = around("$A </s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    row = {name: [{"role": role, "content": ROW[name]}] for name, role in zip(ROW, ("user", "assistant", "assistant"))}
    sample = only(row, tokenizer)
    assert tokenizer.decode(sample.prompt_ids) == "the sky is</s>"
    assert tokenizer.decode(sample.completions[0].ids) == "blue and black</s>"


@pytest.mark.parametrize("config", [ENCODER, TokenizeConfig()], ids=["encoder", "causal"])
def test_token_ids_are_used_as_they_are(config):
    tokenizer, beyond = around("$A </s>"), 100_000  # docids may lie beyond the tokenizer
    row = {"prompt": "the sky is", "chosen": [7, beyond, 5], "rejected": [[7, 8], [9]]}
    sample = only(row, tokenizer, config)
    assert [c.ids for c in sample.completions] == [[7, beyond, 5], [7, 8], [9]]
    text = tokenizer("the sky is")["input_ids"]
    assert sample.prompt_ids == (text if config is ENCODER else text[:-1])
    assert only({**row, "prompt": [3, 4]}, tokenizer, config).prompt_ids == [3, 4]
    (single,) = prepare_sft([{"prompt": "the sky is", "completion": [7, 8]}], tokenizer, config).samples
    assert single.completions[0].ids == [7, 8]
    with_numbers = {**row, "chosen_token_rewards": [1, 2, 3], "rejected_token_rewards": [[4, 5], [6]]}
    columns = [c.columns["token_rewards"] for c in only(with_numbers, tokenizer, config).completions]
    assert columns == [[1, 2, 3], [4, 5], [6]]


def test_several_rejected_completions_of_text():
    tokenizer = unigram()
    row = {"prompt": "the sky is", "chosen": " blue", "rejected": [" green", " black", " night"]}
    sample = only(row, tokenizer, TokenizeConfig())
    pairs = [only({**row, "rejected": other}, tokenizer, TokenizeConfig()) for other in row["rejected"]]
    assert all(p.prompt_ids == sample.prompt_ids for p in pairs)
    assert [c.ids for c in sample.completions] == [pairs[0].completions[0].ids, *(p.completions[1].ids for p in pairs)]
    assert sample.raw == row
    chat = TokenizeConfig(chat=True, chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert len(only(row, tokenizer, chat).completions) == 4


BAD = [
    ({"rejected": ["green", "blue"]}, r"field 'rejected\[1\]': is equal to 'chosen'"),
    ({"rejected": ["green", ""]}, r"field 'rejected\[1\]': completion is empty"),
    ({"rejected": [[3], [4]]}, r"field 'chosen': is text while the other completion is token ids"),
    ({"chosen": [3], "rejected": [[3], [4]]}, r"field 'rejected\[0\]': is equal to 'chosen'"),
    ({"chosen": [3], "rejected": [-4]}, "field 'rejected': has a negative token id; got -4"),
    ({"prompt": None, "rejected": ["green", "red"]}, "field 'prompt': the column is missing"),
    ({"prompt": None, "chosen": [1, 2], "rejected": [1, 3]}, "field 'prompt': the column is missing"),
    ({"rejected": ["green", "red"], "rejected_token_rewards": [0.1]}, "does not hold a list for each; .* 2 lists"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_errors(change, message):
    row = {"prompt": "the sky is", "chosen": "blue", "rejected": "green", **change}
    with pytest.raises(DataError, match=message):
        only(row, around("$A </s>"))


def test_spans_go_with_one_rejected_completion():
    row = {"prompt": "the sky is", "chosen": "blue", "rejected": ["green", "red"]}
    with pytest.raises(DataError, match="spans go with one rejected completion"):
        only(row, around("$A </s>"), TokenizeConfig(spans="diff"))
