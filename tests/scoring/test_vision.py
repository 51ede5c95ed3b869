"""Scoring of prompts with images and videos, on tiny models of ten families, against each text's own forward pass."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import tokengrain.scoring.model
import tokengrain.scoring.vision
from tests.scoring.models import tiny
from tests.tiny_vlms import FAMILIES, QWEN, SPECIAL, prompt, tiny_vlm, tokenizer, video_prompt
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import DataError, ModelError
from tokengrain.method import make_credit
from tokengrain.methods._other_tokens import Retokenizer
from tokengrain.models import freeze_vision, load_trained_reward_model, lora_config, reward_model_from
from tokengrain.rollout.local import HFGenerate
from tokengrain.rollout.sampler import PromptItem, SamplingConfig
from tokengrain.scoring.layouts import plan_rows
from tokengrain.scoring.prepare import PLANS
from tokengrain.scoring.reference import AdapterOffReference, resolve_reference
from tokengrain.scoring.score import score
from tokengrain.scoring.token_scores import frozen_token_scores
from tokengrain.scoring.vision import arguments
from tokengrain.specs import LoraSpec
from tokengrain.vision import Vision

FEW = ("qwen3_vl", "llava_onevision", "idefics3", "gemma3")
SOME = [family if family in FEW else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
ONE = SamplingConfig(max_new_tokens=1, stop_ids=())
VIDEOS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video")


def answers(*lengths: int) -> list[Completion]:
    """Completions of text tokens."""
    return [Completion([4 + (7 * i + 3 * t) % 16 for t in range(n)]) for i, n in enumerate(lengths)]


def pictures(family: str) -> list[Sample]:
    """A prompt with one image, one with none, and one with two of other sizes. (LLaVA's begin with an image.)"""
    one, two = prompt(family, [(32, 32)], "what is this ?"), prompt(family, [(32, 48), (16, 32)], "a b c", seed=1)
    return [
        Sample(one[0], answers(4, 6), row="one", vision=one[1]),
        Sample([4, 5, 6], answers(2, 3), row="none"),
        Sample(two[0], answers(5, 3, 1), row="two", vision=two[1]),
    ]


def films(family: str) -> list[Sample]:
    """Two videos of different lengths, and a picture."""
    parts = [
        video_prompt(family, 4, "what is this ?"),
        video_prompt(family, 6, "a b", 1),
        prompt(family, [(32, 32)], "a"),
    ]
    return [Sample(ids, answers(3, 5), row=i, vision=vision) for i, (ids, vision) in enumerate(parts)]


def pixels(vision: Vision, dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in vision.inputs.items()}


def own(model: Any, samples: list[Sample]) -> Tensor:
    """What the model's own forward says of each text alone, its pictures given as the processor gives them."""
    family, found = model.config.model_type, []
    for sample in samples:
        for completion in sample.completions:
            ids, more = [*sample.prompt_ids, *completion.ids], {}
            if sample.vision is not None:
                more = pixels(sample.vision, model.dtype)
                types = sample.vision.types
                if types is None and SPECIAL[family] is QWEN:
                    types = 2 * (torch.tensor(sample.prompt_ids) == model.config.video_token_id).long()
                if types is not None:
                    name = "token_type_ids" if family == "gemma3" else "mm_token_type_ids"
                    more[name] = torch.cat([types, types.new_zeros(len(completion.ids))])[None]
            logits = type(model).forward(model, input_ids=torch.tensor([ids]), **more).logits[0]
            logps = logits[len(sample.prompt_ids) - 1 : -1].log_softmax(-1)
            found.append(logps.gather(1, torch.tensor(completion.ids)[:, None])[:, 0])
    return torch.cat(found)


def gradients(model: Any, value: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(value.sum(), list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found, strict=True)]


def furthest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of gradients, relative to the largest gradient."""
    largest = max(float(g.abs().max()) for g in theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / largest


def logps(model: Any, samples: list[Sample], layout: Any = "shared") -> Tensor:
    found = score(model, TokenBatch.from_samples(samples), layout=layout).logps
    assert found is not None
    return found


def packed(*args: Any, **kwargs: Any) -> Any:
    return plan_rows(*args, **(kwargs | {"pack": True}))


def check(model: Any, samples: list[Sample], tolerance: float = 1e-12) -> None:
    """Shared, separate and automatic rows, and packed ones, against the model's own forward."""
    expected = own(model, samples)
    theirs, expected = gradients(model, expected), expected.detach()
    tower = [g for (n, _), g in zip(model.named_parameters(), theirs, strict=True) if "vis" in n or "project" in n]
    assert tower
    assert any(g.any() for g in tower)
    for layout in ("shared", "separate"):
        ours = logps(model, samples, layout)
        assert float((ours.detach() - expected).abs().max()) < tolerance, layout
        assert furthest(gradients(model, ours), theirs) < max(1e-6, 1e2 * tolerance), layout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokengrain.scoring.model, "plan_rows", packed)
        assert float((logps(model, samples).detach() - expected).abs().max()) < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_images(family: str) -> None:
    check(tiny_vlm(family), pictures(family))


