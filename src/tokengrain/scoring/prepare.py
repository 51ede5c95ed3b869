"""`prepare`: make a model accept batches of tokens, whatever it is wrapped in."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokengrain.batch import Completion, PromptRole, Sample, TokenBatch
from tokengrain.errors import ModelError, require
from tokengrain.scoring.encdec import start_id
from tokengrain.scoring.head import Head
from tokengrain.scoring.layouts import OTHER_WINDOWS, PROBED_WINDOW, Layout, MaskForm, NotShareableError, mask_forms
from tokengrain.scoring.model import (
    ModelPlan,
    ScoreRequest,
    autocast_type,
    decoder_of,
    device_of,
    evaluating,
    head_name,
    input_embeddings,
    is_encoder_decoder,
    is_token_classifier,
    kind_of,
    nested,
    positions_of,
    run,
    text_config,
    vocabulary,
)
from tokengrain.scoring.vision import placeholders

CLASSIFIER = "expected a decoder such as Llama or Qwen"
PLANS = "_tokengrain_plans"
TOLD = "_tokengrain_layout"
TOLD_REASON = "_tokengrain_warned"
REPLACED = "_tokengrain_replaced"
MARK = "_tokengrain_dispatches"


def prepare(model: nn.Module, *, layout: Layout | None = None) -> ModelPlan:
    """Install the scoring forward on the model in `model` and find out how to score it; the plan is kept on the model.

    A tiny probe compares our head with the model's own logits, and shared prompts with separate rows. Where they
    differ, or the model cannot take shared rows, a warning says so once and the slower way is used. The probe leaves
    training mode and random numbers alone.

    Args:
        model: a causal language model, an encoder-decoder, or a token-classification model with one label, plain or
            wrapped.
        layout: "auto" shares prompts where the model can and it pays; "shared" insists; "separate" never
            does. (An encoder-decoder encodes each prompt once in any layout, and has no "shared".) It becomes the
            default of `score` for this model. None: as before, at first "auto".

    Raises:
        ModelError: another kind of model, or layout="shared" for a model that cannot share.
    """
    lm = scored_model(model)
    plan = plan_for(model, lm, layout)
    if layout is not None:
        vars(lm)[TOLD] = layout
    return plan


def plan_for(model: nn.Module, lm: nn.Module, layout: Layout | None) -> ModelPlan:
    """The plan of `lm`, the model that is scored in `model`, for one layout (None: the model's default)."""
    layout = layout or vars(lm).get(TOLD, "auto")
    known = layout in ("auto", "shared", "separate")
    require(known, ModelError, f"unknown layout; got {layout!r}, expected 'auto', 'shared' or 'separate'")
    install(lm)
    virtual = prompt_learning(model) is not None
    encoder = is_encoder_decoder(lm)
    message = f"{type(lm).__name__} is an encoder-decoder, which encodes each prompt once and writes each completion "
    require(not (encoder and layout == "shared"), ModelError, message + "in a row of its own; expected layout 'auto'")
    if virtual:
        plan = ModelPlan("separate", kind_of(lm), "logits", reason="its adapter puts virtual tokens before every text")
    else:
        plan = _found_out(model, lm, sharing=layout != "separate" and not encoder)
    can = layout != "shared" or plan.masks is not None
    require(can, ModelError, f"{type(lm).__name__} cannot share prompts: {plan.reason}")
    if layout == "auto" and not virtual and plan.reason is not None and not vars(lm).get(TOLD_REASON):
        vars(lm)[TOLD_REASON] = True
        how = "is scored through its own full logits"
        if plan.head == "fused":
            how = "cannot share prompts, so completions run separately"
        warnings.warn(f"{type(lm).__name__} {how}: {plan.reason}", stacklevel=4)
    return replace(plan, layout=layout if plan.masks is not None else "separate")


def plan_to_see(
    model: nn.Module, lm: nn.Module, plan: ModelPlan, batch: TokenBatch, layout: Layout | None
) -> ModelPlan:
    """The plan for a batch with images or videos: that for text, or what a second probe found, with the first batch.

    Raises ModelError for layout="shared" and a model that cannot share prompts with images.
    """
    name, wanted = type(lm).__name__, layout or vars(lm).get(TOLD, "auto")
    virtual = prompt_learning(model) is not None
    require(not virtual, ModelError, f"an adapter that puts virtual tokens before every text of {name} takes no images")
    if plan.head == "logits" or not placeholders(lm.config):
        return plan
    plans: dict[tuple[Any, ...], ModelPlan] = vars(lm).setdefault(PLANS, {})
    kinds = frozenset(name for vision in batch.vision if vision is not None for name in vision.inputs)
    sharing = plan.masks is not None
    key = (kinds, sharing, *signature(lm))
    if key not in plans:
        plans[key] = _probe_with_images(model, lm, plan, batch)
        if sharing and plans[key].masks is None:
            warnings.warn(f"{name} cannot share prompts with images: {plans[key].reason}", stacklevel=3)
    found = plans[key]
    can = wanted != "shared" or found.masks is not None
    require(can, ModelError, f"{name} cannot share prompts with images: {found.reason}")
    return replace(found, layout=plan.layout if found.masks is not None else "separate")


def _found_out(model: nn.Module, lm: nn.Module, *, sharing: bool) -> ModelPlan:
    """What the probe found, from the model's memory if it can be."""
    plans: dict[tuple[Any, ...], ModelPlan] = vars(lm).setdefault(PLANS, {})
    key = signature(lm)
    plan = plans.get((True, *key)) or (None if sharing else plans.get((False, *key)))
    if plan is None:
        meta = any(p.device.type == "meta" for p in lm.parameters())
        require(not meta, ModelError, f"{type(lm).__name__} has weights on the meta device; load them before scoring")
        plan = plans[(sharing, *key)] = probe(model, lm, sharing=sharing)
    return plan


def signature(lm: nn.Module) -> tuple[Any, ...]:
    """What a plan depends on: attention implementation, precision, and kinds of modules (adapters come and go)."""
    kinds = frozenset(type(m).__name__.removeprefix("FSDP") for m in lm.modules())
    return (getattr(text_config(lm), "_attn_implementation", None), _dtype(lm, None), kinds)


def language_model(model: nn.Module) -> nn.Module:
    """The Hugging Face language model under DDP, FSDP, PEFT, `torch.compile` and the like.

    A causal one or an encoder-decoder. Raises ModelError if nothing there has output embeddings.
    """
    inner: Any = unwrapped(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    message = f"{type(inner).__name__} has no language-model head; expected a model such as AutoModelForCausalLM or "
    require(head is not None, ModelError, message + "AutoModelForSeq2SeqLM loads")
    return inner


SAMPLED = "sampling, which continues the prompt's own tokens"


def causal_lm(model: nn.Module, why: str = SAMPLED) -> nn.Module:
    """The causal language model in `model`; `why` there has to be one is said to those who bring another.

    Raises ModelError for an encoder-decoder too.
    """
    lm = language_model(model)
    message = f"{type(lm).__name__} is an encoder-decoder; expected a causal language model, for {why}"
    require(not is_encoder_decoder(lm), ModelError, message)
    return lm


def scored_model(model: nn.Module) -> nn.Module:
    """The language model in `model`, or the token-classification model with one label; else ModelError."""
    inner: Any = unwrapped(model)
    if not is_token_classifier(inner):
        return language_model(inner)
    require(not is_encoder_decoder(inner), ModelError, f"{type(inner).__name__} reads both ways; {CLASSIFIER}")
    message = f"{type(inner).__name__} has {inner.config.num_labels} labels; expected one, as "
    message += "AutoModelForTokenClassification.from_pretrained(..., num_labels=1) gives it"
    require(inner.config.num_labels == 1, ModelError, message)
    head_name(inner)  # raises if it has none
    return inner


def prompt_role(model: nn.Module) -> PromptRole:
    """What a prompt is to the model: the beginning of its text, or its encoder's input."""
    return "encoder" if is_encoder_decoder(unwrapped(model)) else "prefix"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model of transformers under DDP, FSDP, PEFT, `torch.compile` and the like."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), nn.Module) and not hasattr(inner, "config"):
            inner = inner.module
        else:
            return inner


def prompt_learning(model: nn.Module) -> nn.Module | None:
    """The PEFT model around it that puts virtual tokens before every text, if there is one at work."""
    peft = next((m for m in nested(model) if hasattr(m, "peft_config") and hasattr(m, "active_peft_config")), None)
    at_work = peft is not None and peft.active_peft_config.is_prompt_learning and not peft._adapters_disabled
    return peft if at_work else None


def install(lm: nn.Module) -> None:
    """Replace the instance's `forward` by one that also takes `token_batch=`; idempotent.

    It is a bound method, so that `copy.deepcopy` binds the copy's to the copy and accelerate can wrap it; a pickled
    model comes back with its class's forward.
    """
    if _is_installed(lm):
        return
    _keep_gradients(lm)
    # Somebody (accelerate, TRL) may have wrapped it before: ordinary calls go to theirs. Theirs may end in a forward of
    # ours again, which has what it replaced at its own place of the list.
    replaced = vars(lm).setdefault(REPLACED, [])
    replaced.append(vars(lm).get("forward"))
    vars(lm)["forward"] = types.MethodType(_dispatcher(type(lm), len(replaced) - 1), lm)


def _keep_gradients(lm: nn.Module) -> None:
    """Keep the 4-bit weights of bitsandbytes on a CPU as they train: evaluation packs them for a kernel that has no
    gradient, and rounds to bfloat16, and training goes on with it."""
    layer: Any
    for layer in lm.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
            if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
                layer.state_dict()  # which unpacks them


def _is_installed(lm: nn.Module) -> bool:
    forward = vars(lm).get("forward")
    return forward is not None and hasattr(inspect.unwrap(forward, stop=lambda f: hasattr(f, MARK)), MARK)


def _dispatcher(cls: Any, place: int) -> Callable[..., Any]:
    # Pickle finds a bound method by its function's name, hence "forward".
    def forward(self: nn.Module, *args: Any, token_batch: Any = None, **kwargs: Any) -> Any:
        original = vars(self)[REPLACED][place] or types.MethodType(type(self).forward, self)
        return original(*args, **kwargs) if token_batch is None else run(self, token_batch, original)

    forward.__doc__ = cls.forward.__doc__
    # Trainer and generate look at the signature to see which arguments a model takes.
    vars(forward)["__signature__"] = inspect.signature(cls.forward)
    setattr(forward, MARK, True)
    return forward


# ---- Find out by a tiny experiment how a model is to be scored: its head, and whether prompts can be shared.

Lengths = tuple[tuple[int, tuple[int, ...]], ...]
# Largest relative difference that rounding explains, by the type the model computes in. Models normalise and
# take softmax in float32 even when they are float64.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
# What a sliding window that is too long for a probe is made for its time.
SHORT_WINDOW = 5


def probe(model: nn.Module, lm: nn.Module, *, sharing: bool) -> ModelPlan:
    """The plan for a model on which `install` has run. Without `sharing` only the head is looked at."""
    # DDP's forward would synchronise buffers; its hooks are not needed without gradients.
    call: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    device = device_of(lm)
    # Models should draw no random numbers in evaluation mode; those that do must not shift the user's.
    with evaluating(call), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        plan = _head_plan(call, lm, ModelPlan("separate", kind_of(lm)))
        if plan.head == "fused" and sharing:
            plan = _sharing_plan(call, lm, plan)
    return plan


def _probe_with_images(model: nn.Module, lm: nn.Module, plan: ModelPlan, batch: TokenBatch) -> ModelPlan:
    """Made-up completions of the batch's own prompts: the model's own logits of each text against separate rows, and
    these against shared ones, without and with images whose tokens see each other.
    """
    call: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    batch = _with_made_up_completions(lm, batch)
    device, dtype = device_of(lm), _dtype(lm, plan.autocast)
    scorer = is_token_classifier(lm)
    wants = ("token_scores", "token_scores") if scorer else ("raw_logits", "own_logits")
    with evaluating(call), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        separate, own = (
            call(token_batch=_request(batch, p, "separate", want))[want]
            for p, want in zip((plan, replace(plan, head="logits")), wants, strict=True)
        )
        if scorer:
            apart = float((separate - own).abs().max() / own.abs().max().clamp_min(1e-30))
        else:
            finished = Head(torch.empty(0), None, plan.scale, plan.softcap).finish(separate)
            apart = float(relative_error(finished, own).max())
        if apart > TOLERANCE[dtype]:
            reason = f"with images its logits are not its head's alone (difference {apart:.2g})"
            return replace(plan, head="logits", masks=None, reason=reason)
        if plan.masks is None:
            return plan
        # The better one: in 16 bits even the wrong one may come near.
        forms = [replace(plan.masks, blocks=blocks) for blocks in (False, True)]
        tried = [_difference(call, lm, plan, batch, form) for form in forms]
    difference, reason = min(tried)
    if difference <= TOLERANCE[dtype]:
        return replace(plan, masks=forms[tried.index((difference, reason))])
    return replace(plan, masks=None, reason=reason)


def _with_made_up_completions(lm: nn.Module, batch: TokenBatch) -> TokenBatch:
    """Of every kind of input the shortest prompt that has it, with completions of a few tokens of text.

    They are no longer than its own, which have to fit the model.
    """
    lengths, longest = batch.prompt_offsets.diff().tolist(), [1] * batch.n_prompts
    for prompt, length in zip(batch.group.tolist(), batch.completion_offsets.diff().tolist(), strict=True):
        longest[prompt] = max(longest[prompt], length)
    shortest: dict[frozenset[str], int] = {}
    for prompt, vision in enumerate(batch.vision):
        if vision is not None:
            names = frozenset(vision.inputs)
            shortest[names] = min(prompt, shortest.get(names, prompt), key=lambda p: lengths[p])
    texts = probe_batch(text_config(lm), vocabulary(lm), None, ((2, (4, 6)),), placeholders(lm.config))
    made = [texts.completion(c).tolist() for c in range(2)]
    chosen = sorted(shortest.values())
    return TokenBatch.from_samples([batch.sample(p, [Completion(ids[: longest[p]]) for ids in made]) for p in chosen])


def probe_batch(
    config: Any,
    vocab: int,
    window: int | None,
    lengths: Lengths = ((9, (4, 6, 4)), (5, (5, 4))),
    avoid: Collection[int] = (),
) -> TokenBatch:
    """Made-up texts of (prompt, completions) lengths; the first prompt is longer than a short window."""
    special = [getattr(config, n, None) for n in ("pad_token_id", "bos_token_id", "eos_token_id")]
    ends = {t for s in special for t in (s if isinstance(s, (list, tuple)) else [s]) if isinstance(t, int)}
    avoid = {*avoid, *(ends if vocab > 2 * len(ends) + 8 else ())}
    limit = positions_of(config) or 1 << 30
    (first, completions), *more = lengths
    first = max(2, min(limit - max(completions), max(first, (window or 0) + 3)))

    def ids(seed: int, n: int) -> list[int]:
        starts = ((7919 * (i + 1) + 104729 * seed) % vocab for i in range(n))
        return [next(t for k in range(vocab) if (t := (s + k) % vocab) not in avoid) for s in starts]

    samples = [
        Sample(ids(10 * g, p), [Completion(ids(10 * g + k + 1, n)) for k, n in enumerate(ns)])
        for g, (p, ns) in enumerate([(first, completions), *more])
    ]
    return TokenBatch.from_samples(samples)


def _window(config: Any) -> int | None:
    """The longest window in the config that is short enough to be exceeded by a probe."""
    names = ("sliding_window", "sliding_window_size", "attention_chunk_size", "chunk_size")
    found = [getattr(config, n, None) for n in (*names, *OTHER_WINDOWS)]
    return max((w for w in found if isinstance(w, int) and 0 < w <= PROBED_WINDOW), default=None)


def _request(batch: TokenBatch, plan: ModelPlan, layout: Layout, *want: str) -> ScoreRequest:
    return ScoreRequest(batch, frozenset(want), plan, layout=layout, one_forward=True)


def _own_logits(
    call: nn.Module, lm: nn.Module, batch: TokenBatch, text: int = 0
) -> tuple[Tensor, torch.dtype | None, str | None]:
    """The model's own logits `[L, V]` of one text, its decoder's autocast type, and why it has no decoder.

    Of a causal model those of prompt and completion; of an encoder-decoder those that predict the completion.
    """
    prompt, completion, device = batch.prompt(text), batch.completion(text), device_of(lm)
    inputs = {"input_ids": torch.cat([prompt, completion])}
    if is_encoder_decoder(lm):
        start = completion.new_tensor([start_id(lm)])
        inputs = {"input_ids": prompt, "decoder_input_ids": torch.cat([start, completion[:-1]])}
    inputs = {name: ids[None].to(device) for name, ids in inputs.items()}
    seen: list[torch.dtype | None] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(autocast_type(device.type))

    hook, missing = None, None
    try:
        hook = decoder_of(lm).register_forward_pre_hook(look, with_kwargs=True)
    except ModelError as error:
        missing = str(error)
    try:
        if autocast_type(device.type) is not None:  # the caller's, which is no property of the model
            with torch.autocast(device.type, enabled=False):
                call(**inputs)
        own = call(**inputs).logits
    except Exception as error:
        raise ModelError(f"{type(lm).__name__} does not run on token ids alone: {_short(error)}") from error
    finally:
        if hook is not None:
            hook.remove()
    return own[0], (seen[0] if seen else None), missing


def _head_plan(call: nn.Module, lm: nn.Module, plan: ModelPlan) -> ModelPlan:
    """Compares the decoder and our head with the model's own logits on short texts, and these with a shorter one's.

    Raises ModelError if the logits (or scores) depend on later tokens, so that they are no predictions of them.
    """
    encoder = plan.kind == "encoder-decoder"
    # Prompts and completions of two lengths in an encoder-decoder's rows: padding must change nothing.
    lengths: Lengths = ((5, (5,)), (3, (4,))) if encoder else ((5, (5,)),)
    batch = probe_batch(text_config(lm), vocabulary(lm), None, lengths, placeholders(lm.config))
    start = Completion(batch.completion(0).tolist()[:3])
    short = TokenBatch.from_samples([Sample(batch.prompt(0).tolist(), [start])])
    (begun, *_), (own, autocast, missing) = (_own_logits(call, lm, b) for b in (short, batch))
    tolerance = TOLERANCE[_dtype(lm, autocast)]
    kind, plan, first = type(lm).__name__, replace(plan, autocast=autocast), batch.prompt(0).numel()
    if is_token_classifier(lm):
        size = own.abs().max().clamp_min(1e-30)
        leak = float((own[: len(begun)] - begun).abs().max() / size)
        what = f"a token's score by {kind} depends on later tokens; {CLASSIFIER}"
    else:
        # The median: rounding alone may route a token of a mixture of experts differently.
        leak = float(relative_error(own[: len(begun)], begun).median())
        what = f"what {kind} predicts depends on later tokens; expected a causal language model (BERT and its kind are "
        what += "one with is_decoder=True in their config)"
    require(not leak > tolerance, ModelError, what)
    want = "token_scores" if is_token_classifier(lm) else "raw_logits"
    ours = None
    if missing is None:
        try:
            ours = call(token_batch=_request(batch, plan, "separate", want))[want]
        except Exception as error:
            missing = f"its decoder does not run alone: {_short(error)}"
    if ours is None:
        return replace(plan, head="logits", reason=missing)
    if is_token_classifier(lm):
        best, name = float((ours - own[first:, 0]).abs().max() / size), "scores are"
    else:
        predicted = own[first - 1 : -1]
        if encoder:
            predicted = torch.cat([own, _own_logits(call, lm, batch, 1)[0]])
        finished = ((Head(torch.empty(0), None, *form).finish(ours), form) for form in _head_forms(lm))
        best, form = min((float(relative_error(z, predicted).max()), form) for z, form in finished)
        plan, name = replace(plan, scale=form[0], softcap=form[1]), "logits are"
    if best > tolerance:
        return replace(plan, head="logits", reason=f"its {name} not its head's alone (difference {best:.2g})")
    return plan


def _dtype(lm: nn.Module, autocast: torch.dtype | None) -> torch.dtype:
    """The type the model computes in; `autocast` is its own forward's."""
    weight = input_embeddings(lm).weight
    return autocast or autocast_type(weight.device.type) or weight.dtype


def coarse(model: nn.Module) -> bool:
    """Whether what is scored together changes a text's numbers by more than a little: in 16 bits, on a CPU.

    There attention rounds otherwise in rows of another length, by tenths of a nat per completion; a pass for each row
    (`max_row_tokens=1`) does not. GPUs choose other products for other sizes too, and would be far slower row by row.
    """
    lm = scored_model(model)
    return device_of(lm).type == "cpu" and _dtype(lm, None).itemsize == 2


def _head_forms(lm: nn.Module) -> list[tuple[float, float | None]]:
    """(scale, softcap) that models like this one may apply to their logits; the probe picks."""
    config = text_config(lm)
    caps = [getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap")]
    softcap = next((float(c) for c in caps if c), None)
    scales = [1.0, config.hidden_size**-0.5] if is_encoder_decoder(lm) else [1.0]  # T5 divides by the root
    for name in ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier_scale"):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value and value != 1:
            scales += [float(value), 1 / float(value)]
    return [(s, softcap) for s in scales]


def relative_error(ours: Tensor, own: Tensor) -> Tensor:
    """Root-mean-square difference relative to the spread of the model's own logits: `[n, V]` twice to `[n]`."""
    ours = ours.to(torch.promote_types(ours.dtype, torch.float32))
    own = own.to(ours.dtype)
    spread = own.std(-1).clamp_min(torch.finfo(ours.dtype).tiny)
    return (ours - own).square().mean(-1).sqrt() / spread


def _sharing_plan(call: nn.Module, lm: nn.Module, plan: ModelPlan) -> ModelPlan:
    """Compares hidden states of shared rows with those of separate ones, for each way of passing masks."""
    config = text_config(lm)
    try:
        forms = mask_forms(config)
    except NotShareableError as error:
        return replace(plan, reason=str(error))
    window = getattr(config, "sliding_window", None)
    try:
        if isinstance(window, int) and window > PROBED_WINDOW:
            # Too long for a probe, it is made short, to find out a model that does not go by its config.
            config.sliding_window = SHORT_WINDOW
        found, reason = _compared(call, lm, plan, mask_forms(config))  # the short window's forms
    finally:
        if window is not None:
            config.sliding_window = window
    return replace(plan, reason=reason) if found is None else replace(plan, masks=forms[found])


def _compared(call: nn.Module, lm: nn.Module, plan: ModelPlan, forms: list[MaskForm]) -> tuple[int | None, str]:
    """Which form of masks gives the hidden states of each text alone; or None, and why."""
    config, dtype = text_config(lm), _dtype(lm, plan.autocast)
    batch = probe_batch(config, vocabulary(lm), _window(config), avoid=placeholders(lm.config))
    separate = call(token_batch=_request(batch, plan, "separate", "hidden"))["hidden"]
    reason = ""
    for index, form in enumerate(forms):
        difference, reason = _difference(call, lm, plan, batch, form, separate)
        if difference <= TOLERANCE[dtype]:
            return index, ""
    return None, reason


def _difference(
    call: nn.Module, lm: nn.Module, plan: ModelPlan, batch: TokenBatch, form: MaskForm, separate: Tensor | None = None
) -> tuple[float, str]:
    """How far hidden states of shared rows are from `separate` ones, with masks of this form; and that in words."""
    if separate is None:
        separate = call(token_batch=_request(batch, plan, "separate", "hidden"))["hidden"]
    try:
        shared = call(token_batch=_request(batch, replace(plan, masks=form), "shared", "hidden"))["hidden"]
    except Exception as error:
        return float("inf"), f"it does not take a mask per token pair ({_short(error)})"
    difference = _hidden_error(shared, separate, batch, _dtype(lm, plan.autocast))
    return difference, f"hidden states differ from those of each text alone (relative difference {difference:.2g})"


def _hidden_error(shared: Tensor, separate: Tensor, batch: TokenBatch, dtype: torch.dtype) -> float:
    """Relative root-mean-square difference of hidden states, over tokens that follow another branch.

    The worst token in float32 and float64; the median in 16 bits, where a mixture of experts may route a
    token differently because of rounding alone (branches are so short that a leak reaches most tokens).
    """
    separate = separate.to(torch.promote_types(separate.dtype, torch.float32))
    error = (shared.to(separate.dtype) - separate).square().mean(-1).sqrt()
    relative = error / separate.square().mean(-1).sqrt().clamp_min(1e-30)
    if not bool(torch.isfinite(relative).all()):
        return float("inf")
    if dtype in (torch.float32, torch.float64):
        return float(relative.max())
    first = batch.group.diff(prepend=batch.group.new_full((1,), -1)) > 0
    return float(relative[~batch.segments.broadcast(first).to(relative.device)].median())


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 160 else text[:159] + "…"
