"""Sampling with images: the prompt's cache shared by its completions, positions, placeholders, servers, branches."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.rollout.stub import serving
from tests.scoring.models import tiny
from tests.tiny_vlms import FAMILIES, mark, picture, processor, prompt, tiny_vlm
from tests.training.online.tiny import make_online
from tokengrain.batch import TokenBatch
from tokengrain.errors import ModelError, RolloutError
from tokengrain.rollout.branching import Branching
from tokengrain.rollout.client import ServerError
from tokengrain.rollout.local import HFContinuous, HFGenerate
from tokengrain.rollout.sampler import PromptItem, SamplingConfig, encode_prompts
from tokengrain.rollout.server import OpenAIServer
from tokengrain.scoring.score import score
from tokengrain.scoring.vision import placeholders

SIZES = {"a": [(32, 32)], "b": [(16, 32), (32, 48)], "c": []}
NEVER = SamplingConfig(temperature=0, max_new_tokens=6, stop_ids=())
QWEN = "qwen2_5_vl"


def items(family: str) -> list[PromptItem]:
    """Prompts of several lengths, with one, two and no images."""
    made = [prompt(family, sizes, "what is this ?", seed=len(sizes)) for sizes in SIZES.values() if sizes]
    plain = processor(family).tokenizer("red blue a b c")["input_ids"]
    found = [PromptItem(ids, row=row, vision=vision) for row, (ids, vision) in zip(SIZES, made)]
    return [*found, PromptItem(plain, row="c")]


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_those_of_the_model(family):
    """Greedy completions and their log-probabilities: those of `generate`, and those that scoring gives."""
    model, asked = tiny_vlm(family), items(family)
    shared = HFGenerate(model).sample(asked, n=2, sampling=NEVER)
    assert shared.metrics == {"rollout/shared_prefill": 1.0}
    anew = HFGenerate(model, cache="static").sample(asked[:1], n=2, sampling=NEVER)
    alone = [HFGenerate(model).sample([item], n=1, sampling=NEVER).completions[0] for item in asked]
    for group, own in zip(shared.groups, alone):
        assert [c.ids for c in group] == [own.ids] * 2
    assert [c.ids for c in anew.completions] == [alone[0].ids] * 2
    drawn = HFGenerate(model).sample(asked, n=2, sampling=SamplingConfig(max_new_tokens=6, stop_ids=()))
    for found in (shared, drawn):
        batch = found.to_batch()
        logps = score(model, batch, ("logps",)).logps
        torch.testing.assert_close(batch.columns["raw_logps"].to(logps), logps, atol=2e-6, rtol=0)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_a_placeholder_is_never_drawn(family):
    """Of a policy that loves it; log-probabilities are those of what is left."""
    model, (item, *_) = tiny_vlm(family), items(family)
    token = next(iter(placeholders(model.config)))
    others = [i for i in range(model.config.get_text_config().vocab_size) if i not in placeholders(model.config)]
    bias = torch.zeros(len(others) + len(placeholders(model.config)), dtype=torch.float64)
    bias[token] = 20.0
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    sampling = SamplingConfig(max_new_tokens=8, stop_ids=())
    for how in (sampling, SamplingConfig(max_new_tokens=8, stop_ids=(), temperature=0.7, top_p=0.9), NEVER):
        found = HFGenerate(model).sample([item], n=4, sampling=how)
        assert {i for c in found.completions for i in c.ids}.isdisjoint(placeholders(model.config))
    drawn = HFGenerate(model).sample([item], n=4, sampling=sampling)
    with torch.no_grad():
        texts = [torch.tensor([item.ids + c.ids]) for c in drawn.completions]
        kinds = {"mm_token_type_ids": None} if family == "qwen2_vl" else {}
        for text, completion in zip(texts, drawn.completions):
            given = dict(item.vision.inputs)
            if kinds:
                given["mm_token_type_ids"] = torch.cat([item.vision.types, torch.zeros(8, dtype=torch.long)])[None]
            logits = model(input_ids=text, **{k: v.double() if v.is_floating_point() else v for k, v in given.items()})
            logits = logits.logits[0, len(item.ids) - 1 : -1]
            left = torch.full_like(logits, -torch.inf).index_copy(1, torch.tensor(others), logits[:, others])
            wanted = left.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.sampling_logps).double(), wanted, atol=1e-5, rtol=0)
            raw = logits.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.raw_logps).double(), raw, atol=1e-5, rtol=0)


def test_scoring_is_the_same_after_sampling():
    """Qwen's models keep a difference of positions of the last prefill."""
    model = tiny_vlm(QWEN)
    batch = HFGenerate(model).sample(items(QWEN), n=1, sampling=NEVER).to_batch()
    before = score(model, batch, ("logps",)).logps
    HFGenerate(model, cache="static").sample(items(QWEN)[1:2], n=1, sampling=NEVER)
    assert torch.equal(score(model, batch, ("logps",)).logps, before)


