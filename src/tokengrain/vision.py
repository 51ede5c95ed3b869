"""`Vision`: the images and videos of one prompt as tensors, and where their tokens stand."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Vision:
    """What a model sees of one prompt, beside its tokens. P is the prompt's length.

    Args:
        inputs: the tensors that the processor gives for this prompt alone (`pixel_values`, `image_grid_thw`, ...),
            without those of the text (`input_ids`, `attention_mask`, token types).
        positions: long `[3, P]`, the positions of models with several per token (M-RoPE). None: scoring and sampling
            ask the model for them.
        next: the position of the first token behind the prompt; it says something only beside `positions`.
        types: long `[P]`, 0 for text, 1 for an image's token, 2 for a video's, as the processor gives them
            (`mm_token_type_ids`, `token_type_ids`). None: told by the placeholder tokens.
        blocks: long `[P]`, the number of the image that a token belongs to, -1 for text. Only models whose image
            tokens see each other need it. None: runs of placeholder tokens.
        patches: how many patches the vision tower computes: what its memory grows with.
    """

    inputs: Mapping[str, Tensor]
    positions: Tensor | None = None
    next: int = 0
    types: Tensor | None = None
    blocks: Tensor | None = None
    patches: int = 0

    def to(self, device: torch.device | str) -> Vision:
        """The same with the model's inputs on `device`. The rest is read while rows are laid out, on the CPU."""
        moved = {name: value.to(device) for name, value in self.inputs.items()}
        here = all(moved[name] is value for name, value in self.inputs.items())
        return self if here else replace(self, inputs=moved)

    def then(self, count: int) -> Vision:
        """The same for a prompt with `count` more tokens of text behind it."""
        where = self.positions
        if where is not None:
            more = torch.arange(self.next, self.next + count).expand(len(where), -1)
            where = torch.cat([where, more], 1)
        types, blocks = (
            None if given is None else torch.cat([given, given.new_full((count,), fill)])
            for given, fill in ((self.types, 0), (self.blocks, -1))
        )
        return replace(self, positions=where, next=self.next + count, types=types, blocks=blocks)

    def placeholders(self, ids: Sequence[int]) -> set[int]:
        """The tokens that stand for pictures in the prompt, whose ids `[P]` are given; none where `types` is None."""
        return set() if self.types is None else {i for i, kind in zip(ids, self.types.tolist(), strict=True) if kind}

    @property
    def fingerprint(self) -> str:
        """32 hex digits over the model's inputs."""
        if (known := getattr(self.inputs, "fingerprint", None)) is not None:
            return str(known)
        digest = hashlib.blake2b(digest_size=16)
        for name, value in sorted(self.inputs.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def state(self) -> dict[str, Any]:
        """It as plain values and tensors, for files; `Vision(**state)` is it again."""
        return {**vars(self), "inputs": dict(self.inputs)}


def grey(pixels: Tensor, patches: slice = slice(None)) -> Tensor:
    """Pixels of pictures with nothing to see on them, or not at these of their patches: all are the mean.

    What is 0 stays, being padding, and nothing else becomes 0: some towers leave out what is 0 throughout.
    """
    plain, mean = pixels.clone(), pixels.mean() + torch.finfo(pixels.dtype).eps
    plain[patches] = torch.where(pixels[patches] == 0, pixels[patches], mean)
    return plain


def unseen(vision: Vision | None) -> Vision | None:
    """The same with grey pictures: as many tokens."""
    pixels = {} if vision is None else {n: grey(v) for n, v in vision.inputs.items() if n.startswith("pixel_values")}
    return vision and replace(vision, inputs={**vision.inputs, **pixels})


def collate(visions: Sequence[Vision]) -> dict[str, Tensor]:
    """The inputs of several prompts as those of one: images one after the other, smaller ones padded with zeros."""
    names = {name: None for vision in visions for name in vision.inputs}
    joined = {}
    for name in names:
        parts = [vision.inputs[name] for vision in visions if name in vision.inputs]
        largest = [max(size) for size in zip(*(part.shape[1:] for part in parts), strict=True)]
        joined[name] = torch.cat([_padded(part, largest) for part in parts])
    return joined


def seen(vision: Vision | None) -> list[str]:
    """What images and videos add to a fingerprint: nothing where there are none."""
    return [] if vision is None else [vision.fingerprint]


def _padded(part: Tensor, sizes: Sequence[int]) -> Tensor:
    missing = [wanted - own for wanted, own in zip(sizes, part.shape[1:], strict=True)]
    return F.pad(part, [n for after in reversed(missing) for n in (0, after)]) if any(missing) else part


def padding_token(preferred: Iterable[int], placeholders: Collection[int]) -> int:
    """The first of these tokens that stands for no picture, else any other: a placeholder would ask for features."""
    return next(token for token in (*preferred, *range(len(placeholders) + 1)) if token not in placeholders)


def picture_places(ids: Sequence[int], placeholders: Collection[int], tokenizer: Any) -> set[int]:
    """Where the tokens of pictures stand in a prompt, with the special tokens around them."""
    special = {*placeholders, *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    places = {place for place, i in enumerate(ids) if i in placeholders}
    for step in (1, -1):
        for place in sorted(places):
            while 0 <= (place := place + step) < len(ids) and ids[place] in special:
                places.add(place)
    return places
