"""What runs inside the model's forward: rows through the decoder, then the head on what counts.

`prepare` makes a model's `forward` accept `token_batch=ScoreRequest(...)` and hand it to `run`: the hooks of DDP, FSDP2
and accelerate have fired, and gradients flow through the returned dict.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokengrain.batch import TokenBatch, row_of
from tokengrain.errors import ModelError, require
from tokengrain.scoring.encdec import (
    EncoderRows,
    encoder_rows,
    last_hidden_states,
    own_inputs,
    start_id,
    vocabularies,
)
from tokengrain.scoring.fused import CHUNK_BYTES, check_tokens, head_quantities, room
from tokengrain.scoring.head import Distribution, Head, Teacher, accumulation_dtype, logits_quantities
from tokengrain.scoring.layouts import Layout, MaskForm, RowCosts, Rows, build_masks, plan_rows
from tokengrain.scoring.vision import Seeing, checked, placeholders

Kind = Literal["decoder", "encoder-decoder"]
TOKEN_CLASSIFIER = "ForTokenClassification"  # how transformers' names of these models end
HEADS = ("score", "classifier")  # what transformers calls their head
CLASSIFIER_WANTS = ("token_scores", "values")  # what they give


@dataclass(frozen=True)
class ModelPlan:
    """How a model is scored, found out once by `prepare`."""

    layout: Layout
    kind: Kind = "decoder"
    head: Literal["fused", "logits"] = "fused"  # decoder, then our head; or the model's own logits, all of them
    scale: float = 1.0  # this and softcap: what the model does to its raw logits (see `Head`)
    softcap: float | None = None
    masks: MaskForm | None = None  # how a shared row's masks are passed; None: the model cannot share
    autocast: torch.dtype | None = None  # that the model's own forward switches on, whatever its caller's
    reason: str | None = None  # why prompts are not shared or the head is not fused


@dataclass(frozen=True)
class ScoreRequest:
    """One call of the scoring path; see `tokengrain.scoring.score` for the fields."""

    batch: TokenBatch
    want: frozenset[str]
    plan: ModelPlan
    reference: Distribution | None = None
    teacher: Teacher | None = None
    layout: Layout = "auto"
    max_row_tokens: int | None = None
    chunk_tokens: int | None = None
    one_forward: bool = False
    temperature: float = 1.0
    seeing: Seeing | None = None  # of a batch with images or videos; `run` sets it

    def __post_init__(self) -> None:
        positive = self.temperature > 0 and (self.temperature == 1 or not self.want & {"kl", "teacher_kl"})
        what = f"the temperature is {self.temperature:g}; expected a number above 0, and 1 beside 'kl' and 'teacher_kl'"
        require(positive, ModelError, what)
        check_tokens("max_row_tokens", self.max_row_tokens)
        check_tokens("chunk_tokens", self.chunk_tokens)


def run(lm: nn.Module, request: ScoreRequest, own_forward: Callable[..., Any]) -> dict[str, Tensor]:
    """The quantities of a request, flat `[N]` (or `[N, H]`), in the order of the batch's flat vectors."""
    device, dtype = device_of(lm), request.plan.autocast
    own = dtype is not None and autocast_type(device.type) is None
    encoder, fused = request.plan.kind == "encoder-decoder", request.plan.head == "fused"
    request = _looked(lm, request, own_forward)
    with torch.autocast(device.type, dtype=dtype) if own else contextlib.nullcontext():
        if not fused:
            maskless = lambda attention_mask, **inputs: own_forward(**inputs)  # noqa: E731
            return quantities_from_logits(lm, request, own_forward if encoder else maskless)
        (hidden, gates), labels = _hidden(lm, request), request.batch.labels.to(device)
        out = {"hidden": hidden} if "hidden" in request.want else {}
        if gates:
            out["aux_loss"] = _aux_loss(lm, gates)
        if "raw_logits" in request.want:
            out["raw_logits"] = raw_logits(lm, hidden)
        if is_token_classifier(lm):
            return out | {name: scores_of_hidden(lm, hidden) for name in CLASSIFIER_WANTS if name in request.want}
        return out | _head_quantities(lm, request, hidden, labels)


