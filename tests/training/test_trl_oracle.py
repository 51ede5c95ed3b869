"""Independent oracle: TRL's DPOTrainer, fed the same text, gives the same loss and gradient norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_vlms import mark, picture, processor, split, tiny_vlm
from tests.tiny_vlms import tokenizer as vlm_tokenizer
from tests.training.tiny import make_trainer, tiny_llama
from tokengrain.batch import Completion, Sample
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs
from tokengrain.errors import read_log
from tokengrain.method import make_objective

pytest.importorskip("trl")

WORDS = [
    "the",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "a",
    "mat",
    "tree",
    "red",
    "blue",
    "and",
    "then",
    "it",
    "was",
    "very",
    "not",
    "good",
    "bad",
]
SCHEDULE: dict[str, Any] = {
    "learning_rate": 2e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "train_sampling_strategy": "sequential",
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "report_to": "none",
    "seed": 7,
}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def rows(n: int = 12) -> list[dict[str, str]]:
    generator = torch.Generator().manual_seed(4)

    def text(low: int, high: int) -> str:
        count = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator).tolist())

    # TRL appends "<eos>" without a space, and this tokenizer splits at spaces: the texts bring it.
    return [{"prompt": text(3, 12), "chosen": f" {text(2, 10)} ", "rejected": f" {text(2, 10)} "} for _ in range(n)]


def trl_steps(
    folder: Path, accumulation: int, loss_type: str, data: Any = None, make: Any = tiny_llama, processing: Any = None
) -> tuple[list[tuple[float, float]], Any]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        str(folder),
        beta=0.2,
        loss_type=[loss_type],
        bf16=False,
        gradient_checkpointing=False,
        gradient_accumulation_steps=accumulation,
        **SCHEDULE,
    )
    trainer = DPOTrainer(
        make(),
        ref_model=make(),
        args=config,
        train_dataset=Dataset.from_list(data or rows()),
        processing_class=processing or tokenizer(),
    )
    trainer.train()
    return steps(trainer.state.log_history), trainer.model


def steps(entries: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(e["loss"], e["grad_norm"]) for e in entries if "loss" in e]


@pytest.mark.parametrize(("accumulation", "loss_type"), [(1, "sigmoid"), (3, "sigmoid"), (2, "ipo")])
def test_loss_and_gradient_norm_of_every_step(accumulation: int, loss_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs, their_model = trl_steps(tmp_path / "trl", accumulation, loss_type)
    pairs = prepare_pairs(rows(), tokenizer(), TokenizeConfig(max_length=1024, add_eos=True))
    settings = {**SCHEDULE, "gradient_accumulation_steps": accumulation}
    objective = make_objective("dpo", beta=0.2, loss_type=loss_type)
    trainer = make_trainer(tmp_path / "ours", pairs, objective=objective, **settings)
    compare(trainer, theirs, their_model)


def compare(trainer: Any, theirs: list[tuple[float, float]], their_model: Any) -> None:
    """Train as TRL did: every step has its loss and gradient norm, and the end its weights."""
    trainer.train()
    ours = steps(read_log(trainer.output_path / "log.jsonl"))
    assert len(ours) == len(theirs) >= 5
    for step, (mine, trls) in enumerate(zip(ours, theirs, strict=True)):
        assert mine == pytest.approx(trls, rel=1e-5), f"step {step + 1}"
    assert abs(ours[0][0] - ours[-1][0]) > 1e-3
    for (name, mine), trls in zip(trainer.model.named_parameters(), their_model.parameters(), strict=True):
        if not name.endswith("k_proj.bias"):  # softmax ignores it; AdamW makes steps of its gradient's rounding
            torch.testing.assert_close(mine, trls, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gemma3", "llava"))]
)
def test_images(family: str, tmp_path: Path) -> None:
    """Prompts with one image, two, and none; the vision tower is trained too."""
    sizes = [[(32, 32)], [(32, 48), (16, 32)], [(64, 32)], [(32, 32)], [(16, 32)]]
    words = ["what is this ?", "a b", "c d e", "red ?", "is this red ?"]
    data, samples = [], []
    for row, (own, text) in enumerate(zip(sizes, words, strict=True)):
        pictures = [picture(10 * row + i, size) for i, size in enumerate(own)]
        answers = [f"{text} red .", f"blue {words[row - 1]} c"]
        prompt = " ".join([*[mark(family)] * len(own), text])
        data.append({"images": pictures, "prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
        ids, vision = split(processor(family)(text=[prompt], images=[pictures], return_tensors="pt"))
        completions = [Completion(vlm_tokenizer(family)(text)["input_ids"]) for text in answers]
        samples.append(Sample(ids, completions, row=row, vision=vision))

    def make() -> Any:
        return tiny_vlm(family, dtype=torch.float32)

    theirs, their_model = trl_steps(tmp_path / "trl", 1, "sigmoid", data, make, processor(family))
    objective = make_objective("dpo", beta=0.2)
    trainer = make_trainer(tmp_path / "ours", samples, model=make(), objective=objective, **SCHEDULE)
    compare(trainer, theirs, their_model)
