"""A trained reward model as a reward: one number for a prompt with its completion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import ModelError, RecipeError, require
from tokengrain.methods._other_tokens import retokenizer_for
from tokengrain.methods._shaping import scale_scores
from tokengrain.models import (
    from_files,
    is_adapter,
    is_classifier_config,
    is_reward_adapter,
    load_config,
    load_trained_reward_model,
)
from tokengrain.rewards.suite import RewardError
from tokengrain.scoring.model import device_of, evaluating, input_embeddings, is_token_classifier, positions_of
from tokengrain.scoring.token_scores import (
    Pooling,
    Scaling,
    completion_statistics_of,
    config_of,
    frozen_token_scores,
    pooled_scores,
)
from tokengrain.scoring.vision import placeholders
from tokengrain.settings import Count
from tokengrain.specs import ModelSpec
from tokengrain.vision import Vision

SEQUENCE = "ForSequenceClassification"  # how transformers' names of these models end


@dataclass(kw_only=True, eq=False)
class RewardModel:
    """What a frozen reward model says of prompt and completion: the sentence reward of RTO (arXiv 2404.18922).

    The model is a token classifier with one label, such as a stage of kind `reward` makes, whose token scores are
    pooled as in its loss; or any sequence classifier of transformers with one label, which pools by itself.
    Completions of alike length are scored together, on the model's device, without gradient.

    Args:
        model: as `load_completion_model` gives it.
        tokenizer: the policy's.
        reward_tokenizer: the model's; None: the policy's. Where the two differ the model reads the text again, see
            `tokengrain.methods._other_tokens.retokenizer_for`.
        chat: with a tokenizer of its own, a prompt of text is the user's message of a chat. (Messages always are.)
        pooling: of a token classifier: "mean" of its tokens' scores, or that of the "last"; None: as its config says.
        scaling: "zscore" by the mean and deviation of completions in the model's config, "centre", or "none".
        max_tokens: of one forward pass; a longer completion is scored alone.
    """

    name: ClassVar[str] = "reward_model"
    model: Any
    tokenizer: Any = None
    reward_tokenizer: Any = None
    chat: bool = False
    pooling: Pooling | None = None
    scaling: Scaling = "none"
    max_tokens: Count = 8192

    def __post_init__(self) -> None:
        _check_model(self.model)
        self.statistics = completion_statistics_of(self.model)
        self.pooling = self._pooling(self.pooling)
        message = (
            f"reward 'reward_model': scaling {self.scaling!r} needs completion_score_mean and completion_score_std in "
            "the reward model's config, which lacks them; expected scaling: none (and the rollout credit normalize)"
        )
        require(self.statistics is not None or self.scaling == "none", ModelError, message)
        self.retokenizer = retokenizer_for(self.tokenizer, self.reward_tokenizer)

    def __call__(
        self,
        prompts: Sequence[Any],
        prompt_ids: Sequence[list[int]],
        completion_ids: Sequence[list[int]],
        prompt_vision: Sequence[Vision | None] | None = None,
        image: Any = None,
        images: Any = None,
        video: Any = None,
        videos: Any = None,
    ) -> list[float]:
        """One number per completion.

        Raises `RewardError` for tokens or positions it does not have, and for pictures that it cannot see.
        """
        require(all(completion_ids), RewardError, "the completion is empty; expected at least one token")
        columns = (image, images, video, videos, prompt_vision)
        pictures = any(v is not None and v != [] for column in columns if column is not None for v in column)
        parts = (m["content"] for p in prompts if isinstance(p, list) for m in p if isinstance(m.get("content"), list))
        seeing = pictures or any(part.get("type") in ("image", "video") for content in parts for part in content)
        sees = prompt_vision is not None and self.pooling is not None and self.retokenizer is None
        sees = sees and bool(placeholders(config_of(self.model)))
        require(
            sees or not seeing, RewardError, "the prompts have images or videos, which the reward model does not see"
        )
        visions = [None] * len(prompts) if prompt_vision is None else prompt_vision
        batch = TokenBatch.from_samples(self._samples(prompts, prompt_ids, completion_ids, visions))
        if self.retokenizer is not None:
            batch, _ = self.retokenizer(batch)
        _check_fits(self.model, batch)
        scores = self._of_sequences(batch) if self.pooling is None else self._of_tokens(batch, self.pooling)
        return list(scale_scores(scores, self.scaling, self.statistics).tolist())

    def _pooling(self, given: Pooling | None) -> Pooling | None:
        """None for a sequence classifier."""
        if not is_token_classifier(self.model):
            message = f"reward 'reward_model': pooling is {given!r}, but a sequence classifier pools itself"
            require(given is None, RecipeError, message)
            return None
        known = self.statistics.pooling if self.statistics is not None else None
        message = "reward 'reward_model': the reward model's config does not say how its loss pooled "
        message += "(completion_score_pooling); expected the setting pooling: mean or last"
        require(given or known, ModelError, message)
        message = f"reward 'reward_model': pooling is {given!r}, and the statistics for scaling {self.scaling!r} are "
        message += f"those of {known!r}; expected pooling: {known}, or scaling: none"
        require(given is None or known in (None, given) or self.scaling == "none", RecipeError, message)
        return given or known

    def _samples(
        self,
        prompts: Sequence[Any],
        prompt_ids: Sequence[list[int]],
        completion_ids: Sequence[list[int]],
        visions: Sequence[Vision | None],
    ) -> list[Sample]:
        """Neighbours with one prompt share it, as far as the budget goes."""
        samples: list[Sample] = []
        for prompt, ids, completion, vision in zip(prompts, prompt_ids, completion_ids, visions, strict=True):
            if self.chat and isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            last = samples[-1] if samples else None
            same = last is not None and (last.prompt_ids, last.raw["prompt"]) == (ids, prompt) and last.vision is vision
            if last is not None and same and last.n_tokens + len(completion) <= self.max_tokens:
                last.completions.append(Completion(completion))
            else:
                samples.append(Sample(ids, [Completion(completion)], raw={"prompt": prompt}, vision=vision))
        return samples

    def _of_tokens(self, batch: TokenBatch, pooling: Pooling) -> Tensor:
        """Pooled token scores `[C]`, on CPU."""
        found = torch.zeros(batch.n_completions)
        for part in batch.with_columns(completion=batch.segments.ids).split(self.max_tokens):
            each = frozen_token_scores(self.model, part.to(device_of(self.model))).cpu()
            scores = pooled_scores(each, part.segments, pooling)
            found[part.columns["completion"][part.segments.offsets[:-1]]] = scores.float()
        return found

    def _of_sequences(self, batch: TokenBatch) -> Tensor:
        """What a sequence classifier says `[C]`, on CPU; shorter rows are filled up on the right."""
        rows = [[*batch.prompt(g).tolist(), *batch.completion(c).tolist()] for c, g in enumerate(batch.group.tolist())]
        pad = config_of(self.model).get_text_config().pad_token_id
        found = torch.zeros(len(rows))
        with evaluating(self.model):
            # Without a token to fill up with, transformers' decoders take one row at a time.
            for chosen in _alike([len(row) for row in rows], self.max_tokens if pad is not None else 0):
                taken = [torch.tensor(rows[i], device=device_of(self.model)) for i in chosen]
                ids = pad_sequence(taken, batch_first=True, padding_value=pad or 0)
                mask = pad_sequence([torch.ones_like(row) for row in taken], batch_first=True)
                logits = self.model(input_ids=ids, attention_mask=mask).logits
                found[chosen] = logits[:, 0].float().cpu()
        return found


def _alike(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of alike lengths, the longest first, each within the budget once filled up."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        count = max(1, max_tokens // lengths[order[0]])
        yield order[:count]
        order = order[count:]


def _check_model(model: Any) -> None:
    what, name = "reward 'reward_model'", type(model).__name__
    message = "expected a loaded one, such as tokengrain.rewards.reward_model.load_completion_model(path) gives"
    require(isinstance(model, nn.Module), RecipeError, f"{what}: model is {name}; {message}")
    known = is_token_classifier(model) or any(cls.__name__.endswith(SEQUENCE) for cls in type(model).__mro__)
    message = f"{what}: the model is a {name}; expected a token classifier or a sequence classifier with one label"
    require(known, ModelError, message)
    labels = config_of(model).num_labels
    require(labels == 1, ModelError, f"{what}: {name} has {labels} labels; expected one")


def _check_fits(model: nn.Module, batch: TokenBatch) -> None:
    known = input_embeddings(model).weight.shape[0]
    largest = int(torch.cat([batch.prompt_ids, batch.completion_ids]).max())
    message = f"token id {largest} is outside the reward model's vocabulary of {known}; expected a reward_tokenizer"
    require(largest < known, RewardError, message)
    limit = None if batch.sees else positions_of(config_of(model))  # of pictures, scoring knows their positions
    longest = int((batch.prompt_offsets.diff()[batch.group] + batch.completion_offsets.diff()).max())
    message = f"prompt and completion are {longest} tokens; expected at most {limit}, the model's positions"
    require(limit is None or longest <= limit, RewardError, message)


def load_completion_model(path: str, *, dtype: Any = "auto", trust_remote_code: bool = False) -> nn.Module:
    """A model that judges whole completions, ready to score: in evaluation mode, without gradients.

    `path` is what a stage of kind `reward` made (an adapter too), or any sequence classifier of transformers with one
    label; `dtype` "auto" (as saved), "float32", "bfloat16" or "float16". Raises `ModelError` for another model.
    """
    spec = ModelSpec(path=path, dtype=dtype, trust_remote_code=trust_remote_code)
    if check_completion_model(spec, path) == "tokens":
        return load_trained_reward_model(path, dtype=dtype)
    model = from_files(AutoModelForSequenceClassification, "sequence classifier", spec, path)
    return model.eval().requires_grad_(False)


def check_completion_model(spec: ModelSpec, path: str) -> Literal["tokens", "sequence"]:
    """Whether it gives a score per token or one for the whole text; loads no weights. Raises `ModelError`."""
    config = load_config(spec, path)
    adapter = is_adapter(path)
    tokens = is_reward_adapter(path) if adapter else is_classifier_config(config)
    sequence = not adapter and is_classifier_config(config, SEQUENCE)
    kinds = ["an adapter of no reward model"] if adapter else config.architectures or ["of an unknown kind"]
    kind = " or ".join(kinds)
    message = f"{path} is {kind}; expected a reward model: a token classifier with one label, such as a stage of kind "
    require(tokens or sequence, ModelError, message + "`reward` makes, or a sequence classifier with one label")
    message = f"{path} is a classifier of {config.num_labels} labels; a reward model has one"
    require(adapter or config.num_labels == 1, ModelError, message)
    return "tokens" if tokens else "sequence"