def _looked(lm: nn.Module, request: ScoreRequest, own_forward: Callable[..., Any]) -> ScoreRequest:
    """The request with its images and videos placed among the tokens of their prompts."""
    batch, plan, seen = request.batch, request.plan, request.batch.sees
    takes = bool(placeholders(lm.config)) and plan.kind == "decoder"
    require(takes or not seen, ModelError, f"{type(lm).__name__} takes no images or videos, and the batch has some")
    if not takes:
        return request
    base = decoder_of(lm)
    placed = checked(lm, base, batch)
    if not seen:
        return request
    forward = own_forward if plan.head == "logits" else base.forward
    seeing = Seeing(lm, base, batch, plan.masks is not None and plan.masks.blocks, forward)
    return replace(request, batch=placed, seeing=seeing)


def rows_of(lm: nn.Module, request: ScoreRequest) -> list[Rows]:
    """The rectangles of a request, checked against the model's positions and vocabulary, on its device."""
    _check_fits(lm, request.batch)
    config, device, plan = text_config(lm), device_of(lm), request.plan
    layout: Layout = request.layout if plan.masks is not None else "separate"
    rows = plan_rows(
        request.batch,
        layout,
        _costs(config, device, plan),
        max_row_tokens=request.max_row_tokens,
        one_forward=request.one_forward,
        pack=uses_flex(config) and layout != "separate",
        itself=is_token_classifier(lm) and "values" not in request.want,
        sight=None if request.seeing is None else request.seeing.sight,
    )
    return [r.to(device) for r in rows]


def encoder_rows_of(lm: nn.Module, request: ScoreRequest) -> list[EncoderRows]:
    """The same of an encoder-decoder: rectangles of prompts, with those of their completions."""
    _check_fits(lm, request.batch)
    device = device_of(lm)
    return encoder_rows(
        request.batch,
        start_id(lm),
        _costs(text_config(lm), device, request.plan),
        device,
        max_row_tokens=request.max_row_tokens,
        one_forward=request.one_forward,
    )


def _costs(config: Any, device: torch.device, plan: ModelPlan) -> RowCosts:
    """The overhead is how many tokens cost as much as one more pass through the decoder, measured on one CPU core.

    Each pass launches its operations and, in training, adds a gradient as large as the embedding. (Without gradients
    too: policy and reference then run in the same rectangles and, while equal, give the same numbers.) A GPU is idle
    below about a thousand tokens.
    """
    plain = plan.masks is not None and plan.masks.window is None and not plan.masks.blocks
    by_parts = plain and device.type == "cpu" and getattr(config, "_attn_implementation", None) == "sdpa"
    size, layers, overhead = getattr(config, "hidden_size", 1024), getattr(config, "num_hidden_layers", 24), 1024
    if device.type == "cpu":
        overhead = 32 + 400_000 // size**2 + 4 * config.vocab_size // (size * layers)
    return RowCosts(size, overhead, by_parts)


def uses_flex(config: Any) -> bool:
    return getattr(config, "_attn_implementation", None) == "flex_attention"