def test_batches_do_not_matter_and_count_patches():
    model, asked = tiny_vlm(QWEN), items(QWEN)
    asked[1] = replace(asked[1], vision=replace(asked[1].vision, patches=100))
    how = SamplingConfig(max_new_tokens=5, stop_ids=())
    whole = HFGenerate(model).sample(asked, n=3, sampling=how)
    sampler = HFGenerate(model, max_batch_tokens=150)
    parts = sampler._batches(asked, 3, 5)
    assert [([asked[p].row for p in chosen], len(copies)) for chosen, copies in parts[:3]] == [(["b"], 1)] * 3
    assert [c.ids for c in sampler.sample(asked, n=3, sampling=how).completions] == [c.ids for c in whole.completions]


def test_branches_keep_the_images():
    model, asked = tiny_vlm(QWEN), items(QWEN)[:2]
    sampler = Branching(HFGenerate(model), model, window=1, quantile=0.5, per_completion=2)
    found = sampler.sample(asked, n=2, sampling=SamplingConfig(max_new_tokens=6, stop_ids=()))
    batch = found.to_batch()
    assert any(c.context for c in found.completions)
    assert [v.fingerprint for v in batch.vision] == [item.vision.fingerprint for item in asked]
    logps = score(model, batch, ("logps",)).logps
    torch.testing.assert_close(batch.columns["raw_logps"].to(logps), logps, atol=2e-6, rtol=0)


def test_prompts_that_do_not_fit_are_refused():
    model, (item, *_) = tiny_vlm(QWEN), items(QWEN)
    blind = PromptItem(item.ids, row="x")
    with pytest.raises(RolloutError, match="row x: the prompt has tokens that stand for images in Qwen2_5_VL"):
        HFGenerate(model).sample([blind], n=1, sampling=NEVER)
    with pytest.raises(RolloutError, match=r"row a: the prompt has images or videos, and .* reads text alone"):
        HFGenerate(tiny("llama")).sample([item], n=1, sampling=NEVER)
    with pytest.raises(ModelError, match=r"stand for images, which continuous batching could draw, .*the sampler 'hf'"):
        HFContinuous(model)


# ---- A server


def png() -> bytes:
    content = io.BytesIO()
    picture(1).save(content, "PNG")
    return content.getvalue()


