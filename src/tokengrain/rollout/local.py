"""Sampling from a transformers model in this process: `HFGenerate`, and `HFContinuous` with continuous batching."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tokengrain.data.tokens import StopStrings
from tokengrain.errors import ModelError, RecipeError, RolloutError, require
from tokengrain.rollout.sampler import (
    PromptItem,
    Rollouts,
    SampledCompletion,
    SamplingConfig,
    checked_prompts,
    derived_seed,
    needs_tokenizer,
    occurrences,
    stop_ids_of,
)
from tokengrain.scoring.encdec import DecoderSteps, cache_of, start_id
from tokengrain.scoring.model import (
    autocast_type,
    contiguous_head,
    decoder_of,
    device_of,
    evaluating,
    is_encoder_decoder,
    text_config,
    vocabulary,
)
from tokengrain.scoring.prepare import (
    SAMPLED,
    TOLERANCE,
    causal_lm,
    language_model,
    probe_batch,
    prompt_learning,
    prompt_role,
    relative_error,
    signature,
)
from tokengrain.scoring.vision import TYPES, placed, placeholders, tensors
from tokengrain.settings import Count, nearest, validate_settings
from tokengrain.vision import Vision, padding_token

# ---- Drawing the next token ----


def uniforms(prompts: Sequence[PromptItem], n: int, sampling: SamplingConfig) -> Tensor:
    """Uniform numbers in [0, 1), float64 `[P * n, max_new_tokens]`, one row per completion.

    A completion's numbers depend on the seed, its row and its place in the group, not on the batch it is computed
    in. So the order of prompts, the size of batches and completions that end early do not change the others.
    """
    rows = []
    for prompt, seen in zip(prompts, occurrences(prompts), strict=True):
        for k in range(n):
            generator = torch.Generator().manual_seed(derived_seed(sampling.seed, prompt.row, seen, k))
            rows.append(torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


BLOCK = 256  # tokens that a `Picker` adds up at a time


class Picker:
    """Draws tokens by the inverse of the cumulative distribution, with `uniforms` for R completions, `[R, T]`.

    Tokens that are `forbidden`, since they stand for images, have probability 0.
    """

    def __init__(
        self, sampling: SamplingConfig, numbers: Tensor, device: torch.device, forbidden: Collection[int] = ()
    ) -> None:
        self.sampling = sampling
        self.forbidden = torch.tensor(sorted(forbidden), dtype=torch.long, device=device)
        # MPS has no float64.
        self.wide = torch.float32 if device.type == "mps" else torch.float64
        self.numbers = numbers.to(device=device, dtype=self.wide)
        self.warpers = _warpers(sampling)

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a token for each of B completions, `rows` of `uniforms`, which have `step` tokens so far.

        Returns tokens, long `[B]`, and their log-probabilities under the distribution that they were drawn from and
        under the model's own, nats `[B]`.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        raw = logits.log_softmax(-1)
        if len(self.forbidden):
            logits = logits.index_fill(-1, self.forbidden, -torch.inf)
        if self.sampling.temperature == 0:
            tokens = logits.argmax(-1)
            drawn = torch.zeros_like(raw[:, 0])
        else:
            unchanged = self.warpers is None and not len(self.forbidden)
            used = raw if unchanged else self._warped(logits).log_softmax(-1)
            tokens = self._draw(used, self.numbers[rows, step])
            drawn = used.gather(1, tokens[:, None])[:, 0]
        return tokens, drawn, raw.gather(1, tokens[:, None])[:, 0]

    def _warped(self, logits: Tensor) -> Tensor:
        return logits if self.warpers is None else self.warpers(None, logits)

    def _draw(self, logps: Tensor, uniform: Tensor) -> Tensor:
        """The first token at which the cumulative probability exceeds the uniform number: its block, then the token.

        Adding up every token in float64 would take a fifth of the time of decoding (64 rows, 49,152 tokens, on a CPU).
        """
        shares = F.pad(logps.exp(), (0, -logps.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
        blocks = shares.sum(-1, dtype=self.wide).cumsum(-1)
        block, point = _first_above(blocks, uniform[:, None] * blocks[:, -1:])
        inside = shares.gather(1, block[..., None].expand(-1, 1, BLOCK))[:, 0].cumsum(-1, dtype=self.wide)
        token, _ = _first_above(inside, point - F.pad(blocks, (1, 0)).gather(1, block))
        return (block * BLOCK + token)[:, 0].clamp(max=logps.shape[-1] - 1)  # among NaN it would be one of the padding


def _first_above(cumulative: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first value `[B, n]` above the point `[B, 1]`, never of one that adds nothing; and the point.

    The point is kept below the total, to which a product may round up, or a sum in another order. Where values are NaN
    it is the last index: `Rollouts` refuses what was drawn there.
    """
    total = cumulative[:, -1:]
    point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True).clamp(max=cumulative.shape[-1] - 1), point