def _check_fits(lm: nn.Module, batch: TokenBatch) -> None:
    limit, apart = positions(lm), is_encoder_decoder(lm)
    if limit is not None and batch.n_completions and not apart:
        prompts, lengths = batch.prompt_offsets.diff(), batch.completion_offsets.diff()
        if batch.vision:  # an image of h x w tokens may take max(h, w) positions
            reach = zip(prompts.tolist(), batch.vision, strict=True)
            prompts = prompts.new_tensor([n if v is None else v.next for n, v in reach])
        prompts = prompts[batch.group]
        worst = int((prompts + lengths).argmax())
        prompt, length = int(prompts[worst]), int(lengths[worst])
        if prompt + length > limit:
            raise ModelError(
                f"row {row_of(batch, worst)}: a prompt of {prompt} and a completion of {length} tokens "
                f"need {prompt + length} positions; expected at most {limit}, the positions of {type(lm).__name__}"
            )
    for name, offsets in (("prompt", batch.prompt_offsets), ("completion", batch.completion_offsets)):
        longest = int(offsets.diff().max()) if apart and limit is not None and batch.n_completions else 0
        message = f"a {name} of {longest} tokens; expected at most {limit}, the positions of {type(lm).__name__}"
        require(limit is None or longest <= limit, ModelError, message)
    vocabs = vocabularies(lm) if apart else (vocabulary(lm),) * 2
    for name, ids, vocab in zip(("prompt", "completion"), (batch.prompt_ids, batch.completion_ids), vocabs):
        if ids.device.type != "cpu" or not ids.numel():
            continue
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= vocab:
            raise ModelError(
                f"a {name} has token id {low if low < 0 else high}; expected at least 0 and less than {vocab}, the "
                f"vocabulary of {type(lm).__name__}: is this its tokenizer?"
            )


def _hidden(lm: nn.Module, request: ScoreRequest) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """Last hidden states `[N, H]` at the positions that predict the counted tokens (token scores: that are them).

    For "aux_loss" also the routers' logits, per rectangle one `[tokens, experts]` for each layer.
    """
    if request.plan.kind == "encoder-decoder":
        found = zip(*last_hidden_states(lm, encoder_rows_of(lm, request)))
        return _in_order(*map(list, found)), []
    decoder = decoder_of(lm)
    parts, targets, gates = [], [], []
    for rows in rows_of(lm, request):
        kwargs: dict[str, Any] = {} if request.seeing is None else request.seeing.inputs(rows)
        if not rows.causal:
            assert request.plan.masks is not None
            config, dtype = text_config(lm), input_embeddings(lm).weight.dtype
            costs = _costs(config, rows.input_ids.device, request.plan)
            kwargs["attention_mask"] = build_masks(rows, request.plan.masks, dtype, costs, flex=uses_flex(config))
            kwargs.setdefault("position_ids", rows.position)
        if "aux_loss" in request.want:
            kwargs["output_router_logits"] = True
        found = decoder(input_ids=rows.input_ids, use_cache=False, **kwargs)
        last = found.last_hidden_state
        if "aux_loss" in request.want:
            once = rows.once.flatten()
            gates.append(tuple(gate.reshape(-1, gate.shape[-1])[once] for gate in found.router_logits))
        parts.append(last.reshape(-1, last.shape[-1]).index_select(0, rows.source))
        targets.append(rows.target)
    return _in_order(parts, targets), gates


def balancing(lm: nn.Module) -> tuple[Callable[..., Tensor], float] | None:
    """The load-balancing loss that the model's own forward adds, and its coefficient; None if it adds none."""
    config = text_config(lm)
    if not getattr(config, "output_router_logits", False) or is_token_classifier(lm):
        return None
    names = ("router_aux_loss_coef", "aux_loss_coef")
    known = [float(value) for one in (lm, config) for name in names if (value := getattr(one, name, None)) is not None]
    function = getattr(sys.modules[type(lm).__module__], "load_balancing_loss_func", None)
    function = None if is_encoder_decoder(lm) else function
    message = f"{type(lm).__name__} has output_router_logits: true, and a load-balancing loss that is not known; "
    require(function is not None or not known, ModelError, message + "expected output_router_logits: false")
    return (function, known[0]) if function is not None and known else None


def _aux_loss(lm: nn.Module, gates: list[tuple[Tensor, ...]]) -> Tensor:
    """The load-balancing loss, without its coefficient, over all tokens of a batch, each prompt counted once."""
    function = balancing(lm)
    assert function is not None
    owners = (lm, text_config(lm))
    experts, chosen = (
        next(getattr(owner, name) for owner in owners if hasattr(owner, name))
        for name in ("num_experts", "num_experts_per_tok")
    )
    return function[0](tuple(torch.cat(layer) for layer in zip(*gates, strict=True)), experts, chosen)


