"""`prepare`: make a model accept batches of tokens, whatever it is wrapped in."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from tokengrain.errors import ModelError
from tokengrain.scoring.classifier import checked_classifier, is_token_classifier
from tokengrain.scoring.forward import ModelPlan, run, text_config
from tokengrain.scoring.layouts import Layout
from tokengrain.scoring.probe import probe

PLANS = "_tokengrain_plans"
TOLD = "_tokengrain_layout"
TOLD_REASON = "_tokengrain_warned"
ORIGINAL = "_tokengrain_original_forward"
MARK = "_tokengrain_dispatches"


def causal_lm(model: nn.Module) -> nn.Module:
    """The Hugging Face causal language model under DDP, FSDP, PEFT, `torch.compile` and the like.

    Raises:
        ModelError: nothing there has output embeddings, or it is an encoder-decoder.
    """
    inner: Any = _unwrapped(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None:
        raise ModelError(
            f"{type(inner).__name__} has no language-model head; expected a causal language model such as "
            "AutoModelForCausalLM loads"
        )
    if getattr(inner.config, "is_encoder_decoder", False):
        raise ModelError(f"{type(inner).__name__} is an encoder-decoder; expected a causal language model")
    return inner


def scored_model(model: nn.Module) -> nn.Module:
    """The causal language model in `model`, or the token-classification model with one label.

    Raises:
        ModelError: it is neither.
    """
    inner = _unwrapped(model)
    return checked_classifier(inner) if is_token_classifier(inner) else causal_lm(inner)


def _unwrapped(model: nn.Module) -> nn.Module:
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
    inner: Any = model
    while inner is not None:
        if hasattr(inner, "peft_config") and hasattr(inner, "active_peft_config"):
            at_work = inner.active_peft_config.is_prompt_learning and not inner._adapters_disabled
            return inner if at_work else None
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    return None


def original_forward(lm: nn.Module) -> Callable[..., Any]:
    """The forward `install` replaced."""
    return vars(lm).get(ORIGINAL) or types.MethodType(type(lm).forward, lm)


def install(lm: nn.Module) -> None:
    """Replace the instance's `forward` by one that also takes `token_batch=`; idempotent.

    The new forward is a bound method, so that `copy.deepcopy` binds the copy's to the copy and accelerate
    can wrap it; it holds nothing of the model, and a pickled model comes back with its class's forward.
    """
    if _is_installed(lm):
        return
    if "forward" in vars(lm):
        # Somebody (accelerate) wrapped it before: keep theirs for ordinary calls.
        vars(lm)[ORIGINAL] = vars(lm)["forward"]
    vars(lm)["forward"] = types.MethodType(_dispatcher(type(lm)), lm)


def _is_installed(lm: nn.Module) -> bool:
    forward = vars(lm).get("forward")
    while forward is not None:
        if getattr(forward, MARK, False):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _dispatcher(cls: Any) -> Callable[..., Any]:
    # Pickle finds a bound method by its function's name, hence "forward".
    def forward(self: nn.Module, *args: Any, token_batch: Any = None, **kwargs: Any) -> Any:
        if token_batch is None:
            return original_forward(self)(*args, **kwargs)
        return run(self, token_batch, original_forward(self))

    forward.__doc__ = cls.forward.__doc__
    # Trainer and generate look at the signature to see which arguments a model takes.
    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]  # functions may have one
    setattr(forward, MARK, True)
    return forward


def signature(lm: nn.Module) -> tuple[Any, ...]:
    """What a plan depends on: attention implementation and kinds of modules (adapters come and go)."""
    kinds = frozenset(type(m).__name__.removeprefix("FSDP") for m in lm.modules())
    return (getattr(text_config(lm), "_attn_implementation", None), kinds)


def prepare(model: nn.Module, *, layout: Layout | None = None) -> ModelPlan:
    """Install the scoring forward on the model in `model` and find out how to score it.

    A tiny probe compares our head with the model's own logits, and shared prompts with separate rows. Where
    they differ, or the model cannot take shared rows, a warning says so once and the slower way is used. The
    probe runs in evaluation mode without gradients and leaves training mode and random numbers alone.

    Args:
        model: a Hugging Face causal language model, or a token-classification model with one label, plain or
            wrapped (PEFT, DDP, FSDP2, accelerate).
        layout: "auto" shares prompts where the model can and it pays; "shared" insists; "separate" never
            does. It becomes the default of `score` for this model. None: as before, at first "auto".

    Returns:
        The plan. It is kept on the model: calling again costs nothing.

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
    if layout not in ("auto", "shared", "separate"):
        raise ModelError(f"unknown layout; got {layout!r}, expected 'auto', 'shared' or 'separate'")
    install(lm)
    if prompt_learning(model) is not None:
        reason = "its adapter puts virtual tokens before every text"
        if layout == "shared":
            raise ModelError(f"{type(lm).__name__} cannot share prompts: {reason}")
        return ModelPlan("separate", head="logits", reason=reason)
    plan = _found_out(model, lm, sharing=layout != "separate")
    if layout == "shared" and plan.masks is None:
        raise ModelError(f"{type(lm).__name__} cannot share prompts: {plan.reason}")
    if layout == "auto" and plan.reason is not None and not vars(lm).get(TOLD_REASON):
        vars(lm)[TOLD_REASON] = True
        how = "is scored through its own full logits"
        if plan.head == "fused":
            how = "cannot share prompts, so completions run separately"
        warnings.warn(f"{type(lm).__name__} {how}: {plan.reason}", stacklevel=4)
    return replace(plan, layout=layout if plan.masks is not None else "separate")


def _found_out(model: nn.Module, lm: nn.Module, *, sharing: bool) -> ModelPlan:
    """What the probe found, from the model's memory if it can be."""
    plans: dict[tuple[Any, ...], ModelPlan] = vars(lm).setdefault(PLANS, {})
    key = signature(lm)
    plan = plans.get((True, *key)) or (None if sharing else plans.get((False, *key)))
    if plan is None:
        if any(p.device.type == "meta" for p in lm.parameters()):
            raise ModelError(f"{type(lm).__name__} has weights on the meta device; load them before scoring")
        plan = plans[(sharing, *key)] = probe(model, lm, sharing=sharing)
    return plan