def _warpers(sampling: SamplingConfig) -> Any:
    """transformers' own changes to a distribution; None if there is none."""
    if sampling.is_model or sampling.temperature == 0:
        return None
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers


# ---- Decoding a batch ----

PREFILLS = "_tokengrain_prefills"
# Finished rows are dropped once they are this share of the batch: dropping copies the cache.
FINISHED_SHARE = 1 / 8


class Drawn:
    """What was drawn for R completions of at most T tokens: `ids`, `logps` and `raw` `[R, T]` (see `Picker`).

    Attributes:
        lengths: long `[R]`, tokens of each; stopped: bool `[R]`, whether it ended by itself.
    """

    def __init__(self, rows: int, steps: int, device: torch.device, stop_ids: Sequence[int], stops: Any = None) -> None:
        self.rows, self.steps, self.device, self.stops = rows, steps, device, stops
        self.stop_ids = torch.tensor(stop_ids, dtype=torch.long, device=device)
        self.ids = torch.zeros(rows, steps, dtype=torch.long, device=device)
        self.logps, self.raw = torch.zeros(rows, steps, device=device), torch.zeros(rows, steps, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.stopped = torch.zeros(rows, dtype=torch.bool, device=device)

    def add(self, rows: Tensor, step: int, tokens: Tensor, logps: Tensor, raw: Tensor) -> Tensor:
        """Put down a token for each of the rows. Returns which of them end with it, bool `[B]`."""
        self.ids[rows, step] = tokens
        self.logps[rows, step] = logps.to(self.logps)
        self.raw[rows, step] = raw.to(self.raw)
        done = torch.isin(tokens, self.stop_ids)
        if self.stops is not None:
            texts = self.ids[rows, max(0, step + 1 - self.stops.window) : step + 1].tolist()
            done = done | torch.tensor([self.stops.hit(ids) for ids in texts], device=self.device)
        ended = rows[~self.stopped[rows]]
        self.lengths[ended] = step + 1
        self.stopped[rows] |= done
        return done


def plain_cache(cache: Any) -> bool:
    """Whether every layer of a cache is keys and values that can be repeated and selected by row."""
    layers = getattr(cache, "layers", ())
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, DynamicCache) and all(type(layer) in plain for layer in layers)


def padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts padded on the left, long `[B, L]`, and which tokens are prompt, long `[B, L]`."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


@dataclass(frozen=True)
class Pictures:
    """What a model is given of the images and videos of B prompts."""

    inputs: Mapping[str, Tensor]  # arguments of the model's forward
    positions: Tensor | None  # long `[3, B, L]` of models with several per token
    after: Tensor  # long `[B]`, the position of the first token drawn