@pytest.mark.parametrize("family", VIDEOS)
def test_videos(family: str) -> None:
    check(tiny_vlm(family), films(family))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_images_in_float32_and_in_eager_attention(family: str) -> None:
    check(tiny_vlm(family, dtype=torch.float32), pictures(family), 2e-5)
    check(tiny_vlm(family, dtype=torch.float32, attention="eager"), pictures(family), 2e-5)
    check(tiny_vlm(family, attention="eager"), pictures(family), 1e-6)  # float64, with a softmax in float32


@pytest.mark.parametrize("family", SOME)
def test_a_reward_model_that_sees(family: str, tmp_path: Path) -> None:
    """Made of a model in memory; scores at the token, and values before it, are those of its own forward."""
    torch.manual_seed(0)
    model, samples = reward_model_from(tiny_vlm(family)).eval(), pictures(family)
    batch, expected = TokenBatch.from_samples(samples), {"token_scores": [], "values": []}
    for sample in samples:
        for completion in sample.completions:
            ids, more = torch.tensor([sample.prompt_ids + completion.ids]), {}
            if sample.vision is not None:
                more = arguments(model, torch.tensor(sample.prompt_ids), sample.vision, len(completion.ids))
            scores = model(input_ids=ids, **more).logits[0, :, 0].detach()
            expected["token_scores"].append(scores[len(sample.prompt_ids) :])
            expected["values"].append(scores[len(sample.prompt_ids) - 1 : -1])
    for layout in ("shared", "separate"):
        for want, parts in expected.items():
            found = getattr(score(model, batch, (want,), layout=layout), want).detach()
            assert float((found - torch.cat(parts)).abs().max()) < 1e-12, (layout, want)
    model.save_pretrained(tmp_path)
    again = load_trained_reward_model(tmp_path, dtype="float32")
    assert type(again) is type(model)
    assert float((frozen_token_scores(again, batch) - torch.cat(expected["token_scores"])).abs().max()) < 1e-4


class TestMutualImageTokens:
    """Gemma 3 lets the tokens of one image see each other."""

    def blocks(self, model: Any) -> list[bool]:
        """By plan for images."""
        plans = [plan for key, plan in vars(model)[PLANS].items() if isinstance(key[0], frozenset)]
        return [plan.masks.blocks for plan in plans]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_the_probe_finds_them(self, dtype: torch.dtype) -> None:
        for family, expected in (("gemma3", True), ("llava", False)):
            model = tiny_vlm(family, dtype=dtype)
            logps(model, pictures(family))
            assert self.blocks(model) == [expected]

    def test_a_window_cuts_the_image_before_not_after(self) -> None:
        for window in (3, 2):  # an image has 4 tokens
            model = tiny_vlm("gemma3", sliding_window=window)
            check(model, pictures("gemma3"))
            assert self.blocks(model) == [True]

    def test_a_causal_mask_is_wrong_by_much(self) -> None:
        model = tiny_vlm("gemma3")
        expected = logps(model, pictures("gemma3"))
        plans = vars(model)[PLANS]
        for key, plan in plans.items():
            plans[key] = type(plan)(**{**vars(plan), "masks": type(plan.masks)(plan.masks.windows)})
        assert float((logps(model, pictures("gemma3")) - expected).detach().abs().max()) > 1e-3