def _in_order(parts: list[Tensor], targets: list[Tensor]) -> Tensor:
    joined, order = torch.cat(parts), torch.cat(targets)
    return joined.index_select(0, torch.argsort(order))


def _head_quantities(lm: nn.Module, request: ScoreRequest, hidden: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """By the fused head; or by the head's module itself, a chunk of tokens at a time, recomputed in backward."""
    head = live_head(lm, request.plan.scale, request.plan.softcap)
    if head is not None:
        head = head.tempered(request.temperature)
        given = request.reference, request.teacher
        # Of an encoder-decoder's short rows the logits are most of what a step holds.
        how: dict[str, Any] = {"chunk_tokens": request.chunk_tokens, "sparing": request.plan.kind != "decoder"}
        return head_quantities(hidden, head, labels, request.want, *given, **how)
    project = whole_head(lm)
    finish = Head(torch.empty(0), None, request.plan.scale, request.plan.softcap).tempered(request.temperature).finish
    names = request.want - {"hidden", "raw_logits", "aux_loss"}

    def chunk(span: slice) -> dict[str, Tensor]:
        return logits_quantities(finish(project(hidden[span])), labels[span], names, *_given_at(request, span))

    rows = request.chunk_tokens or max(1, room(CHUNK_BYTES, hidden.device) // (4 * text_config(lm).vocab_size))
    outs: list[dict[str, Tensor]] = []
    for start in range(0, max(len(labels), 1), rows):
        span = slice(start, start + rows)
        outs.append(checkpoint(chunk, span, use_reentrant=False) if torch.is_grad_enabled() else chunk(span))
    return {name: torch.cat([o[name] for o in outs]) for name in outs[0]}


def _given_at(request: ScoreRequest, tokens: Tensor | slice) -> tuple[Distribution | None, Teacher | None]:
    """Reference and teacher at some of the tokens."""
    reference, teacher = request.reference, request.teacher
    return reference and reference.at(tokens), teacher and teacher.map(lambda d: d.at(tokens))


def quantities_from_logits(lm: nn.Module, request: ScoreRequest, own_forward: Callable[..., Any]) -> dict[str, Tensor]:
    """Quantities from a model's own logits, one row per completion: exact for any model, at full memory.

    The virtual tokens of prompt learning, which `own_forward` may put before each row, are dropped.
    """
    for name, what in (("hidden", "last hidden states"), ("aux_loss", "routers' logits (output_router_logits)")):
        message = f"the {what} of {type(lm).__name__} are not available: {request.plan.reason}"
        require(name not in request.want, ModelError, message)
    labels = request.batch.labels.to(device_of(lm))
    outs, targets = [], []
    for inputs, source, target in _own_inputs(lm, request):
        width = inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1]
        logits = own_forward(**inputs).logits[:, -width:]
        flat = logits.reshape(-1, logits.shape[-1]).index_select(0, source)
        if "own_logits" in request.want:
            outs.append({"own_logits": flat})
        elif is_token_classifier(lm):
            outs.append({name: scores_of_logits(flat) for name in CLASSIFIER_WANTS if name in request.want})
        else:
            flat = flat if request.temperature == 1 else flat.to(accumulation_dtype(flat.dtype)) / request.temperature
            outs.append(logits_quantities(flat, labels[target], request.want, *_given_at(request, target)))
        targets.append(target)
    return {name: _in_order([o[name] for o in outs], targets) for name in outs[0]}


def _own_inputs(lm: nn.Module, request: ScoreRequest) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Per rectangle the arguments of the model's own forward, and `source` and `target` as in `Rows`."""
    if request.plan.kind == "encoder-decoder":
        yield from own_inputs(encoder_rows_of(lm, request))
        return
    for rows in rows_of(lm, request):
        more = {} if request.seeing is None else request.seeing.inputs(rows)
        inputs = {"input_ids": rows.input_ids, "attention_mask": (rows.tree >= 0).long(), **more}
        yield inputs, rows.source, rows.target


# ---- The parts of a Hugging Face model, which PyTorch's types know nothing of, through adapters and shards.


def nested(model: nn.Module) -> Iterator[Any]:
    """The model, and what DDP, FSDP, `torch.compile` and the like wrap, from the outside in."""
    inner: Any = model
    while inner is not None:
        yield inner
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)