def shown_to(lm: Any, prompts: Sequence[PromptItem], mask: Tensor) -> Pictures | None:
    """The images and videos of prompts, padded on the left as `mask` `[B, L]` says; None: there are none."""
    if all(prompt.vision is None for prompt in prompts):
        return None
    base, asking, three, types, after = decoder_of(lm), placeholders(lm.config), [], [], []
    visions = []
    for prompt, row in zip(prompts, mask.cpu(), strict=True):
        ids, pad = torch.tensor(prompt.ids), len(row) - len(prompt.ids)
        vision = placed(base, asking, ids, prompt.vision or Vision({}))
        visions += [vision] if prompt.vision is not None else []
        plain = torch.arange(len(ids)).expand(3, -1)
        own, last = (plain, len(ids)) if prompt.vision is None else (vision.positions, vision.next)
        three.append(F.pad(plain if own is None else own, (pad, 0)))
        types.append(F.pad(torch.zeros_like(ids) if vision.types is None else vision.types, (pad, 0)))
        after.append(last)
    accepted = inspect.signature(lm.forward).parameters
    inputs = tensors(lm, visions, accepted)
    inputs |= {name: torch.stack(types).to(mask.device) for name in TYPES if name in accepted}
    ropes = torch.stack(three, 1).to(mask.device) if hasattr(base, "get_rope_index") else None
    return Pictures(inputs, ropes, torch.tensor(after, device=mask.device))


@dataclass(frozen=True)
class Prefill:
    """How a prompt is computed once for all its completions, or the `reason` why it cannot be."""

    keep: Mapping[str, Any] = field(default_factory=dict)  # arguments that leave the logits of the last token alone
    reason: str | None = None


