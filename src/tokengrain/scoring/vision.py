"""Images and videos in the scoring path: where their tokens stand, their features, and what a forward pass is given.

The model itself puts features in the place of placeholder tokens, in the order of the rows. Features are computed once
per prompt and call, whatever the layout; those of a frozen tower once for policy and reference.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tokengrain.batch import Segments, TokenBatch, row_of
from tokengrain.errors import ModelError, require
from tokengrain.scoring.layouts import Rows, Sight
from tokengrain.vision import Vision, collate

IMAGE, VIDEO = 1, 2  # the types of their tokens
FEATURES = {"image": "get_image_features", "video": "get_video_features"}
TYPES = ("mm_token_type_ids", "token_type_ids")  # what models call the types of tokens
OUTPUTS = {"pooler_output", "deepstack_features", "last_hidden_state", "hidden_states", "attentions"}
KEPT_BYTES = 2**28  # features of frozen towers that are kept


def placeholders(config: Any) -> dict[int, int]:
    """The tokens in whose place a model with this config puts features, with their types."""
    found: dict[int, int] = {}
    for kind, number in (("image", IMAGE), ("video", VIDEO)):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            token = getattr(config, name, None)
            if isinstance(token, int):
                found.setdefault(token, number)
    return found


def placed(base: Any, asking: Mapping[int, int], ids: Tensor, vision: Vision) -> Vision:
    """The prompt's vision with what can be told by the model's module without head: types, positions, blocks.

    Args:
        asking: the model's `placeholders`.
        ids: the prompt's tokens `[P]`, on the CPU.

    Raises ModelError where the processor has marked tokens, and none of them stands for pictures in the model.
    """
    types = vision.types
    if types is not None and len(types) == len(ids) and types.any():
        marked = sorted(set(ids[types > 0].tolist()))
        what = f"the processor writes token {', '.join(map(str, marked))} for images and videos, and "
        what += f"{type(base).__name__} has them in the place of {', '.join(map(str, asking))} (its image_token_id); "
        require(not asking.keys().isdisjoint(marked), ModelError, what + "expected the model's own processor")
    if types is None:
        types = sum(((ids == token).long() * kind for token, kind in asking.items()), torch.zeros_like(ids))
    blocks = vision.blocks
    if blocks is None:
        image = types == IMAGE
        starts = image & ~torch.cat([image.new_zeros(1), image[:-1]])
        blocks = torch.where(image, starts.cumsum(0) - 1, -1)
    positions, after = vision.positions, vision.next
    if positions is None and hasattr(base, "get_rope_index"):
        accepted = inspect.signature(base.get_rope_index).parameters
        grids = {name: value.cpu() for name, value in vision.inputs.items() if name in accepted}
        found, _ = base.get_rope_index(ids[None], mm_token_type_ids=types[None], **grids)
        positions = found[:, 0].long()
        after = int(positions.max()) + 1
    elif positions is None:
        after = len(ids)
    return replace(vision, types=types, blocks=blocks, positions=positions, next=after)


def checked(lm: Any, base: Any, batch: TokenBatch) -> TokenBatch:
    """The batch with what the model needs to know of its images (see `placed`).

    Raises ModelError for placeholder tokens without images, and in completions.
    """
    asking, name = placeholders(lm.config), type(lm).__name__
    tokens = torch.tensor(sorted(asking))
    ids, completions = batch.prompt_ids.cpu(), batch.completion_ids.cpu()
    if (held := torch.isin(completions, tokens)).any():
        at = int(held.nonzero()[0, 0])
        row = row_of(batch, int((batch.completion_offsets.cpu() <= at).sum()) - 1)
        message = f"row {row}: a completion holds token {int(completions[at])}, which stands for an image in {name}; "
        raise ModelError(message + "expected it in prompts only")
    visions: list[Vision | None] = []
    counts = Segments(batch.prompt_offsets.cpu()).sum(torch.isin(ids, tokens).long()).tolist()
    for prompt, (start, end) in enumerate(pairwise(batch.prompt_offsets.tolist())):
        vision, row = batch.vision[prompt] if batch.vision else None, f"row {batch.row(prompt)}"
        message = f"{row}: the prompt has {counts[prompt]} tokens that stand for images or videos in {name}, and comes "
        require(vision is not None or not counts[prompt], ModelError, message + "without them (vision is None)")
        fits = vision is None or all(len(t) == end - start for t in (vision.types, vision.blocks) if t is not None)
        require(fits, ModelError, f"{row}: the vision is not this prompt's, which has {end - start} tokens")
        visions.append(vision and placed(base, asking, ids[start:end], vision))
    return replace(batch, vision=tuple(visions) if batch.vision else ())


def tensors(lm: Any, visions: Iterable[Vision | None], accepted: Container[str]) -> dict[str, Tensor]:
    """The inputs of several prompts, those that are accepted, on the model's device and in its precision."""
    weight = lm.get_input_embeddings().weight
    joined = collate([vision for vision in visions if vision is not None])
    moved = {name: value.to(weight.device) for name, value in joined.items() if name in accepted}
    return {name: v.to(weight.dtype) if v.is_floating_point() else v for name, v in moved.items()}


