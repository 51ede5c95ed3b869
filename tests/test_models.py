"""Models as they lie in folders: merged adapters, resized vocabularies, files that are not whole."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.scoring.test_as_people_have_them import SAMPLES, causal
from tests.tiny_vlms import FAMILIES, tiny_vlm
from tokengrain.batch import TokenBatch
from tokengrain.errors import ModelError
from tokengrain.models import (
    check_vocabulary,
    freeze_vision,
    load_config,
    load_model,
    load_reward_model,
    load_trained_reward_model,
    lora_config,
    trained,
)
from tokengrain.scoring.score import score
from tokengrain.specs import LoraSpec, ModelSpec
from tokengrain.training.critic import critic_model

SPEC = ModelSpec(path="unused")
TEXT = torch.tensor([[3, 4, 5, 6, 7, 40, 41, 62]])


def adapted(folder, base=None, *, tied: bool = False, more: int = 0, **settings):
    """A base model and a LoRA of it with random weights, saved; returns the adapter's folder and the two together."""
    base = base or causal("llama", tie_word_embeddings=tied)
    base.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    if more:
        base.resize_token_embeddings(64 + more, mean_resizing=False)
    model = get_peft_model(base, LoraConfig(r=2, **({"target_modules": ["q_proj"]} | settings)))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder / "adapter")
    return str(folder / "adapter"), model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [40, 41]},
        {},
    ],
    ids=lambda s: "-".join(map(str, s)) + str(len(str(s))),
)
def test_a_merged_adapter_is_the_same_model_and_stays_so(tmp_path, settings, tied):
    path, _ = adapted(tmp_path, tied=tied, **settings)
    with torch.no_grad():
        expected = load_model(SPEC, path).eval()(input_ids=TEXT).logits
        merged = load_model(SPEC, path, merge_adapter=True)
        torch.testing.assert_close(merged.eval()(input_ids=TEXT).logits, expected, atol=1e-4, rtol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        again = load_model(SPEC, str(tmp_path / "merged")).eval()(input_ids=TEXT).logits
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)
    assert trained(merged, whole=True).split(" of ")[0].removeprefix("trains ") in trained(merged).split(" of ")[1]
    assert all(p.requires_grad for p in merged.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_that_changes_the_model_is_an_error(tmp_path, monkeypatch, dtype):
    from peft.tuners.lora.layer import Linear

    path, _ = adapted(tmp_path, target_modules=["q_proj", "lm_head"])
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: self.base_layer.weight * 0.5)
    with pytest.raises(ModelError, match=r"adapter .* cannot be merged: the merged model gives other logits"):
        load_model(SPEC.model_copy(update={"dtype": dtype}), path, merge_adapter=True)


def test_a_reward_model_and_a_critic_from_an_adapter_train_their_decoders(tmp_path):
    path, _ = adapted(tmp_path)
    model = load_reward_model(SPEC, path, merge_adapter=True)
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in critic_model(load_model(SPEC, path, merge_adapter=True)).parameters())
    model.requires_grad_(False)
    with pytest.raises(ModelError, match="nothing in LlamaForTokenClassification can be trained: none of its"):
        trained(model)
    model.score.requires_grad_(True)
    with pytest.raises(ModelError, match=r"only score.weight of .* would be trained, 32 of"):
        trained(model, whole=True)


def test_an_adapter_loaded_to_be_asked_is_not_trained(tmp_path):
    path, _ = adapted(tmp_path, modules_to_save=["lm_head"])
    with pytest.raises(ModelError, match=r"would be trained|can be trained"):
        trained(load_model(SPEC, path))
    assert trained(load_model(SPEC, path, train_adapter=True)).startswith("trains ")


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["q_proj", "embed_tokens"], "tied": True}])
@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_trained_with_new_tokens_loads(tmp_path, settings, merge):
    path, model = adapted(tmp_path, more=2, **settings)
    text = torch.tensor([[3, 64, 4, 65, 5]])
    loaded = load_model(SPEC, path, merge_adapter=merge).eval()
    with torch.no_grad():
        found, expected = loaded(input_ids=text).logits, model(input_ids=text).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert load_config(SPEC, path).vocab_size == 66


def test_an_adapter_that_lacks_rows_of_its_new_tokens_is_an_error(tmp_path):
    path, _ = adapted(tmp_path, more=2, target_modules=["q_proj", "embed_tokens"])  # peft leaves the head out
    with pytest.raises(ModelError, match=r"was trained with 66 tokens .* of 64 and lacks the head of the new ones"):
        load_model(SPEC, path)


def test_an_adapter_that_does_not_fit_says_why(tmp_path):
    path, _ = adapted(tmp_path)
    causal("llama", hidden_size=16).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"does not fit its base model: .*size mismatch for .*torch.Size"):
        load_model(SPEC, path)