class _Forced:
    """In the place of a `Picker`: takes given tokens, long `[R, T]`, and remembers the logits `[R, V]` of each step."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.logits = tokens, list[Tensor]()

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        self.logits.append(logits)
        return self.tokens[rows, step], logits[:, 0], logits[:, 0]


def prefill_of(model: nn.Module, lm: nn.Module) -> Prefill:
    """How `lm`, the causal language model in `model`, shares prompts; found once by a tiny experiment, kept on it.

    A model that cannot do it is several times as slow where prompts are long: a warning says why, once.
    """
    known: dict[Any, Prefill] = vars(lm).setdefault(PREFILLS, {})
    key = (prompt_learning(model) is not None, *signature(lm))
    if key not in known:
        known[key] = found = _probed(model, lm)
        if found.reason is not None:
            what = f"{type(lm).__name__} computes a prompt anew for each of its completions: {found.reason}"
            warnings.warn(what, stacklevel=2)
    return known[key]


def _probed(model: nn.Module, lm: nn.Module) -> Prefill:
    """Compares logits with a shared prompt, padding and a cache with those of each text alone."""
    if prompt_learning(model) is not None:
        return Prefill(reason="its adapter puts virtual tokens before every text")
    device, lengths = device_of(lm), ((5, (3, 3)), (3, (3, 3)))
    batch = probe_batch(text_config(lm), vocabulary(lm), None, lengths=lengths).to(device)
    prompts, completions = [batch.prompt(g) for g in (0, 1)], [batch.completion(c) for c in range(4)]
    ids, mask = padded([p.tolist() for p in prompts], 0, device)
    forced, drawn, call = _Forced(torch.stack(completions)), Drawn(4, 3, device, ()), cast(Any, model)
    try:
        texts = [torch.cat([prompts[c // 2], completions[c]])[None] for c in range(4)]
        own = torch.stack([call(input_ids=text).logits[0, -4:-1] for text in texts])
        keep = {"logits_to_keep": 1}
        try:
            keep = keep if call(input_ids=texts[0], **keep).logits.shape[1] == 1 else {}
        except TypeError:
            keep = {}
        decode_shared(call, keep, ids, mask, 2, forced, drawn)
    except Exception as error:
        return Prefill(reason=str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"[:160])
    dtype = autocast_type(device.type) or own.dtype
    exact = dtype in (torch.float32, torch.float64)
    differences = relative_error(torch.stack(forced.logits, 1).to(dtype if exact else torch.float32), own)
    # In 16 bits the median: rounding alone may route a token of a mixture of experts differently.
    found = float(differences.max() if exact else differences.median())
    return Prefill(
        keep, f"its logits differ from each text's alone by {found:.2g}" if found > TOLERANCE[dtype] else None
    )


def decode_shared(
    model: Any,
    keep: Mapping[str, Any],
    ids: Tensor,
    mask: Tensor,
    n: int,
    picker: Any,
    drawn: Drawn,
    pictures: Pictures | None = None,
) -> None:
    """Draw `n` completions of each prompt into `drawn`, those of a prompt next to each other.

    `ids` and `mask` `[B, L]` are prompts padded on the left, `pictures` their images; for `keep` see `Prefill`. Raises
    ModelError if the model has a cache that cannot be copied; then nothing was drawn.
    """
    device = ids.device
    ragged = not bool(mask.all())
    positions, seen = (mask.cumsum(1) - 1).clamp(min=0), dict[str, Any]()
    position = positions[:, -1:]
    if pictures is not None:
        seen, position = dict(pictures.inputs), pictures.after[:, None] - 1
        positions = positions if pictures.positions is None else pictures.positions
    padding = mask if ragged else None
    out = model(input_ids=ids, attention_mask=padding, position_ids=positions, use_cache=True, **seen, **keep)
    given = cache_of(out)
    (cache,) = given.values()
    require(plain_cache(cache), ModelError, f"its {type(cache).__name__} cannot be copied row by row")
    logits = out.logits[:, -1]
    if n > 1:
        cache.batch_repeat_interleave(n)
        logits, mask, position = (x.repeat_interleave(n, 0) for x in (logits, mask, position))
    rows = torch.arange(len(logits), device=device)
    active = torch.ones(len(rows), dtype=torch.bool, device=device)
    for step in range(drawn.steps):
        tokens, logps, raw = picker(logits, rows, step)
        active = active & ~drawn.add(rows, step, tokens, logps, raw)
        left = int(active.sum())
        if not left or step + 1 == drawn.steps:
            break
        position = position + 1
        if ragged:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if len(rows) - left >= FINISHED_SHARE * len(rows):
            index = active.nonzero()[:, 0]
            cache.batch_select_indices(index)
            rows, tokens, position, mask, active = (x[index] for x in (rows, tokens, position, mask, active))
        out = model(
            input_ids=tokens[:, None],
            attention_mask=mask if ragged else None,
            position_ids=position,
            use_cache=True,
            **given,
            **keep,
        )
        given = cache_of(out)
        (cache,) = given.values()
        logits = out.logits[:, -1]


class PickProcessor:
    """A logits processor that leaves one token possible: the one that `Picker` draws."""

    def __init__(self, picker: Picker, drawn: Drawn, prompt_length: int) -> None:
        self.picker, self.drawn, self.prompt_length = picker, drawn, prompt_length
        self.rows = torch.arange(drawn.rows, device=drawn.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_length
        tokens, logps, raw = self.picker(scores, self.rows, step)
        self.drawn.add(self.rows, step, tokens, logps, raw)
        return torch.full_like(scores, float("-inf")).scatter(1, tokens[:, None], 0.0)

    def finished(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """As a stopping criterion: the completions that have ended."""
        return self.drawn.stopped.clone()


def decode_generate(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    n: int,
    picker: Picker,
    drawn: Drawn,
    pictures: Pictures | None = None,
    *,
    pad_id: int,
    static: bool,
) -> None:
    """The same draws with `model.generate`: for caches of fixed size, and for models whose cache cannot be copied."""
    ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
    pick: Any = PickProcessor(picker, drawn, ids.shape[1])
    config = GenerationConfig(
        max_new_tokens=drawn.steps,
        do_sample=False,
        num_beams=1,
        # Explicit, so that the model's own generation config cannot change the distribution.
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        # -1 is no token: without it the model's own would end completions.
        eos_token_id=drawn.stop_ids.tolist() or [-1],
        pad_token_id=pad_id,
        cache_implementation="static" if static else None,
    )
    model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([pick]),
        stopping_criteria=StoppingCriteriaList([pick.finished]),
        **({} if pictures is None else pictures.inputs),
    )


def decode_beside(steps: DecoderSteps, first: int, config: Any, n: int, picker: Picker, drawn: Drawn) -> None:
    """Draw `n` completions of each prompt into `drawn` with an encoder-decoder, behind the start token `first`.

    Of the generation config two rules hold: a forced first token (mBART-50's language), and tokens that are never
    written (Marian's padding, which would otherwise be the most probable).
    """
    rows = torch.arange(drawn.rows, device=drawn.device)
    parents, tokens = rows // n, torch.full_like(rows, first)
    forced, banned = config.forced_bos_token_id, [i for ids in config.bad_words_ids or () if len(ids) == 1 for i in ids]
    for step in range(drawn.steps):
        logits = steps(parents, tokens).index_fill(1, rows.new_tensor(banned), -torch.inf)
        if forced is not None and step == 0:
            logits = torch.full_like(logits, -torch.inf).index_fill(1, rows.new_tensor([forced]), 0.0)
        tokens, logps, raw = picker(logits, rows, step)
        parents = (~drawn.add(rows, step, tokens, logps, raw)).nonzero()[:, 0]
        if not len(parents):
            break
        rows, tokens = rows[parents], tokens[parents]


# ---- The samplers ----


def module_of(model_or_path: Any, name: str) -> Any:
    """The model under DDP and the like, which know no `generate`; adapters stay on. Raises `RolloutError`."""
    model, what = model_or_path, f"{name} samples from a model in this process, got {model_or_path!r}"
    require(isinstance(model, nn.Module), RolloutError, what)
    while isinstance(getattr(model, "module", None), nn.Module) and not hasattr(model, "config"):
        model = model.module
    return model


def ready(
    sampler: Any, prompts: Sequence[PromptItem], n: int, sampling: SamplingConfig
) -> tuple[tuple[PromptItem, ...], Sequence[int], StopStrings | None]:
    """Prompts that can be sampled from, the token ids that end a completion, and the stop strings or None.

    Raises `RolloutError`, for instance if a prompt with `max_new_tokens` goes beyond the model's positions.
    """
    checked, asking, name = checked_prompts(prompts, n), placeholders(sampler.lm.config), type(sampler.lm).__name__
    for prompt in prompts:
        what = f"row {prompt.row}: the prompt has images or videos, and {name} reads text alone"
        require(prompt.vision is None or asking, RolloutError, what)
        what = f"row {prompt.row}: the prompt has tokens that stand for images in {name}, and comes without them"
        require(prompt.vision is not None or asking.keys().isdisjoint(prompt.ids), RolloutError, what)
    needs_tokenizer(sampler.tokenizer, sampling.stop)
    positions = getattr(sampler.lm.config.get_text_config(), "max_position_embeddings", None)
    longest = max(prompts, key=lambda p: len(p.ids))
    what = (
        f"row {longest.row}: {len(longest.ids)} prompt tokens and max_new_tokens {sampling.max_new_tokens} are "
        f"more than the model's {positions} positions; expected a shorter prompt or fewer new tokens"
    )
    both = (len(longest.ids), sampling.max_new_tokens)
    needed = max(both) if is_encoder_decoder(sampler.lm) else sum(both)
    require(positions is None or needed <= positions, RolloutError, what)
    stop_ids = sampling.stop_ids if sampling.stop_ids is not None else stop_ids_of(sampler.tokenizer, sampler.lm)
    return checked, stop_ids, StopStrings(sampler.tokenizer, sampling.stop) if sampling.stop else None


@dataclass(eq=False)
class HFGenerate:
    """Samples from a transformers model, in batches of prompts of similar length.

    With a dynamic cache a prompt is computed once for all its completions, and completions that have ended leave the
    batch. A static cache, and models that a probe shows cannot do it (recurrent, hybrid: with a warning, once), go
    through `model.generate`. The metric `rollout/shared_prefill` is 1 or 0.

    The model is used in evaluation mode without gradients. On one device, the same seed, prompts and weights give the
    same completions, whatever the batches are, up to the rounding of logits.

    Args:
        model: a causal language model, plain or with an adapter; wrappers of DDP are looked through.
        tokenizer: needed for stop strings, and for end-of-sequence tokens the model does not tell.
        cache: "dynamic" or "static".
        max_batch_tokens: most tokens (prompts and completions at their full length) in the cache at a time; a
            single completion that is longer is sampled all the same.

    Attributes:
        progress: called with how many completions of a call are drawn, and how many there will be.
    """

    name: ClassVar[str] = "hf"
    neutral: ClassVar[frozenset[str]] = frozenset({"max_batch_tokens"})
    model: Any
    tokenizer: Any = None
    _: KW_ONLY
    cache: Literal["dynamic", "static"] = "dynamic"
    max_batch_tokens: Count = 65536

    def __post_init__(self) -> None:
        self.given: dict[str, Any] = {"cache": self.cache, "max_batch_tokens": self.max_batch_tokens}
        validate_settings("sampler 'hf'", HFGenerate, self.given)
        self.progress: Callable[[int, int], None] | None = None
        self.refresh(self.model)

    def refresh(self, model_or_path: Any) -> None:
        """Sample from another model. (A model that is being trained is always sampled from as it is.)"""
        self.model = module_of(model_or_path, self.name)
        self.lm = causal_lm(self.model, SAMPLED)

    def sample(self, prompts: Sequence[PromptItem], *, n: int, sampling: SamplingConfig) -> Rollouts:
        """`n` completions of each prompt. Raises `RolloutError` for prompts that leave no room."""
        started = time.perf_counter()
        asked, stop_ids, stops = ready(self, prompts, n, sampling)
        numbers = uniforms(prompts, n, sampling)
        found: dict[int, SampledCompletion] = {}
        with evaluating(self.model), contiguous_head(self.lm):
            for part in self._batches(prompts, n, sampling.max_new_tokens):
                found |= self._batch(prompts, n, part, numbers, sampling, stop_ids, stops)
                if self.progress is not None:
                    self.progress(len(found), len(prompts) * n)
        groups = tuple(tuple(found[p * n + k] for k in range(n)) for p in range(len(prompts)))
        metrics = {"rollout/shared_prefill": float(self._shared)}
        return Rollouts(asked, groups, sampling, time.perf_counter() - started, metrics)

    def _batches(self, prompts: Sequence[PromptItem], n: int, new_tokens: int) -> list[tuple[list[int], range]]:
        """Prompts by length, longest first, and which of their completions: what fits the budget together."""
        sizes = [len(p.ids) + (p.vision.patches if p.vision is not None else 0) for p in prompts]
        order = sorted(range(len(prompts)), key=lambda p: -sizes[p])
        batches: list[tuple[list[int], range]] = []
        while order:
            rows = max(1, self.max_batch_tokens // (sizes[order[0]] + new_tokens))
            if rows < n:
                batches += [([order[0]], range(k, min(n, k + rows))) for k in range(0, n, rows)]
                order = order[1:]
            else:
                count = rows // n
                batches.append((order[:count], range(n)))
                order = order[count:]
        return batches

    def _batch(
        self,
        prompts: Sequence[PromptItem],
        n: int,
        part: tuple[list[int], range],
        numbers: torch.Tensor,
        sampling: SamplingConfig,
        stop_ids: Sequence[int],
        stops: StopStrings | None,
    ) -> dict[int, SampledCompletion]:
        chosen, copies = part
        where = [p * n + k for p in chosen for k in copies]
        device = device_of(self.lm)
        picker = Picker(sampling, numbers[where], device, placeholders(self.lm.config))
        drawn = Drawn(len(where), sampling.max_new_tokens, device, stop_ids, stops)
        self._draw([prompts[p] for p in chosen], len(copies), picker, drawn)
        columns = (drawn.ids, drawn.logps, drawn.raw, drawn.lengths, drawn.stopped)
        return {
            place: SampledCompletion(ids[:length], logps[:length], raw[:length], "stop" if stopped else "length")
            for place, ids, logps, raw, length, stopped in zip(where, *(c.tolist() for c in columns), strict=True)
        }

    def _draw(self, prompts: Sequence[PromptItem], n: int, picker: Picker, drawn: Drawn) -> None:
        asking = placeholders(self.lm.config)  # which no padding may be
        pad_id = padding_token(drawn.stop_ids.tolist(), asking)
        ids, mask = padded([p.ids for p in prompts], pad_id, drawn.device)
        static = self.cache == "static"
        prefill = Prefill(reason="the cache is static") if static else prefill_of(self.model, self.lm)
        self._shared = prefill.reason is None
        if self._shared:
            pictures = shown_to(self.lm, prompts, mask)
            decode_shared(self.model, prefill.keep, ids, mask, n, picker, drawn, pictures)
        else:
            copies = [prompt for prompt in prompts for _ in range(n)]
            pictures = shown_to(self.lm, copies, mask.repeat_interleave(n, 0))
            decode_generate(self.model, ids, mask, n, picker, drawn, pictures, pad_id=pad_id, static=static)


class Seq2SeqGenerate(HFGenerate):
    """Samples from an encoder-decoder, for answers: online training takes causal models only.

    Of the model's generation config it keeps the forced first token and single banned tokens, and nothing else.
    """

    def refresh(self, model_or_path: Any) -> None:
        """Sample from another model."""
        self.model = module_of(model_or_path, self.name)
        self.lm = language_model(self.model)
        message = f"{type(self.lm).__name__} is no encoder-decoder, or has an adapter with virtual tokens; "
        fits = is_encoder_decoder(self.lm) and prompt_learning(self.model) is None
        require(fits, ModelError, message + "expected one such as T5, without these")

    def _draw(self, prompts: Sequence[PromptItem], n: int, picker: Picker, drawn: Drawn) -> None:
        self._shared = True
        steps, config = DecoderSteps(self.model, [p.ids for p in prompts]), cast(Any, self.lm).generation_config
        decode_beside(steps, start_id(self.lm), config, n, picker, drawn)


def answering(model: Any, tokenizer: Any) -> HFGenerate:
    """The sampler of a model of either kind."""
    return (Seq2SeqGenerate if prompt_role(model) == "encoder" else HFGenerate)(model, tokenizer)


SIZES = frozenset({"num_blocks", "max_batch_tokens", "max_memory_percent"})
CPU_PAGE, CPU_REQUESTS, CPU_TOKENS = 32, 64, 256


class HFContinuous:
    """Samples with transformers' continuous batching: a paged cache, new prompts as others end.

    The prompt's cache is shared by its completions. The seed makes a call repeatable with the same prompts in
    the same order on the same device; unlike `HFGenerate`'s, completions depend on the batch. Text after a stop
    string is generated and thrown away, because the engine knows stop tokens only. `raw_logps` are known
    only where the sampling leaves the model's distribution as it is.

    Args:
        model: a causal language model whose attention is "sdpa", "eager" or flash attention, without
            virtual tokens before the prompt.
        tokenizer: as in `HFGenerate`.
        settings: of transformers' `ContinuousBatchingConfig`, such as `page_size` or `max_memory_percent`. Without
            any about its size the cache takes most of an accelerator's free memory; on a CPU it is just large enough
            for `CPU_REQUESTS` completions at a time.
    """

    name = "continuous"

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, settings: dict[str, Any] | None = None) -> None:
        self.given = validate_settings("sampler 'continuous'", HFContinuous, {"settings": settings})
        self.tokenizer, self.settings = tokenizer, dict(settings or {})
        self.refresh(model)
        self.check(settings=settings)

    @staticmethod
    def check(*, settings: Mapping[str, Any] | None) -> None:
        """Raises `RecipeError` for settings that the engine does not have."""
        _batching(settings or {}, 0)

    def refresh(self, model_or_path: Any) -> None:
        """Sample from another model. (A model that is being trained is always sampled from as it is.)"""
        model = module_of(model_or_path, self.name)
        lm: Any = causal_lm(model, SAMPLED)
        what = f"{type(lm).__name__} keeps a recurrent state; continuous batching needs attention only"
        require(not getattr(lm, "_is_stateful", False), ModelError, what)
        what = f"{type(lm).__name__} has tokens that stand for images, which continuous batching could draw, and it is "
        require(not placeholders(lm.config), ModelError, what + "given no images; expected the sampler 'hf'")
        self.model, self.lm = model, lm

    def sample(self, prompts: Sequence[PromptItem], *, n: int, sampling: SamplingConfig) -> Rollouts:
        """`n` completions of each prompt. Raises `RolloutError` where the engine fails, with its message."""
        started = time.perf_counter()
        asked, stop_ids, stops = ready(self, prompts, n, sampling)
        batching = _batching(self._sized(prompts, n, sampling), sampling.seed)
        with evaluating(self.model):
            # The implementation of attention is put back: the engine changes it on models without a paged one.
            before = self.lm.config._attn_implementation
            try:
                found = self.lm.generate_batch(
                    [p.ids for p in prompts],
                    generation_config=_generation_config(n, sampling, stop_ids),
                    continuous_batching_config=batching,
                )
            # The engine has no error of its own: these are what it raises for models and devices that it lacks.
            except (ValueError, ImportError, RuntimeError, AttributeError) as error:
                raise RolloutError(
                    f"continuous batching does not run here ({type(error).__name__}: {error}); expected a model "
                    "and device that transformers' generate_batch supports, or the sampler 'hf'"
                ) from error
            finally:
                if self.lm.config._attn_implementation != before:
                    self.lm.set_attn_implementation(before)
        results = list(found.values())
        what = f"continuous batching gave {len(results)} of {len(prompts) * n} completions; its own log says why"
        require(len(results) == len(prompts) * n, RolloutError, what)
        groups = tuple(
            tuple(_completion(prompt, r, sampling, stop_ids, stops) for r in results[p * n : (p + 1) * n])
            for p, prompt in enumerate(prompts)
        )
        return Rollouts(asked, groups, sampling, time.perf_counter() - started)

    def _sized(self, prompts: Sequence[PromptItem], n: int, sampling: SamplingConfig) -> dict[str, Any]:
        """The settings, with a size for CPUs: the engine's own default is more than half of the machine's memory."""
        if device_of(self.lm).type != "cpu" or SIZES & self.settings.keys():
            return self.settings
        page = self.settings.get("page_size", CPU_PAGE)
        longest = max(len(p.ids) for p in prompts) + sampling.max_new_tokens
        blocks = min(len(prompts) * n, CPU_REQUESTS) * (-(-longest // page) + 1)
        return {"page_size": page, "num_blocks": blocks, "max_batch_tokens": CPU_TOKENS, **self.settings}


def _batching(settings: Mapping[str, Any], seed: int) -> Any:
    """The engine's configuration. Raises `RecipeError` for settings that it does not have, or that are not free."""
    fixed: dict[str, Any] = {
        "return_logprobs": True,
        "seed": seed % 2**31,
        # A processor that the engine lacks would change the distribution silently.
        "drop_unsupported_processors": False,
    }
    what = "sampler 'continuous': settings:"
    legal = inspect.signature(ContinuousBatchingConfig).parameters.keys() - fixed.keys()
    for name in settings:
        require(name in legal, RecipeError, f"{what} unknown setting {name!r}{nearest(name, legal)}")
    try:
        return ContinuousBatchingConfig(**fixed, **settings)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{what} {error}") from None


def _generation_config(n: int, sampling: SamplingConfig, stop_ids: Sequence[int]) -> Any:
    drawn = sampling if sampling.temperature > 0 else SamplingConfig()
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        num_return_sequences=n,
        repetition_penalty=1.0,
        eos_token_id=list(stop_ids) or [-1],
        pad_token_id=stop_ids[0] if stop_ids else 0,
        temperature=drawn.temperature,
        top_k=drawn.top_k,
        top_p=drawn.top_p,
        min_p=drawn.min_p or None,
    )


def _completion(
    prompt: PromptItem, result: Any, sampling: SamplingConfig, stop_ids: Sequence[int], stops: StopStrings | None
) -> SampledCompletion:
    ids, logps = list(result.generated_tokens), list(result.logprobs)
    given = f"{len(ids)} tokens with {len(logps)} log-probabilities ({result.error})"
    good = result.error is None and ids and len(ids) == len(logps)
    require(good, RolloutError, f"row {prompt.row}: continuous batching gave {given}")
    stopped = ids[-1] in stop_ids
    end = stops.length(ids) if stops is not None else None
    if end is not None:
        ids, logps, stopped = ids[:end], logps[:end], True
    if sampling.temperature == 0:  # the engine reports the model's own there
        return SampledCompletion(ids, [0.0] * len(ids), logps, "stop" if stopped else "length")
    return SampledCompletion(ids, logps, logps if sampling.is_model else None, "stop" if stopped else "length")