def arguments(lm: Any, ids: Tensor, vision: Vision, more: int) -> dict[str, Any]:
    """What the model's own forward is given beside the tokens of one prompt `[P]` and `more` tokens behind it."""
    accepted = _accepted(lm.forward, lm.base_model)
    whole = placed(lm.base_model, placeholders(lm.config), ids.cpu(), vision).then(more)
    assert whole.types is not None
    found = tensors(lm, [vision], accepted)
    found |= {name: whole.types[None].to(ids.device) for name in TYPES if name in accepted}
    return found if whole.positions is None else {**found, "position_ids": whole.positions[:, None].to(ids.device)}


def _accepted(forward: Callable[..., Any], base: Any) -> frozenset[str]:
    """The arguments of a forward, and those of the model without head that it may hand others on to."""
    taken = [inspect.signature(forward).parameters]
    if any(p.kind is p.VAR_KEYWORD for p in taken[0].values()):
        taken.append(inspect.signature(base.forward).parameters)
    return frozenset(name for names in taken for name in names)


# ---- Features of images and videos, once per prompt.


class Form(NamedTuple):
    """How a tower gives features, and the model takes them."""

    output: Any  # the class of its output
    listed: bool  # one tensor per image, or one for all
    images: bool  # whether such a tensor has a dimension of images, or frames, before that of tokens


@dataclass(frozen=True)
class Features:
    """What a tower gives for one prompt's images, or for its videos."""

    form: Form
    pooled: Tensor  # [T, H], for the prompt's T placeholder tokens
    deep: tuple[Tensor, ...] = ()  # the same for deeper layers

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.pooled, *self.deep))