def input_embeddings(lm: nn.Module) -> Any:
    """The module that turns token ids into vectors; its `weight` is `[V, H]`."""
    model: Any = lm
    return model.get_input_embeddings()


def output_embeddings(lm: nn.Module) -> Any:
    """The module that turns hidden states `[..., H]` into logits `[..., V]`, with whatever PEFT put around it."""
    model: Any = lm
    return model.get_output_embeddings()


def vocabulary(lm: nn.Module) -> int:
    """How many tokens have an embedding, whatever PEFT put around it."""
    return int(input_embeddings(lm).weight.shape[0])


LIFTED = "_tokengrain_positions"


def is_encoder_decoder(lm: nn.Module) -> bool:
    """Whether it is a sequence-to-sequence model (T5, BART, ...)."""
    return bool(getattr(getattr(lm, "config", None), "is_encoder_decoder", False))


def kind_of(lm: nn.Module) -> Kind:
    return "encoder-decoder" if is_encoder_decoder(lm) else "decoder"


def logits_bias(lm: nn.Module) -> Tensor | None:
    """`final_logits_bias` `[V]`, which BART and its kind add to the head's logits."""
    found = getattr(lm, "final_logits_bias", None)
    return found.flatten() if isinstance(found, Tensor) else None


def positions(lm: nn.Module) -> int | None:
    """Most tokens the model can read, or may by hand (`lift_positions`); None: no limit is known."""
    return vars(lm).get(LIFTED) or positions_of(lm.config)


def positions_of(config: Any, by_hand: int | None = None) -> int | None:
    """Most tokens that a model with this config can read: its positions, or more where scaling of RoPE stretches them.

    Configs with YaRN give the positions before scaling or after; "linear" and "dynamic" scaling multiply them.
    `by_hand`, what the user asks for, counts where positions are computed (RoPE), not looked up.
    """
    config = decoding_config(config)
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    original = rope.get("original_max_position_embeddings") or limit
    if kind in ("yarn", "linear", "dynamic", "ntk") and isinstance(factor, (int, float)):
        limit = max(limit, int(original * factor))
    limit = max(limit, original)
    return max(limit, by_hand or 0) if rope or hasattr(config, "rope_theta") else limit


def lift_positions(lm: nn.Module, length: int | None) -> None:
    """Let the model read texts of this many tokens, with a warning if its config says that it reads fewer."""
    known, lifted = positions(lm), positions_of(lm.config, length)
    if known is not None and lifted is not None and lifted > known:
        message = (
            f"max_length is {lifted}, and {type(lm).__name__} was made for {known} positions; longer rows are read "
        )
        warnings.warn(message + "as they are, and may be understood badly", stacklevel=2)
        vars(lm)[LIFTED] = lifted


def device_of(lm: nn.Module) -> torch.device:
    """Where token ids go: the device of the input embeddings."""
    return input_embeddings(lm).weight.device


def text_config(lm: nn.Module) -> Any:
    """The part of a model's config that describes its language model."""
    return decoding_config(lm.config)


