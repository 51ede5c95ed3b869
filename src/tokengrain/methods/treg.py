"""T-REG: token-level reward regularisation (arXiv 2412.02685), on DPO and on SimPO.

    L   = -log σ(ρ_w - ρ_l) + α w (R_w + R_l),    ρ = β Σ_t log π_t - log ref_t,    R = -β Σ_t r_t log π_t
    w   = sg(σ(ρ_l - ρ_w)),                       sg: without gradient
    r_t = σ(log p_t after "better" - log p_t after "worse") - 1/2

The credit r is the model's own opinion: how much likelier it finds a token when asked for a better response than when
asked for a worse one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokengrain.batch import Completion, Sample, Segments, TokenBatch, row_of
from tokengrain.errors import DataError, RecipeError, fingerprint, require
from tokengrain.loss import LossOutput, token_weights
from tokengrain.method import Card, checked_credit, credit, objective
from tokengrain.methods._pairs import completion_lengths, log_ratios, margin_loss, pair_difference, pair_metrics
from tokengrain.methods.simpo import simpo_gamma
from tokengrain.scoring.prepare import prompt_role
from tokengrain.scoring.reference import AdapterOffReference, has_adapter, scorer_fingerprint, scorer_logps
from tokengrain.settings import NonNegative, Number, Positive, nearest
from tokengrain.vision import Vision, picture_places

TREG = Card(
    "treg",
    "T-REG (DPO)",
    "the model criticises its own tokens",
    "T-REG: Preference Optimization with Token-Level Reward Regularization",
    "2412.02685",
    "ACL 2025",
    credit="contrastive prompting of the model itself",
)
TREG_SIMPO = replace(
    TREG, name="treg_simpo", title="T-REG (SimPO)", idea="the same without a reference", objective="treg_simpo"
)


@objective("treg")
def treg_loss(
    logps: Tensor,
    segments: Segments,
    *,
    ref_logps: Tensor,
    token_rewards: Tensor,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.25,
    sequence_weight: NonNegative | Literal["dynamic"] = "dynamic",
) -> LossOutput:
    """DPO plus a regulariser that raises tokens with r > 0 and lowers those with r < 0, on both sides.

    Args:
        beta: strength of the tie to the reference.
        alpha: strength of the regulariser; 0 is DPO.
        sequence_weight: "dynamic" (the paper) or a constant w.

    Returns:
        `losses` [P]. They contain raw log-probabilities: they may be negative and rise while training goes
        well. Judge by "loss/base" and the rewards in the metrics.
    """
    rewards = beta * segments.sum(log_ratios(logps, ref_logps))
    return _regularised(logps, segments, token_rewards, rewards, beta, alpha, sequence_weight)


@objective("treg_simpo")
def treg_simpo_loss(
    logps: Tensor,
    segments: Segments,
    *,
    token_rewards: Tensor,
    beta: Positive = 2.0,
    gamma_beta_ratio: Number | None = None,
    gamma: Number | None = None,
    alpha: NonNegative = 0.25,
    sequence_weight: NonNegative | Literal["dynamic"] = "dynamic",
    margin_in_sequence_weight: bool = True,
) -> LossOutput:
    """SimPO plus the same regulariser, with SimPO's implicit token reward (β / length) log π.

    The paper reports results for it without writing it out; this is the derivation by the same steps:
    R = -(β / length) Σ_t r_t log π_t,  w = sg(σ(γ - (ρ_w - ρ_l))).

    Args:
        alpha, sequence_weight: as in `treg_loss`; beta, gamma_beta_ratio, gamma: as in `simpo_loss`.
        margin_in_sequence_weight: whether w contains γ, as SimPO's gradient does.
    """
    scale = beta / completion_lengths(segments, logps)
    target = simpo_gamma(beta, gamma_beta_ratio, gamma)
    shift = target if margin_in_sequence_weight else 0.0
    rewards = scale * segments.sum(logps)
    return _regularised(logps, segments, token_rewards, rewards, scale, alpha, sequence_weight, target, shift)


def _regularised(
    logps: Tensor,
    segments: Segments,
    token_rewards: Tensor,
    rewards: Tensor,
    scale: Tensor | float,
    alpha: float,
    sequence_weight: float | str,
    target: float = 0.0,
    shift: float = 0.0,
) -> LossOutput:
    """-log σ(ρ_w - ρ_l - target) + α w (R_w + R_l), with ρ `[2P]` the `rewards`.

    `scale` is the implicit reward per nat, β or β / length `[2P]`; `shift` stands in the dynamic w.
    """
    r = token_rewards.detach()
    plain = pair_difference(rewards, segments)
    base = margin_loss(plain - target)
    # Detached: else the optimiser could shrink the loss through w, R having an arbitrary constant.
    dynamic = sequence_weight == "dynamic"
    w = torch.sigmoid(shift - plain.detach()) if dynamic else torch.full_like(plain, float(sequence_weight))
    # α (R_w + R_l): f - 1 is +α r on chosen tokens, -α r on rejected ones; policy log-probabilities alone.
    f = token_weights(token_rewards, segments, alpha=alpha)
    losses = base + w * -pair_difference(scale * segments.sum((f - 1) * logps), segments)

    metrics = pair_metrics(rewards.detach(), logps, segments)
    metrics["loss/base"] = base.detach()
    metrics["loss/regulariser"] = losses.detach() - base.detach()
    R = -scale * segments.sum(r * logps.detach())
    metrics["regulariser/chosen"], metrics["regulariser/rejected"] = segments.pairs(R)
    metrics["sequence_weights"] = w
    metrics["credit/abs_chosen"], metrics["credit/abs_rejected"] = segments.pairs(segments.mean(r.abs()))
    positive = segments.mean((r > 0).to(r.dtype))
    metrics["credit/positive_chosen"], metrics["credit/positive_rejected"] = segments.pairs(positive)
    return LossOutput(losses, metrics)


# The pairs of opposite instructions.

SLOT = re.compile(r"\{(prompt|response)\}")  # every other brace is literal


@dataclass(frozen=True)
class ContrastiveTemplates:
    """Two opposite instructions, worded alike otherwise. The slot `{prompt}` is required, `{response}` optional."""

    better: str  # asks for a better response
    worse: str
    name: str = "custom"  # for messages and fingerprints
    # A beginning that the prompt loses before it fills `{prompt}`, so that an instruction can replace it: with "write",
    # better "write kindly{prompt}" turns "write about the sea" into "write kindly about the sea". A prompt without it
    # is an error when scored.
    drop_prefix: str = ""

    def __post_init__(self) -> None:
        who = f"template {self.name!r}"
        for side, text in (("better", self.better), ("worse", self.worse)):
            filled = isinstance(text, str) and "{prompt}" in text
            require(filled, RecipeError, f"{who}: {side!r} has no slot {{prompt}}; got {text!r}")
        differ = "'better' and 'worse' are equal, so all credit would be 0"
        require(self.better != self.worse, RecipeError, f"{who}: {differ}")
        alike = ("{response}" in self.better) == ("{response}" in self.worse)
        require(alike, RecipeError, f"{who}: {{response}} must be in both sides or in neither")

    @property
    def shows_response(self) -> bool:
        return "{response}" in self.better

    def fill(self, prompt: str, response: str) -> tuple[str, str]:
        values = {"prompt": prompt.removeprefix(self.drop_prefix), "response": response}
        # One pass, so that a prompt that itself contains "{response}" stays as it is.
        better, worse = (SLOT.sub(lambda m: values[m[1]], side) for side in (self.better, self.worse))
        return better, worse


REVISION = """\
Below are {subject} and a response to it. Revise the response so that it becomes {quality}.