class Seeing:
    """The images and videos of a batch, as one call of the scoring path uses them.

    Args:
        base: the model `lm` without its head.
        batch: the batch; its visions, by which features are remembered, are those that were given.
        blocks: whether the tokens of one image see each other in shared rows.
        forward: what the rows go into.
    """

    def __init__(self, lm: Any, base: Any, batch: TokenBatch, blocks: bool, forward: Callable[..., Any]) -> None:
        self.lm, self.base, self.batch = lm, base, batch
        self.asking = placeholders(lm.config)
        self.sight = Sight(frozenset(self.asking), hasattr(base, "get_rope_index"), blocks)
        self.accepts = _accepted(forward, base)

    def inputs(self, rows: Rows) -> dict[str, Any]:
        """The arguments for one rectangle of rows, beside its ids and masks."""
        found: dict[str, Any] = {} if rows.rope is None else {"position_ids": rows.rope}
        if rows.causal and rows.types is not None:
            found |= {name: rows.types for name in TYPES if name in self.accepts}
        prompts = [p for p in rows.prompts if self.batch.vision[p] is not None]
        if prompts and self.features is not None:
            own = {kind: [one[p] for p in prompts if p in one] for kind, one in self.features.items()}
            found["mm_encoder_outputs"] = {kind: _joined(some) for kind, some in own.items() if some}
        elif prompts:
            found |= tensors(self.lm, (self.batch.vision[p] for p in prompts), self.accepts)
        return found

    @cached_property
    def features(self) -> dict[str, dict[int, Features]] | None:
        """By kind and prompt; None where the model takes pixels only, which then go into every rectangle."""
        visions = {p: vision for p, vision in enumerate(self.batch.vision) if vision is not None}
        if "mm_encoder_outputs" not in self.accepts:
            return None
        found, taken = {}, set[str]()
        for kind, name in FEATURES.items():
            function = getattr(self.base, name, None)
            names = set(inspect.signature(function).parameters) if function is not None else set()
            own = {p: vision for p, vision in visions.items() if names & _pixels(vision)}
            if function is not None and own:
                taken |= names
                found[kind] = self._of_kind(kind, function, names, own)
        known = all(f.form.output is not None for one in found.values() for f in one.values())
        return found if known and all(_pixels(vision) <= taken for vision in visions.values()) else None

    def _of_kind(
        self, kind: str, function: Callable[..., Any], names: set[str], own: Mapping[int, Vision]
    ) -> dict[int, Features]:
        """Remembered ones; the others in one pass through the tower. A prompt that is there twice is seen once."""
        memory = Memory.of(self.lm)
        known = {vision: found for vision in own.values() if memory and (found := memory.get(vision, kind))}
        left = {vision: p for p, vision in own.items() if vision not in known}
        if left:
            with torch.no_grad() if memory else contextlib.nullcontext():
                new = self._computed(kind, function, names, sorted(left.values()))
            made = {vision: new[p] for vision, p in left.items()}
            known |= made
            if memory:
                memory.keep(kind, made)
        return {p: known[vision] for p, vision in own.items()}

    def _computed(
        self, kind: str, function: Callable[..., Any], names: set[str], own: list[int]
    ) -> dict[int, Features]:
        wanted = {p: self._asked(p, kind) for p in own}

        def run(prompts: list[int]) -> Any:
            return function(**tensors(self.lm, (self.batch.vision[p] for p in prompts), names), return_dict=True)

        output = run(own)
        if _made(output, [self.batch.vision[p] for p in own], names) == list(wanted.values()):
            return dict(zip(own, _parts(output, list(wanted.values())), strict=True))
        # Videos of several lengths fill each other up, and some towers do not say where an image ends.
        found = {}
        for p, count in wanted.items():
            output = run([p])
            made = len(_flat(output.pooler_output))
            message = f"row {self.batch.row(p)}: the prompt has {count} tokens for {kind}s, and its {kind}s make "
            require(made == count, ModelError, f"{message}{made}; were text and pixels made by one processor?")
            (found[p],) = _parts(output, [count])
        return found

    def _asked(self, prompt: int, kind: str) -> int:
        """How many tokens of a prompt ask for features of this kind."""
        number = IMAGE if kind == "image" else VIDEO
        tokens = torch.tensor([token for token, n in self.asking.items() if n == number], dtype=torch.long)
        return int(torch.isin(self.batch.prompt(prompt).cpu(), tokens).sum())


def _pixels(vision: Vision) -> set[str]:
    return {name for name in vision.inputs if name.startswith("pixel_values")}


def _flat(value: Any) -> Tensor:
    """A tower's features, one image after the other, `[tokens, H]`."""
    parts = value if isinstance(value, (tuple, list)) else [value]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def _parts(output: Any, counts: Sequence[int]) -> list[Features]:
    """A tower's output cut into the prompts', which have so many tokens."""
    pooled = output.pooler_output
    listed = not isinstance(pooled, Tensor)
    known = type(output) if set(output.keys()) <= OUTPUTS else None
    form = Form(known, listed, (pooled[0] if listed else pooled).dim() > 2)
    layers = [pooled, *(output.get("deepstack_features") or ())]
    parts = zip(*(_flat(layer).split(list(counts)) for layer in layers), strict=True)
    return [Features(form, first, tuple(deep)) for first, *deep in parts]