def test_a_server_is_sent_the_images_of_a_chat():
    row = {"prompt": [{"role": "user", "content": "what is this ?"}], "images": [{"bytes": png(), "path": None}]}
    (item,) = encode_prompts([row], processor(QWEN))
    assert item.vision is not None
    logprobs = {"content": [{"token": "token_id:8", "logprob": -0.5}, {"token": "token_id:3", "logprob": -0.25}]}
    choices = [{"index": i, "token_ids": [8, 3], "logprobs": logprobs, "finish_reason": "stop"} for i in range(2)]
    answers = {"choices": choices, "prompt_token_ids": item.ids}
    with serving(lambda path, body: answers) as stub:
        server = OpenAIServer(stub.url, processor(QWEN).tokenizer, model="m", retries=0)
        (group,) = server.sample([item], n=2, sampling=SamplingConfig(max_new_tokens=4)).groups
        assert [c.ids for c in group] == [[8, 3]] * 2
        assert group[0].sampling_logps == [-0.5, -0.25]
        path, body = stub.requests[0]
        assert path == "/v1/chat/completions"
        image, text = body["messages"][0]["content"]
        assert text == {"type": "text", "text": "what is this ?"}
        content = base64.b64decode(image["image_url"]["url"].partition(",")[2])
        assert Image.open(io.BytesIO(content)).tobytes() == picture(1).tobytes()
        pad = str(processor(QWEN).image_token_id)
        assert body["logit_bias"] == {pad: -100}
        assert "prompt" not in body
        json.dumps(body)
        answers["prompt_token_ids"] = item.ids[:-1]
        with pytest.raises(RolloutError, match=r"row 0: .*the server read another prompt \(.* tokens, ours has .*\)"):
            server.sample([item], n=2, sampling=SamplingConfig(max_new_tokens=4))
        answers["prompt_token_ids"] = item.ids
        choices[1] = {**choices[1], "token_ids": [int(pad), 3]}
        with pytest.raises(RolloutError, match=r"completion has token .*, which stands for an image"):
            server.sample([item], n=2, sampling=SamplingConfig(max_new_tokens=4))
        for other, flavour, why in (
            (item.then([8], "y"), "vllm", "row y: .* a server writes no such prompt as it is; expected whole messages"),
            (item, "sglang", "row 0: the prompt has images, which are sent to vLLM only; expected the sampler 'hf'"),
        ):
            server = OpenAIServer(stub.url, processor(QWEN).tokenizer, model="m", retries=0, flavour=flavour)
            with pytest.raises(RolloutError, match=why):
                server.sample([other], n=1, sampling=SamplingConfig(max_new_tokens=4))


def test_a_server_without_images_is_found_before_training(tmp_path):
    """By the first prompt that has some, wherever it stands; without any nothing is asked."""
    seen = {"prompt": [{"role": "user", "content": "what is this ?"}], "images": [{"bytes": png(), "path": None}]}
    items = encode_prompts([{"prompt": "a b", "id": "text"}, {**seen, "id": "seen"}], processor(QWEN))
    answers = {"choices": [{"index": 0, "token_ids": [8], "logprobs": {"content": [{"logprob": -0.5}]}}]}
    answers["choices"][0]["finish_reason"] = "length"
    known = {"/v1/models": {"data": [{"id": "m"}]}, "/v1/chat/completions": answers}
    with serving(lambda path, body: known[path]) as stub:
        given = {"name": "server", "url": stub.url, "model": "m", "retries": 0, "refresh": "checkpoint"}

        def online(rows):
            own = {"train_dataset": rows, "processing_class": processor(QWEN), "sampler": given}
            make_online(tmp_path, model=tiny_vlm(QWEN, dtype=torch.float32), **own)

        answers["prompt_token_ids"] = items[1].ids
        online(items)
        (body,) = (body for path, body in stub.requests if path == "/v1/chat/completions")
        assert (body["max_tokens"], body["n"]) == (1, 1)
        answers["prompt_token_ids"] = [8]
        with pytest.raises(ServerError, match=r"row seen: .*the server read another prompt \(1 tokens"):
            online(items)
        stub.requests.clear()
        online(items[:1])
        assert "/v1/chat/completions" not in {path for path, _ in stub.requests}
        stub.answer = lambda path, body: known["/v1/models"] if path == "/v1/models" else {}["chat"]
        what = r"sampler 'server': row seen: .*/v1/chat/completions: status 404: no 'chat'; expected a server that is "
        with pytest.raises(ServerError, match=what + "sent images, of the model being trained, or the sampler 'hf'"):
            online(items)
        given["flavour"] = "sglang"
        with pytest.raises(RolloutError, match="row seen: the prompt has images, which are sent to vLLM only"):
            online(items)


def test_text_prompts_hold_their_images_too():
    (item,) = encode_prompts([{"prompt": f"a {mark('gemma3')} b", "images": [picture(1)]}], processor("gemma3"))
    assert item.messages is None
    batch = TokenBatch.from_samples([item.sample([])])
    assert batch.vision[0].fingerprint == item.vision.fingerprint
