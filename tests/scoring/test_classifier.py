"""`token_scores` of token-classification models with one label, against plain transformers."""

import copy

import pytest
import torch
import transformers

from tests.scoring.models import COMMON, gradients, small_batch, standard_batch, texts, tiny
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import ModelError
from tokengrain.scoring.layouts import RowCosts, plan_rows
from tokengrain.scoring.prepare import causal_lm, prepare
from tokengrain.scoring.score import head_of, score

TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 5e-6
WANT = ("token_scores",)
MODELS = ["llama", "qwen2", "mistral", "gpt2", "gpt_neox"]


def scorer(name: str, **changes):
    if name == "qwen2":
        return tiny("llama", scorer=True, model_type="qwen2", **changes)
    return tiny(name, scorer=True, **changes)


def plain(model, batch) -> torch.Tensor:
    """Each text alone: the model's score at every counted token itself."""
    return torch.cat([model(input_ids=text[None]).logits[0, positions, 0] for text, positions in texts(batch)])


def check(model, batch, **options) -> None:
    expected = plain(model, batch)
    expected_grads = gradients(model, {"token_scores": expected})
    got = score(model, batch, WANT, **options).token_scores
    assert got.shape == (batch.segments.total,)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE, check_dtype=False)
    grads = gradients(model, {"token_scores": got})
    scale = max(float(g.abs().max()) for g in expected_grads.values())
    assert grads.keys() == expected_grads.keys()
    for name in grads:
        assert float((grads[name] - expected_grads[name]).abs().max()) < GRADIENT_TOLERANCE * scale, name


@pytest.mark.parametrize("layout", ["shared", "separate", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_layouts_equal_plain_transformers(name, layout):
    model = scorer(name).eval()
    assert prepare(model, layout=layout).head == "fused"
    check(model, standard_batch())


def test_the_last_token_is_read():
    """A completion's score depends on its last token, and not on what follows the last counted one."""
    model = scorer("llama").eval()

    def scores(*ids: int) -> torch.Tensor:
        counted = [True, True, False, False]
        return score(
            model, TokenBatch.from_samples([Sample([5, 6], [Completion(list(ids), counted)])]), WANT
        ).token_scores

    first = scores(7, 8, 9, 10)
    torch.testing.assert_close(first, scores(7, 8, 11, 12))
    assert float((first - scores(7, 13, 9, 10)).abs()[1].detach()) > 1e-3
    torch.testing.assert_close(first[0], scores(7, 13, 9, 10)[0])


def test_rows_reach_to_the_counted_tokens_themselves():
    batch = TokenBatch.from_samples(
        [Sample([5, 6], [Completion([3, 4, 9], [True, False, False]), Completion([7, 8]), Completion([1], [False])])]
    )
    (rows,) = plan_rows(batch, "shared", RowCosts(hidden_size=16), itself=True)
    assert rows.input_ids.tolist() == [[5, 6, 3, 7, 8]]
    assert rows.position.tolist() == [[0, 1, 2, 2, 3]]
    assert (rows.source.tolist(), rows.target.tolist()) == ([2, 3, 4], [0, 1, 2])


def test_classifier_dropout_is_on_in_training_and_off_in_evaluation():
    model, batch = scorer("llama", classifier_dropout=0.5).train(), small_batch()
    first, second = (score(model, batch, WANT).token_scores for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    check(model, batch)


def test_bfloat16_gives_float32():
    model, batch = scorer("llama", dtype=torch.bfloat16, initializer_range=0.05).eval(), small_batch()
    got = score(model, batch, WANT, layout="shared").token_scores
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, plain(model, batch).float(), rtol=0.1, atol=0.05)


def test_lora_with_a_trained_head(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"], task_type="TOKEN_CLS")
    model = peft.get_peft_model(scorer("llama"), config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    for mode in (model.eval(), model.train()):
        for layout in ("shared", "separate"):
            check(mode, standard_batch(), layout=layout)
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("modules_to_save" in n for n in trained)
    assert any("lora_A" in n for n in trained)
    expected = score(model.eval(), small_batch(), WANT).token_scores
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(scorer("llama"), tmp_path).double().eval()
    torch.testing.assert_close(score(loaded, small_batch(), WANT).token_scores, expected, rtol=0, atol=1e-6)


def test_saved_and_loaded(tmp_path):
    model, batch = scorer("llama").eval(), small_batch()
    expected = score(model, batch, WANT).token_scores
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert loaded.config.num_labels == 1
    torch.testing.assert_close(score(loaded, batch, WANT).token_scores, expected)


def test_a_head_that_is_not_the_last_word():
    model = scorer("llama").eval()

    class Odd(type(model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.tanh() + 1
            return out

    model.__class__ = Odd
    with pytest.warns(UserWarning, match="Odd is scored through its own full logits: its scores are not its head's"):
        check(model, standard_batch())


def test_without_gradients_and_copies():
    model, batch = scorer("llama").eval(), small_batch()
    with torch.no_grad():
        scores = score(model, batch, WANT)
    assert not scores.token_scores.requires_grad
    assert scores.logps is None
    assert torch.equal(score(copy.deepcopy(model), batch, WANT).token_scores, scores.token_scores)


def test_models_and_quantities_that_do_not_go_together():
    classifier, lm, batch = scorer("llama"), tiny("llama"), small_batch()
    with pytest.raises(
        ModelError, match=r"LlamaForTokenClassification scores tokens .* so it has no \['kl', 'logps'\]"
    ):
        score(classifier, batch, ("logps", "token_scores", "kl"))
    with pytest.raises(ModelError, match="LlamaForCausalLM predicts tokens and does not score them"):
        score(lm, batch, WANT)
    with pytest.raises(ModelError, match="LlamaForTokenClassification has 2 labels; expected one"):
        prepare(scorer("llama", num_labels=2))
    for function in (causal_lm, head_of):
        with pytest.raises(ModelError, match="LlamaForTokenClassification has no language-model head"):
            function(classifier)


def test_encoders_are_refused():
    config = transformers.BertConfig(
        **{k: COMMON[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
        intermediate_size=24,
        num_labels=1,
        initializer_range=0.3,
    )
    model = transformers.BertForTokenClassification(config).double()
    with pytest.raises(ModelError, match="score by BertForTokenClassification depends on later tokens"):
        prepare(model)