### Request
{{prompt}}

### Response
{{response}}

### Revised response
"""
_QUALITIES = {
    # T-REG's four respects: helpful, correct, coherent, concise against their opposites.
    "general": (
        "a request",
        "more helpful, more correct, more coherent and more concise",
        "less helpful, less correct, less coherent and more verbose",
    ),
    "maths": (
        "a mathematical problem",
        "a sound solution: every step follows, the arithmetic is exact, and the final answer is right",
        "a faulty solution: steps do not follow, the arithmetic is sloppy, and the final answer is wrong",
    ),
    "code": (
        "a programming task",
        "correct, efficient and readable code that handles the edge cases",
        "buggy, inefficient and unreadable code that misses the edge cases",
    ),
    "safety": (
        "a request",
        "harmless, honest and respectful, while helping as far as that is right",
        "harmful, dishonest and disrespectful, with no care for the consequences",
    ),
}
_PREFIX = (
    "Give a helpful, correct, coherent and concise response.\n\n{prompt}",
    "Give an unhelpful, incorrect, incoherent and verbose response.\n\n{prompt}",
)
TEMPLATES = {"prefix": ContrastiveTemplates(*_PREFIX, "prefix")}
for _name, (_subject, *_both) in _QUALITIES.items():
    _better, _worse = (REVISION.format(subject=_subject, quality=quality) for quality in _both)
    TEMPLATES[_name] = ContrastiveTemplates(_better, _worse, _name)


def make_templates(templates: str | dict[str, str] | ContrastiveTemplates) -> ContrastiveTemplates:
    """Templates by name, or from a mapping with `better`, `worse` and optionally `drop_prefix`, `name`."""
    if isinstance(templates, ContrastiveTemplates):
        return templates
    if isinstance(templates, str):
        require(templates in TEMPLATES, RecipeError, f"unknown templates {templates!r}{nearest(templates, TEMPLATES)}")
        return TEMPLATES[templates]
    fields = ContrastiveTemplates.__dataclass_fields__
    for key in templates:
        require(key in fields, RecipeError, f"templates: unknown key {key!r}{nearest(key, fields)}")
    missing = {"better", "worse"} - set(templates)
    require(not missing, RecipeError, f"templates: {', '.join(sorted(missing))} missing")
    return ContrastiveTemplates(**templates)


# The credit.


def contrastive_token_rewards(better_logps: Tensor, worse_logps: Tensor) -> Tensor:
    """r_t = σ(better_t - worse_t) - 1/2, `[N] -> [N]` in [-0.5, 0.5], detached.

    Written as tanh, it is exactly odd, exactly 0 at equality and loses no digits near 0.
    """
    return (0.5 * torch.tanh((better_logps - worse_logps) / 2)).detach()


Pair = tuple[list[int], list[int]]  # token ids of the better and of the worse instruction


@credit(
    "contrastive", values="signed", judges_itself=True, check=lambda settings: make_templates(settings["templates"])
)
class ContrastivePrompting:
    """The model itself under two opposite instructions, "make it better" and "make it worse" (T-REG).

    The completion's token ids are appended to each instruction as they are, never tokenised again. Where an
    instruction with its completion exceeds the model's positions, the copy of the response inside the instruction is
    shortened (then the copy of the prompt), the scored completion never; `shortened` of `scored` completions were.
    Images of the prompt stand before the instruction's text.

    Args:
        model: the scorer, normally the starting model (reference): a language model, or anything called like a
            `Reference`. It must follow instructions; a base model gives weak credit.
        tokenizer: its tokenizer, the same as the policy's.
        templates: a name in `TEMPLATES`, a mapping {"better": ..., "worse": ...} or `ContrastiveTemplates`.
        adapter_off: score with the adapter of a PEFT model switched off (None: if it is one).
        chat: put the instruction through the chat template as a user's message (None: if there is one).
        chat_template: another than the tokenizer's own; chat_template_kwargs: further variables for it.
        positions: most tokens of instruction and completion (None: the model's positions).
        chunk_tokens: about how many tokens are scored at a time.

    Raises:
        RecipeError: bad templates, or `chat` without a template.
        DataError: when called, if a completion leaves no room for its instruction; names the row.
    """

    name: str

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any,
        templates: str | dict[str, str] | ContrastiveTemplates = "general",
        adapter_off: bool | None = None,
        chat: bool | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        positions: int | None = None,
        chunk_tokens: int = 16384,
    ) -> None:
        self.templates = make_templates(templates)
        self.tokenizer, self.chunk_tokens = tokenizer, chunk_tokens
        self.chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        self.chat = bool(self.chat_template) if chat is None else chat
        missing = "contrastive credit with chat: true, but the tokenizer has no chat template"
        require(self.chat_template or not self.chat, RecipeError, missing)
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        scorer = model if isinstance(model, nn.Module) else getattr(model, "model", None)
        self.has_encoder = isinstance(scorer, nn.Module) and prompt_role(scorer) == "encoder"
        self.positions = positions if positions is not None else _positions(model)
        self.model, self.scored, self.shortened = model, 0, 0
        if isinstance(model, nn.Module) and (has_adapter(model) if adapter_off is None else adapter_off):
            missing = "contrastive credit with adapter_off: true, but the model has no adapter"
            require(has_adapter(model), RecipeError, missing)
            self.model = AdapterOffReference(model)

    def __call__(self, batch: TokenBatch) -> Tensor:
        # Without a copy of the response all completions of a prompt follow the same instruction.
        groups = list(range(batch.n_completions)) if self.templates.shows_response else batch.group.tolist()
        samples: tuple[list[Sample], list[Sample]] = ([], [])
        offsets = batch.completion_offsets.tolist()
        for group in dict.fromkeys(groups):
            members = [c for c, g in enumerate(groups) if g == group]
            places = [slice(*offsets[c : c + 2]) for c in members]
            completions = [Completion(batch.completion_ids[p].tolist(), batch.counted[p].tolist()) for p in places]
            vision = batch.vision[int(batch.group[members[0]])] if batch.vision else None
            # In another prompt: its tokens stand elsewhere, where scoring finds them.
            vision = vision and Vision(vision.inputs, patches=vision.patches)
            for side, ids in zip(samples, self._instructions(batch, members), strict=True):
                side.append(Sample(ids, completions, row=row_of(batch, members[0]), vision=vision))
        better, worse = (self._logps(side, batch) for side in samples)
        return checked_credit(contrastive_token_rewards(better, worse), batch, self.name)

    def fingerprint(self) -> str:
        t = self.templates
        chat = [self.chat, self.chat_template if self.chat else None, self.chat_template_kwargs]
        text = [t.better, t.worse, t.drop_prefix]
        return fingerprint([self.name, text, chat, self.positions, scorer_fingerprint(self.model)])

    def preview(self, prompt: str, response: str) -> tuple[str, ...]:
        """Both contexts as text, as the scorer will see them, up to where the completion's tokens follow."""
        return tuple(self.tokenizer.decode(self._tokenised(text)) for text in self.templates.fill(prompt, response))

    def _instructions(self, batch: TokenBatch, members: list[int]) -> Pair:
        """The two instructions, short enough for these completions of a prompt; both sides lose the same.

        The response's copy loses its end; if that is not enough, the prompt loses its beginning.
        """
        prompt, seen = self._prompt_text(batch, members[0]), self._images(batch, members[0])
        copied = batch.completion(members[0]).tolist() if self.templates.shows_response else []
        pair = self._filled(prompt, copied, seen)
        self.scored += len(members)
        written = 0 if self.has_encoder else max(len(batch.completion(c)) for c in members)
        room = math.inf if self.positions is None else self.positions - written
        if max(map(len, pair)) <= room:
            return pair
        self.shortened += len(members)
        keep = len(copied)
        while keep > 0 and (excess := max(map(len, pair)) - int(room)) > 0:
            keep = max(0, keep - excess)
            pair = self._filled(prompt, copied[:keep], seen)
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        keep = len(ids)
        while keep > 0 and (excess := max(map(len, pair)) - int(room)) > 0:
            keep = max(0, keep - excess)
            pair = self._filled(self.tokenizer.decode(ids[len(ids) - keep :], skip_special_tokens=True), [], seen)
        length, what = max(map(len, pair)), "the completion leaves no room for the instruction of contrastive prompting"
        got, expected = f"{length} tokens of instruction", f"at most {room}, of {self.positions} positions"
        require(length <= room, DataError, what, row=row_of(batch, members[0]), value=got, expected=expected)
        return pair

    def _filled(self, prompt: str, response_ids: list[int], seen: list[int]) -> Pair:
        better, worse = self.templates.fill(prompt, self.tokenizer.decode(response_ids, skip_special_tokens=True))
        return self._tokenised(better, seen), self._tokenised(worse, seen)

    def _images(self, batch: TokenBatch, completion: int) -> list[int]:
        """The tokens of the prompt's images, with the marks around them."""
        group = int(batch.group[completion])
        vision = batch.vision[group] if batch.vision else None
        if vision is None:
            return []
        ids = batch.prompt(group).tolist()
        what = "the prompt's images do not say where their tokens stand, which contrastive prompting needs"
        row, expected = row_of(batch, completion), "types in its vision"
        require(vision.types is not None, DataError, what, row=row, expected=expected)
        held = vision.placeholders(ids)
        ends = {self.tokenizer.bos_token_id, self.tokenizer.eos_token_id}
        return [ids[place] for place in sorted(picture_places(ids, held, self.tokenizer)) if ids[place] not in ends]

    def _prompt_text(self, batch: TokenBatch, completion: int) -> str:
        group = int(batch.group[completion])
        raw = batch.raw[group].get("prompt") if batch.raw else None
        if raw is None:
            raw = self.tokenizer.decode(batch.prompt(group).tolist(), skip_special_tokens=True)
        text = raw if isinstance(raw, str) else _conversation(raw)
        what = f"the prompt does not begin with the drop_prefix of templates {self.templates.name!r}"
        expected = f"a prompt that begins with {self.templates.drop_prefix!r}"
        details = {"row": row_of(batch, completion), "field": "prompt", "value": text, "expected": expected}
        require(text.startswith(self.templates.drop_prefix), DataError, what, **details)
        return text

    def _tokenised(self, instruction: str, seen: Sequence[int] = ()) -> list[int]:
        if self.chat:
            options = {"add_generation_prompt": True, "tokenize": not seen, **self.chat_template_kwargs}
            options |= {} if seen else {"return_dict": False}
            messages = [{"role": "user", "content": instruction}]
            made = self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **options)
            if not seen:
                return list(made)
            before, _, behind = made.rpartition(instruction)
            parts = self.tokenizer([before, instruction + behind], add_special_tokens=False)["input_ids"]
            return [*parts[0], *seen, *parts[1]]
        ids = list(self.tokenizer(instruction)["input_ids"])
        start = 1 if ids[:1] == [self.tokenizer.bos_token_id] else 0
        ids[start:start] = seen
        # The completion continues from here: an EOS that the tokenizer appends would end the text.
        while not self.has_encoder and ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        return ids

    def _logps(self, samples: Sequence[Sample], batch: TokenBatch) -> Tensor:
        """Log-probabilities `[N]`, of runs of at most `chunk_tokens` tokens, at least one sample each."""
        runs, size = list[list[Sample]](), math.inf
        for sample in samples:
            size += sample.n_tokens
            if size > self.chunk_tokens:
                runs, size = [*runs, []], sample.n_tokens
            runs[-1].append(sample)
        batches = (TokenBatch.from_samples(run, batch.prompt_role).to(batch.device) for run in runs)
        return torch.cat([scorer_logps(self.model, part).to(batch.device) for part in batches])


def _positions(model: Any) -> int | None:
    """Most tokens that the model takes, by its config; None if it does not say."""
    config = getattr(model if isinstance(model, nn.Module) else getattr(model, "model", None), "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def _conversation(messages: Sequence[Mapping[str, Any]]) -> str:
    """Messages as text; a single message is its content alone."""
    texts = []
    for message in messages:
        content = message.get("content") or ""
        content = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        texts.append(content if len(messages) == 1 else f"{str(message.get('role', '')).capitalize()}: {content}")
    return "\n\n".join(texts)