def decoding_config(config: Any) -> Any:
    """The part of a config that describes what writes the text."""
    if getattr(config, "is_encoder_decoder", False):  # of flat ones `get_text_config` makes a new copy for each call
        return getattr(config, "decoder", None) or config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def autocast_type(device: str) -> torch.dtype | None:
    """The type of the autocast that is on for this kind of device, if it is."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def decoder_of(lm: nn.Module) -> nn.Module:
    """The model without its head."""
    model: Any = lm
    decoder = model if is_encoder_decoder(lm) else getattr(model, "base_model", model)
    if decoder is model and hasattr(model, "get_decoder"):
        decoder = model.get_decoder()
    found = decoder is not lm and isinstance(decoder, nn.Module)
    require(found, ModelError, f"{type(lm).__name__} has no decoder that can run without its head")
    return decoder


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode is put back, on errors too."""
    training = [m for m in model.modules() if m.training]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def contiguous_head(lm: nn.Module) -> Iterator[None]:
    """Inside, the head gets contiguous hidden states, which a slice of the last tokens of a batch is not.

    On a CPU, PyTorch multiplies such a slice row by row if the head is frozen, and in 16 bits copies the head for each
    row: for SmolLM2 and 64 rows that takes 11 times as long in float32, 330 times in bfloat16.
    """

    def copied(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (given[0].contiguous(), *given[1:]) if given else given

    handle = output_embeddings(lm).register_forward_pre_hook(copied)
    try:
        yield
    finally:
        handle.remove()


def live_head(lm: nn.Module, scale: float, softcap: float | None) -> Head | None:
    """The head with its live weight, or None if its module is more than a matrix (adapters, quantisation)."""
    linear = plain_linear(output_embeddings(lm))
    if linear is None:
        return None
    bias, more = None if linear.bias is None else _whole(linear.bias), logits_bias(lm)
    bias = more if bias is None else bias if more is None else bias + more
    return Head(_whole(linear.weight), bias, scale, softcap)


def whole_head(lm: nn.Module) -> Callable[[Tensor], Tensor]:
    """Hidden states `[n, H]` to logits before scaling and capping, by the head's module with whatever is around it."""
    module, bias = output_embeddings(lm), logits_bias(lm)
    return module if bias is None else lambda hidden: module(hidden) + bias


def plain_linear(module: Any) -> nn.Linear | None:
    """The `nn.Linear` that `module` amounts to at the moment, looking through PEFT's wrappers."""
    if getattr(module, "disable_adapters", False) and not getattr(module, "merged", False):
        # PEFT: a tuner layer keeps its `base_layer`, a trained copy its `original_module`.
        return plain_linear(getattr(module, "base_layer", None) or getattr(module, "original_module", None))
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        return plain_linear(module.modules_to_save[module.active_adapters[0]]) if module.active_adapters else None
    forward = getattr(type(module), "forward", None)
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward and "forward" not in vars(module):
        return module
    return None


def _whole(parameter: Tensor) -> Tensor:
    """A sharded parameter gathered; its gradient is averaged over ranks, as FSDP does with all the others."""
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def raw_logits(lm: nn.Module, hidden: Tensor) -> Tensor:
    """Logits before scaling and capping, `[N, V]`; for the probe."""
    head = live_head(lm, 1.0, None)
    if head is None:
        return whole_head(lm)(hidden)
    return nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias)


# ---- Token-classification models with one label: a score for every token.
#
# A reward model is read at the token itself ("token_scores"); a critic before the action, at the position that
# predicts the token ("values").


def is_token_classifier(model: nn.Module) -> bool:
    """Whether it is one of transformers' `*ForTokenClassification` models, or derived from one."""
    return any(cls.__name__.endswith(TOKEN_CLASSIFIER) for cls in type(model).__mro__)


def head_name(model: nn.Module) -> str:
    """The attribute of a token classifier that is its head: `[..., H]` to `[..., 1]`, maybe with PEFT around it."""
    found = [name for name in HEADS if isinstance(getattr(model, name, None), nn.Module)]
    require(found, ModelError, f"{type(model).__name__} has no head that is known; expected one of {list(HEADS)}")
    return found[0]


def scores_of_hidden(model: nn.Module, hidden: Tensor) -> Tensor:
    """`[n, H] -> [n]`, in float32 (float64 for a float64 model), with the model's dropout if it is training."""
    dropout = getattr(model, "dropout", None)
    if isinstance(dropout, nn.Module):
        hidden = dropout(hidden)
    return scores_of_logits(getattr(model, head_name(model))(hidden))


def scores_of_logits(logits: Tensor) -> Tensor:
    """`[n, 1] -> [n]`."""
    return logits[:, 0].to(accumulation_dtype(logits.dtype))