def test_what_shares_text_but_not_images_runs_separately_and_says_so() -> None:
    """A model that makes its own causal mask where there are images."""
    model = tiny_vlm("llava")

    def own_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return (args, kwargs | {"attention_mask": None}) if "mm_encoder_outputs" in kwargs else None

    model.model.register_forward_pre_hook(own_mask, with_kwargs=True)
    samples = pictures("llava")
    with pytest.warns(UserWarning, match="cannot share prompts with images: hidden states differ from those of each"):
        found = logps(model, samples, "auto")
    assert float((found - own(model, samples)).detach().abs().max()) < 1e-12
    with pytest.raises(ModelError, match="cannot share prompts with images"):
        logps(model, samples, "shared")
    text = [sample for sample in samples if sample.vision is None]
    assert float((logps(model, text, "shared") - own(model, text)).detach().abs().max()) < 1e-12


def calls(model: Any) -> list[int]:
    """Counts, from now on, passes through the vision tower."""
    names = ("visual", "vision_tower", "vision_model")
    found = next(module for name, module in model.named_modules() if name.endswith(names))
    count = [0]
    found.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    return count


class Odd(LlavaForConditionalGeneration):
    """Its logits with images are not its head's alone."""

    def forward(self, **inputs: Any) -> Any:
        found = super().forward(**inputs)
        found.logits = found.logits * (1.5 if {"pixel_values", "mm_encoder_outputs"} & set(inputs) else 1.0)
        return found


def test_a_head_that_is_other_with_images_is_left_to_the_model() -> None:
    model, (one, text, two) = tiny_vlm("llava"), pictures("llava")
    model.__class__ = Odd
    expected = own(model, [one, two])
    with pytest.warns(UserWarning, match="with images its logits are not its head's alone"):
        found = logps(model, [one, two], "auto")
    assert float((found - expected).detach().abs().max()) < 1e-12
    assert float((logps(model, [text]) - own(model, [text])).detach().abs().max()) < 1e-12


class TestTower:
    @pytest.mark.parametrize("family", SOME)
    def test_it_runs_once_for_all_rows(self, family: str) -> None:
        model, samples = tiny_vlm(family), pictures(family)
        logps(model, samples)  # probes
        count = calls(model)
        batch = TokenBatch.from_samples([*samples, samples[0].again(answers(5), row="again")])
        score(model, batch, layout="separate", max_row_tokens=1)
        assert count == [1]

    def test_it_sees_the_picture_that_belongs_to_the_prompt(self) -> None:
        """Whatever is selected, split and put into another order."""
        for family in ("qwen2_5_vl", "idefics3", "llava"):
            model, samples = tiny_vlm(family), pictures(family)
            other, vision = prompt(family, [(32, 32)], "a b a b", seed=9)
            samples.append(Sample(other, answers(3), row="other", vision=vision))
            batch = TokenBatch.from_samples(samples)
            each = dict(zip(batch.rows, (logps(model, [s]) for s in samples), strict=True))
            parts = [batch.select([3, 0, 2, 1]), *batch.split(60), TokenBatch.from_samples(samples[::-1])]
            for part in parts:
                found = score(model, part).logps
                assert found is not None
                torch.testing.assert_close(found, torch.cat([each[row] for row in part.rows]), rtol=0, atol=1e-12)