@pytest.mark.parametrize("settings", [{"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [4, 10]}])
def test_scores_with_an_adapter_on_the_embeddings(tmp_path, settings):
    _, model = adapted(tmp_path, **settings)
    sample = SAMPLES[0]
    ours = score(model, TokenBatch.from_samples([sample])).logps
    for completion, found in zip(sample.completions, ours.split([4, 3]), strict=True):
        logits = model(input_ids=torch.tensor([[*sample.prompt_ids, *completion.ids]])).logits[0]
        expected = logits.log_softmax(-1)[len(sample.prompt_ids) - 1 : -1]
        torch.testing.assert_close(found, expected.gather(1, torch.tensor(completion.ids)[:, None])[:, 0])


def saved(folder, change) -> str:
    from safetensors.torch import load_file, save_file

    causal("llama", tie_word_embeddings=False).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_weights_that_are_not_the_models_are_named(tmp_path):
    lacking = saved(tmp_path / "lacking", lambda w: w.pop("model.layers.0.mlp.up_proj.weight"))
    for load in (load_model, load_reward_model):
        with pytest.raises(ModelError, match=r"lack tensors of Llama\w+: model.layers.0.mlp.up_proj.weight$"):
            load(SPEC, lacking)
    other = saved(tmp_path / "other", lambda w: w.update({"model.surplus": torch.zeros(2)}))
    for load in (load_model, load_reward_model):
        with pytest.raises(ModelError, match=r"have tensors that are none of Llama\w+: model.surplus"):
            load(SPEC, other)
    headless = saved(tmp_path / "headless", lambda w: w.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"lack tensors of LlamaForCausalLM: lm_head.weight"):
        load_model(SPEC, headless)
    load_reward_model(SPEC, headless).save_pretrained(tmp_path / "reward")  # a new head was asked for
    load_trained_reward_model(str(tmp_path / "reward"))
    with pytest.raises(ModelError, match=r"lack tensors of LlamaForCausalLM: lm_head.weight"):
        load_model(SPEC, str(tmp_path / "reward"))


def test_a_damaged_file_of_weights_is_named(tmp_path):
    folder = saved(tmp_path / "m", lambda w: None)
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:4000])
    for load in (load_model, load_reward_model):
        with pytest.raises(ModelError, match=r"could be loaded from .*m: model.safetensors is damaged or incomplete"):
            load(SPEC, folder)
    file.unlink()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="no model could be loaded from"):
        load_model(SPEC, folder)


def test_a_tokenizer_longer_than_the_vocabulary_is_a_warning():
    config = causal("llama").config
    check_vocabulary(range(64), config, "t", "m")
    with pytest.warns(UserWarning, match="vocabulary of 64 tokens, the tokenizer of t has 65: rows may not use"):
        check_vocabulary(range(65), config, "t", "m")
    with pytest.raises(ModelError, match="the tokenizer of t has 640; they must share one tokenizer"):
        check_vocabulary(range(640), config, "t", "m")


class TestModelsThatSee:
    @pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "gemma3", "idefics3"])
    def test_they_load_with_their_towers(self, tmp_path, family):
        model = tiny_vlm(family, dtype=torch.float32)
        model.save_pretrained(tmp_path)
        loaded = load_model(SPEC, str(tmp_path))
        assert type(loaded) is type(model)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_lora_is_on_the_language_model_and_freezing_on_the_rest(self, family):
        model = tiny_vlm(family)
        decoder, head = model.get_decoder(), model.get_output_embeddings()
        language = {id(p) for part in (decoder, head) for p in part.parameters()}
        freeze_vision(model)
        assert {id(p) for p in model.parameters() if p.requires_grad} == language
        assert len(language) < len(list(model.parameters()))
        layers = sum(isinstance(m, torch.nn.Linear) for m in decoder.modules())
        adapted = get_peft_model(model, lora_config(LoraSpec(r=2), model))
        names = [name for name, p in adapted.named_parameters() if p.requires_grad]
        assert len(names) == 2 * layers
        assert not any("vis" in name or "project" in name or "connector" in name for name in names)
        named = lora_config(LoraSpec(r=2, target_modules=["q_proj"]), model)
        assert named.target_modules == {"q_proj"}

    def test_freezing_needs_something_to_freeze(self):
        with pytest.raises(ModelError, match="freeze is vision, and LlamaForCausalLM has no vision tower"):
            freeze_vision(causal("llama"))
        assert lora_config(LoraSpec(), causal("llama")).target_modules == "all-linear"


def test_a_module_to_save_must_be_there():
    model = causal("llama")
    for there in (["lm_head"], ["embed_tokens", "layers.0.mlp.up_proj"], ["score"]):
        assert lora_config(LoraSpec(modules_to_save=there), model).modules_to_save == there
    message = r"lora.modules_to_save has 'lm_haed', and LlamaForCausalLM has no such module; did you mean 'lm_head'\?"
    with pytest.raises(ModelError, match=message):
        lora_config(LoraSpec(modules_to_save=["embed_tokens", "lm_haed"]), model)


def test_weights_of_another_shape_are_named(tmp_path):
    causal("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 500}))
    with pytest.raises(ModelError, match=r"fit its config.json: \S+ has shape \[64, \d+\]; expected \[500, \d+\]"):
        load_model(SPEC, str(tmp_path))