def _made(output: Any, visions: Sequence[Vision | None], names: set[str]) -> list[int] | None:
    """How many tokens each prompt's images make, by the output for all; None where that cannot be told."""
    pooled = output.pooler_output
    images = pooled if not isinstance(pooled, Tensor) or pooled.dim() > 2 else []
    sizes = [image.numel() // image.shape[-1] for image in images]
    inputs = [{name: value for name, value in v.inputs.items() if name in names} for v in visions if v is not None]
    owners = [[len(given.get(name, ())) for given in inputs] for name in inputs[0]]
    # Idefics has the tiles of a prompt's images side by side, and leaves out empty ones.
    tiles = [given["pixel_values"] for given in inputs if "pixel_values" in given and given["pixel_values"].dim() == 5]
    owners.append([int(one.flatten(0, 1).flatten(1).any(1).sum()) for one in tiles])
    counts = next((c for c in owners if len(c) == len(inputs) and sum(c) == len(sizes)), None)
    if counts is None:
        return None
    left = iter(sizes)
    return [sum(next(left) for _ in range(count)) for count in counts]


def _joined(features: Sequence[Features]) -> Any:
    """Features of several prompts in the form that the model's own tower gives them."""
    form = features[0].form

    def shaped(parts: Iterable[Tensor]) -> Any:
        joined = torch.cat(list(parts))
        joined = joined[None] if form.images else joined
        return (joined,) if form.listed else joined

    deep = [shaped(layer) for layer in zip(*(f.deep for f in features), strict=True)]
    more = {"deepstack_features": deep} if deep else {}
    return form.output(pooler_output=shaped(f.pooled for f in features), **more)


# ---- Frozen towers: what they gave is remembered, for the reference after the policy.


def tower(lm: Any) -> tuple[list[nn.Module], list[nn.Parameter]]:
    """The modules and parameters of vision tower and projector: the model's without head and language model."""
    if not placeholders(getattr(lm, "config", None)):
        return [], []
    base, decoder = lm.base_model, lm.get_decoder()
    if not isinstance(decoder, nn.Module) or decoder is base:
        return [], []
    language = [*decoder.modules(), *lm.get_input_embeddings().modules(), base]
    spoken = {id(p) for part in (decoder, lm.get_input_embeddings()) for p in part.parameters()}
    modules = [m for m in base.modules() if not any(m is one for one in language)]
    return modules, [p for p in base.parameters() if id(p) not in spoken]


class Memory:
    """Features that a frozen tower gave, by prompt's vision. If the tower's weights change, it has forgotten."""

    kept: ClassVar[WeakKeyDictionary[Vision, tuple[Any, dict[str, Features]]]] = WeakKeyDictionary()
    lock: ClassVar[Any] = threading.Lock()  # a rollout may be sampled in another thread

    def __init__(self, tower: Any) -> None:
        self.tower = tower

    @classmethod
    def of(cls, lm: Any) -> Memory | None:
        """None where the tower is trained, random (dropout), adapted or sharded."""
        modules, parameters = tower(lm)
        if not parameters or any(p.requires_grad or hasattr(p, "device_mesh") for p in parameters):
            return None
        if torch.is_inference_mode_enabled() or any(_draws(m) or hasattr(m, "base_layer") for m in modules):
            return None
        with torch.no_grad():
            floating: list[Tensor] = [p for p in parameters if p.is_floating_point()]
            sizes = torch.stack([norm.double() for norm in torch._foreach_norm(floating)]).tolist()
        device = parameters[0].device
        precision = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        return cls(([id(p) for p in parameters], sizes, device, precision))

    def get(self, vision: Vision, kind: str) -> Features | None:
        tower, found = self.kept.get(vision, (None, {}))
        return found.get(kind) if tower == self.tower else None

    def keep(self, kind: str, made: Mapping[Vision, Features]) -> None:
        """Keep these, and of what was kept before as much as there is room for."""
        with self.lock:
            for vision, features in made.items():
                tower, found = self.kept.get(vision, (None, {}))
                self.kept[vision] = (self.tower, {**(found if tower == self.tower else {}), kind: features})
            *_, newest = made
            sizes = {one: sum(f.nbytes for f in found.values()) for one, (_, found) in self.kept.items()}
            total = sum(sizes.values())
            for oldest, size in sizes.items():
                if total <= KEPT_BYTES or oldest is newest:
                    break
                del self.kept[oldest]
                total -= size


def _draws(module: nn.Module) -> bool:
    """Whether it draws random numbers (see `disable_dropout`)."""
    named = [v for name, v in vars(module).items() if "dropout" in name or "layerdrop" in name]
    named += [module.p] if isinstance(module, nn.modules.dropout._DropoutNd) else []
    return module.training and any(isinstance(v, float) and v > 0 for v in named)