def test_scoring_forgets_what_was_generated_before() -> None:
    """Qwen-VL keeps `rope_deltas` of the last prompt it continued."""
    for family in ("qwen2_5_vl", "qwen3_vl", "gemma3"):
        model, samples = tiny_vlm(family), pictures(family)
        before = [logps(model, samples), logps(model, samples[1:2])]
        one = samples[0].vision
        assert one is not None
        name = "token_type_ids" if family == "gemma3" else "mm_token_type_ids"
        assert one.types is not None
        more = {**pixels(one, model.dtype), name: one.types[None]}
        model.generate(input_ids=torch.tensor([samples[0].prompt_ids]), **more, max_new_tokens=3, do_sample=False)
        assert torch.equal(logps(model, samples), before[0])
        assert torch.equal(logps(model, samples[1:2]), before[1])


def test_an_image_takes_fewer_positions_than_tokens() -> None:
    """16 tokens of an image of 4 x 4 take 4 positions: 27 tokens reach position 15."""
    ids, vision = prompt("qwen2_vl", [(64, 64)], "a b c")
    assert len(ids) == 21
    samples = [Sample(ids, answers(6), row="r", vision=vision)]
    assert logps(tiny_vlm("qwen2_vl", max_position_embeddings=15), samples).shape == (6,)
    with pytest.raises(ModelError, match=r"row r: .* need 15 positions; expected at most 14"):
        logps(tiny_vlm("qwen2_vl", max_position_embeddings=14), samples)


class TestErrors:
    def test_placeholders_without_pictures(self) -> None:
        samples = pictures("llava")
        samples[2].vision = None
        message = (
            r"row two: the prompt has \d+ tokens that stand for images or videos in LlavaForConditionalGeneration, "
        )
        with pytest.raises(ModelError, match=message + "and comes without them"):
            logps(tiny_vlm("llava"), samples)

    @pytest.mark.parametrize("family", SOME)
    def test_pictures_that_do_not_fit(self, family: str) -> None:
        """Those of two prompts exchanged: together they fit, and each of them does not."""
        model, samples = tiny_vlm(family), pictures(family)
        logps(model, samples)
        samples[0].vision, samples[2].vision = samples[2].vision, samples[0].vision
        wrong = r"the prompt has \d+ tokens for images, and its images make \d+;|the vision is not this prompt"
        with pytest.raises(ModelError, match="row one: " + wrong):
            logps(model, samples)

    def test_pictures_without_placeholders(self) -> None:
        samples = pictures("llava")
        samples[1].vision = samples[0].vision
        with pytest.raises(ModelError, match="row none: the prompt has 0 tokens for images, and its images make 4"):
            logps(tiny_vlm("llava"), samples)

    def test_a_placeholder_in_a_completion(self) -> None:
        model, samples = tiny_vlm("gemma3"), pictures("gemma3")
        samples[1].completions[1].ids[0] = model.config.image_token_id
        message = "row none: a completion holds token .*, which stands for an image in Gemma3ForConditionalGeneration"
        with pytest.raises(ModelError, match=message):
            logps(model, samples)

    def test_a_processor_of_another_model(self) -> None:
        model, samples = tiny_vlm("qwen2_5_vl"), pictures("qwen2_5_vl")
        model.config.image_token_id = 0  # the processor's is another one
        what = r"the processor writes token \d+ for images and videos, and Qwen2_5_VLModel has them in the place of 0, "
        with pytest.raises(ModelError, match=what + r"\d+ \(its image_token_id\); expected the model's own processor"):
            logps(model, samples)
        with pytest.raises(ModelError, match=what):
            HFGenerate(model).sample([PromptItem(samples[0].prompt_ids, vision=samples[0].vision)], n=1, sampling=ONE)

    def test_a_credit_that_puts_text_in_the_prompts_place(self) -> None:
        batch = TokenBatch.from_samples(pictures("llava")[:2])
        source = make_credit("contrastive", model=tiny("llama"), tokenizer=tokenizer("llava"))
        with pytest.raises(DataError, match="row one: the prompt's images do not say where their tokens stand"):
            source(batch)
        with pytest.raises(DataError, match="row one: the prompt has images or videos, and the reward model reads"):
            Retokenizer(tokenizer("llava"), tokenizer("gemma3"))(batch)

    def test_a_model_without_eyes(self) -> None:
        samples = [Sample([4, 5], answers(2), vision=pictures("llava")[0].vision)]
        with pytest.raises(ModelError, match="LlamaForCausalLM takes no images or videos, and the batch has some"):
            logps(tiny("llama"), samples)


def test_nothing_is_said_where_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logps(tiny_vlm("qwen2_5_vl"), pictures("qwen2_5_vl"), "auto")


class TestFrozenTower:
    """Its features are computed once for policy and reference, whatever comes first."""

    def policy(self, adapter: bool) -> tuple[Any, Any]:
        """A policy whose tower is frozen, and its reference."""
        model = tiny_vlm("qwen2_5_vl")
        if not adapter:
            freeze_vision(model)
            return model, resolve_reference(None, model, {"ref_logps"}, False)
        policy = get_peft_model(model, lora_config(LoraSpec(r=2), model))
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                parameter.add_(0.1 * ("lora_B" in name))
        return policy, AdapterOffReference(policy)

    @pytest.mark.parametrize("adapter", [False, True])
    def test_it_runs_once_for_policy_and_reference(self, adapter: bool) -> None:
        policy, reference = self.policy(adapter)
        samples = pictures("qwen2_5_vl")
        batch = TokenBatch.from_samples(samples)
        expected = logps(policy, samples), reference(batch, {"logps"}).logps
        assert adapter == (not torch.equal(expected[0].detach(), expected[1]))
        counts = [calls(model) for model in ([policy] if adapter else [policy, reference.model])]
        again = TokenBatch.from_samples(pictures("qwen2_5_vl"))
        found = score(policy.train(), again).logps, reference(again, {"logps"}).logps
        assert sum(c[0] for c in counts) == 1
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        # Everything is where it is trained, and nothing where it is not.
        seen = {name for name, p in policy.named_parameters() if p.requires_grad}
        assert not any("visual" in name for name in seen)
        gradients = torch.autograd.grad(found[0].sum(), [p for p in policy.parameters() if p.requires_grad])
        assert all(g.any() for g in gradients)

    def test_what_is_remembered_is_forgotten_when_the_tower_changes(self) -> None:
        policy, _ = self.policy(False)
        samples = pictures("qwen2_5_vl")
        before = logps(policy, samples)
        weight = policy.model.visual.patch_embed.proj.weight
        weight.data *= 1.1  # in a way that autograd does not notice
        changed = logps(policy, samples)
        assert float((changed - before).detach().abs().max()) > 1e-3
        assert float((changed.detach() - own(policy, samples).detach()).abs().max()) < 1e-12

    def test_a_trained_or_random_tower_is_asked_again(self) -> None:
        model, samples = tiny_vlm("llava"), pictures("llava")
        logps(model, samples)
        count = calls(model)
        logps(model, samples)
        model.model.vision_tower.requires_grad_(False)  # the projector is trained
        logps(model, samples)
        assert count == [2]
        freeze_vision(model)
        for module in model.model.vision_tower.modules():
            module.dropout = 0.5 if hasattr(module, "dropout") else None
        model.train()
        logps(model, samples)
        assert logps(model, samples) is not None
        assert count == [4]

    def test_room_is_limited(self, monkeypatch: pytest.MonkeyPatch) -> None:
        policy, _ = self.policy(False)
        samples = pictures("qwen2_5_vl")
        logps(policy, samples)
        count = calls(policy)
        monkeypatch.setattr(tokengrain.scoring.vision, "KEPT_BYTES", 7 * 32 * 8)  # the second prompt's 7 tokens
        again = pictures("qwen2_5_vl")
        logps(policy, again)
        logps(policy, again[2:])
        assert count == [1]
        logps(policy, again[:1])
        assert count == [2]

    def test_a_reference_that_follows_leaves_what_is_shared_alone(self) -> None:
        policy, reference = self.policy(False)
        weight = policy.model.visual.patch_embed.proj.weight
        assert reference.model.model.visual.patch_embed.proj.weight is weight
        before = weight.clone()
        reference.move(policy, 0.5)
        assert torch.equal(weight, before)
