"""What the worlds of pictures share: scenes, a small Qwen2.5-VL, rows, pairs, the truth about tokens, measures.

A world draws scenes (what there is to see, and what is true of it), writes what somebody says of them, and knows
which words are wrong. `series`, `clips` and `shapes` are such worlds.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from tokengrain.batch import TokenBatch
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs
from tokengrain.data.pictures import pillow
from tokengrain.data.rows import load_rows
from tokengrain.data.vision import without_torchvision
from tokengrain.errors import RecipeError, fingerprint, require
from tokengrain.evaluation.credit import CreditTruth, recovered
from tokengrain.rollout.local import HFGenerate
from tokengrain.rollout.sampler import SamplingConfig, encode_prompts
from tokengrain.worlds import base_models
from tokengrain.worlds.base_models import BOS, EOS, PAD, Progress, Training, check_least, check_option

Split = Literal["train", "eval"]
Truth = dict[str, Any]  # what is true of a scene: columns of its row
IMAGE, VIDEO, OPEN, CLOSE = "<img>", "<vid>", "<vs>", "<ve>"
SPECIAL = (PAD, BOS, EOS, IMAGE, VIDEO, OPEN, CLOSE)
FPS = 24  # what processors take for granted of frames in a list
PATCH, MERGE = 7, 2  # pixels of a patch's side, patches of a token's side
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's pixels
FORMAT = 1  # raised when scenes, words or training change in a way that the settings do not show


class Scene(NamedTuple):
    """What there is to see, uint8 `[T, H, W, 3]`, what is true of it, and numbers that it was made from."""

    frames: np.ndarray
    truth: Truth
    values: Any = None


def random_of(*purpose: Any) -> np.random.RandomState:
    """A stream of random numbers of its own for each purpose, the same with every version of numpy."""
    return np.random.RandomState(int(fingerprint(list(purpose)), 16) % 2**32)


def pixel_patches(frames: np.ndarray) -> Tensor:
    """Frames `[n, H, W, 3]` as the patches that Qwen2-VL's image processor makes of them, float32 `[n·h·w, 3·7·7]`."""
    n, height, width, _ = frames.shape
    h, w = height // PATCH, width // PATCH
    scaled = (torch.from_numpy(frames).float() / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    cells = scaled.reshape(n, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH, 3)
    return cells.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(n * h * w, -1)


@dataclass(frozen=True)
class Warmth(Training):
    """Settings of a base model: most of its steps on what is true, the last `weak` on what a weak annotator writes."""

    hidden_size: int = 64
    mlp_size: int = 128
    layers: int = 2
    steps: int = 800
    weak: int = 200
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup: int = 50
    vision_layers: int = 2
    positions: int = 128


def small_vlm(
    settings: Warmth, vocabulary: Sequence[str], frame: tuple[int, int]
) -> Qwen2_5_VLForConditionalGeneration:
    """The untrained model. The usual deviation of 0.02 is too small for its width: nothing would be learnt for long."""
    ids = {word: i for i, word in enumerate(vocabulary)}
    size, heads = settings.hidden_size, settings.heads
    config = Qwen2_5_VLConfig(
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[OPEN],
        vision_end_token_id=ids[CLOSE],
        tie_word_embeddings=False,
        text_config={
            "vocab_size": len(vocabulary),
            "hidden_size": size,
            "intermediate_size": settings.mlp_size,
            "num_hidden_layers": settings.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": settings.positions,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        },
        vision_config={
            "depth": settings.vision_layers,
            "hidden_size": size,
            "intermediate_size": settings.mlp_size,
            "num_heads": heads,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 1,
            "tokens_per_second": FPS + 1,  # a frame is one place further on than the one before, whatever the rounding
            "window_size": max(frame),
            "out_hidden_size": size,
            "fullatt_block_indexes": list(range(settings.vision_layers)),
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = Qwen2_5_VLForConditionalGeneration(config).float()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=float(parameter[0].numel()) ** -0.5)
    return model


@dataclass(frozen=True)
class SeeingOptions:
    """Options of the addresses of these worlds.

    Args:
        seed: of the training rows; held-out rows and the base model are the same for all.
        prompts: how many training prompts (512).
        pairs: how many training pairs (512).
    """

    seed: int = 0
    prompts: int = 512
    pairs: int = 512

    world: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_least(self.world, self, {"seed": 0, "prompts": 1, "pairs": 1})


class Marks(NamedTuple):
    """A completion, read by its words: whether it has the form, and places of words that decide and that are wrong.

    Where there is no form the first word that cannot stand there is wrong, or the last one of an unfinished text.
    """

    form: bool
    decisions: list[int]
    wrong: list[int]


def marks_of(words: Sequence[str], kinds: Sequence[Sequence[str]], true: Sequence[str | None]) -> Marks:
    """Compare words with a form of fixed length.

    Args:
        kinds: for each place, the words that can stand there; more than one: the word decides something.
        true: the right word for each place; None: any of its kind.
    """
    decisions: list[int] = []
    wrong: list[int] = []
    for place, kind in enumerate(kinds):
        if place >= len(words) or words[place] not in kind:
            return Marks(False, decisions, [*wrong, *places_of(words, place)])
        if true[place] is not None and len(kind) > 1:
            decisions.append(place)
            if words[place] != true[place]:
                wrong.append(place)
    return Marks(len(words) == len(kinds), decisions, wrong)


def places_of(words: Sequence[str], place: int) -> list[int]:
    """A place, or the last one of a text that is over before; of an empty text none."""
    return [min(place, len(words) - 1)] if words else []


class SeeingWorld(ABC):
    """A world of pictures. Rows have `images` (or `videos`) as uint8 arrays, as a user's rows may have."""

    name: str
    video: bool = False
    frames: int = 1
    size: tuple[int, int]  # height and width in pixels
    question: str  # what follows the picture in a prompt
    words: tuple[str, ...]  # the vocabulary without special tokens
    max_new_tokens: int
    held_out: int = 200
    warmth: Warmth = Warmth()

    def __init__(self, options: SeeingOptions) -> None:
        pillow()  # an error that says what is missing, before anything is drawn
        self.options = options

    # ---- What a world is ----

    @abstractmethod
    def scenes(self, n: int, random: np.random.RandomState) -> list[Scene]:
        """Scenes drawn at random."""

    @abstractmethod
    def trace(self, truth: Truth, random: np.random.RandomState, *, weak: bool) -> list[str]:
        """What somebody says of a scene, `<end>` included: all of it true, or as a weak annotator has it."""

    @abstractmethod
    def marks(self, truth: Truth, words: Sequence[str]) -> Marks:
        """Which words of a completion decide something, and which of them are wrong."""

    @abstractmethod
    def is_right(self, truth: Truth, words: Sequence[str]) -> bool:
        """Whether a completion has the form and comes to the right answer."""

    @abstractmethod
    def told(self, words: Sequence[str]) -> Truth:
        """What is true of a scene, from a completion that says nothing else."""

    # ---- Words ----

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return (*SPECIAL, *self.words)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.vocabulary)}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        core = Tokenizer(models.WordLevel(self._ids, unk_token=PAD))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        own = {"image_token": IMAGE, "video_token": VIDEO, "vision_bos_token": OPEN, "vision_eos_token": CLOSE}
        return base_models.fast_tokenizer(core, positions=self.warmth.positions, extra_special_tokens=own)

    @cached_property
    def processor(self) -> Any:
        """Tokenizer and image processor; the frames of a video are read as images are, with or without torchvision."""
        pixels = self.size[0] * self.size[1]
        images = Qwen2VLImageProcessorPil(
            patch_size=PATCH,
            merge_size=MERGE,
            temporal_patch_size=1,
            size={"shortest_edge": pixels, "longest_edge": pixels},
        )
        return without_torchvision(Qwen2_5_VLProcessor, image_processor=images, tokenizer=self.tokenizer)

    def encode(self, words: Sequence[str]) -> list[int]:
        return [self._ids[word] for word in words]

    def spoken(self, ids: Sequence[int]) -> list[str]:
        return [self.vocabulary[i] for i in ids]

    @property
    def prompt(self) -> str:
        """The text of every prompt, its placeholder not yet expanded."""
        return f"{OPEN} {VIDEO if self.video else IMAGE} {CLOSE} {self.question}"

    @cached_property
    def prompt_ids(self) -> list[int]:
        """The ids of every prompt, expanded."""
        tokens = self.frames * (self.size[0] // (PATCH * MERGE)) * (self.size[1] // (PATCH * MERGE))
        place = VIDEO if self.video else IMAGE
        return self.encode([BOS, OPEN, *[place] * tokens, CLOSE, *self.question.split()])

    # ---- The base model ----

    def _model_settings(self) -> dict[str, Any]:
        return {"format": FORMAT, "world": self.name, **asdict(self.warmth)}

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint([self._model_settings(), asdict(self.options)])

    def base_model(self) -> Path:
        """Folder of the base model; see `ensure_model`."""
        settings = self._model_settings()
        folder = base_models.model_folder(self.name, fingerprint(settings))

        def train(progress: Progress) -> base_models.Trained:
            model, report = self.trained(progress)
            return model, settings | report

        return base_models.ensure_model(folder, train, self.processor, f"world://{self.name}", self.warmth.steps)

    @cached_property
    def reference(self) -> Any:
        """The base model, loaded once; frozen."""
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(self.base_model(), dtype=torch.float32)
        return model.requires_grad_(False).eval()

    def trained(self, progress: Progress | None = None) -> base_models.Trained:
        """A new model after the training that `warmth` describes, and a report of it."""
        start, warmth = time.perf_counter(), self.warmth
        random = random_of(self.name, "warm start", warmth.seed)
        model = small_vlm(warmth, self.vocabulary, self.size).train()
        optimizer = torch.optim.AdamW(model.parameters(), warmth.learning_rate, weight_decay=0.01)
        losses = (self._loss(model, random, weak=step >= warmth.steps - warmth.weak) for step in range(warmth.steps))
        found = base_models.descend(model, [optimizer], losses, warmth, progress)
        for parameter in model.parameters():  # so that they can be shipped in half the room without a change
            parameter.data = parameter.data.half().float()
        last = found[-max(1, warmth.steps // 20) :]
        seconds = round(time.perf_counter() - start, 1)
        return model.eval(), {"cross_entropy": sum(last) / len(last), "seconds": seconds}

    def _loss(self, model: Any, random: np.random.RandomState, *, weak: bool) -> Tensor:
        """Mean cross-entropy over the completions of fresh scenes."""
        drawn = self.scenes(self.warmth.batch_size, random)
        said = [self.encode(self.trace(scene.truth, random, weak=weak)) for scene in drawn]
        prompt, width = self.prompt_ids, max(map(len, said))
        ids = torch.zeros(len(said), len(prompt) + width, dtype=torch.long)
        predicts = torch.zeros_like(ids, dtype=torch.bool)
        for row, own in enumerate(said):
            ids[row, : len(prompt) + len(own)] = torch.tensor(prompt + own)
            predicts[row, len(prompt) - 1 : len(prompt) + len(own) - 1] = True
        hidden = model.model(input_ids=ids, **self.model_inputs(ids, [s.frames for s in drawn])).last_hidden_state
        labels = ids.roll(-1, 1)[predicts]
        return torch.nn.functional.cross_entropy(model.lm_head(hidden[predicts]), labels)

    def model_inputs(self, ids: Tensor, frames: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """What the model takes beside ids `[B, L]` with the pictures of B prompts."""
        kind = "videos" if self.video else "images"
        grid = [self.frames, self.size[0] // PATCH, self.size[1] // PATCH]
        places = [(self._ids[IMAGE], 1), (self._ids[VIDEO], 2)]
        seconds = {"second_per_grid_ts": torch.full((len(frames),), 1 / FPS)} if self.video else {}
        return {
            **seconds,
            "pixel_values_videos" if self.video else "pixel_values": pixel_patches(np.concatenate(list(frames))),
            f"{kind.removesuffix('s')}_grid_thw": torch.tensor([grid] * len(frames)),
            "mm_token_type_ids": sum(((ids == place).int() * kind for place, kind in places), torch.zeros_like(ids)),
        }

    # ---- Rows ----

    def drawn(self, purpose: str, split: Split, n: int, seed: int | None = None) -> list[Scene]:
        """Scenes of a split; without a `seed` the held-out ones are the same for all seeds of the world."""
        check_option(self.name, "split", split, get_args(Split))
        own = seed if seed is not None else 0 if split == "eval" else self.options.seed
        return self.scenes(n, random_of(self.name, purpose, split, own))

    def row(self, scene: Scene, identity: str) -> dict[str, Any]:
        """A row: `prompt`, `images` or `videos`, what is true of the scene, `id`."""
        seen = {"videos": [scene.frames]} if self.video else {"images": [scene.frames[0]]}
        return {"prompt": self.prompt, **seen, **scene.truth, "id": identity}

    def prompts(self, split: Split = "train", n: int | None = None) -> list[dict[str, Any]]:
        n = n or (self.held_out if split == "eval" else self.options.prompts)
        return [self.row(s, f"{split}-{i}") for i, s in enumerate(self.drawn("prompts", split, n))]

    def demonstrations(self, split: Split = "train", n: int | None = None) -> list[dict[str, Any]]:
        """Prompts with a `completion` of the weak annotator that has the form, right or wrong, for fine-tuning."""
        rows = self.prompts(split, n)
        random = random_of(self.name, "demonstrations", split, self.options.seed)
        for row in rows:
            said: list[str] = []
            while not self.marks(row, said).form:
                said = self.trace(row, random, weak=True)
            row["completion"] = self.text(said)
        return rows

    @staticmethod
    def text(words: Sequence[str]) -> str:
        """Words as a completion in a row: a space in front, no `<end>`."""
        return "".join(f" {word}" for word in words if word != EOS)

    def sides(self, scene: Scene, random: np.random.RandomState) -> tuple[list[str], list[str]]:
        """What is true of a scene, and what the weak annotator says that is not."""
        while True:
            rejected = self.trace(scene.truth, random, weak=True)
            if self.marks(scene.truth, rejected).wrong:
                return self.trace(scene.truth, random, weak=False), rejected

    def pairs(
        self, split: Split = "train", n: int | None = None, slope: float | None = None, seed: int | None = None
    ) -> list[dict[str, Any]]:
        """True against false descriptions, with spans of characters at the words that are wrong, and theirs opposite.

        Columns beside those of prompts: `chosen`, `rejected`, `chosen_spans`, `rejected_spans`, and rewards 1 and 0.
        """
        what = f"world {self.name}: pairs are true against false; slope must be None, got {slope}"
        require(slope is None, RecipeError, what)
        n = n or (self.held_out if split == "eval" else self.options.pairs)
        return self.paired(split, n, seed)

    def paired(self, split: Split, n: int, seed: int | None) -> list[dict[str, Any]]:
        """So many pairs of true and false descriptions."""
        random = random_of(self.name, "sides", split, self.options.seed if seed is None else seed)
        drawn = self.drawn("pairs", split, n, seed)
        return [self.pair(scene, f"{split}-{i}", *self.sides(scene, random)) for i, scene in enumerate(drawn)]

    def pair(self, scene: Scene, identity: str, chosen: Sequence[str], rejected: Sequence[str]) -> dict[str, Any]:
        wrong = self.marks(scene.truth, rejected).wrong
        row = self.row(scene, identity) | {"chosen": self.text(chosen), "rejected": self.text(rejected)}
        spans = {"chosen_spans": spans_at(chosen, wrong), "rejected_spans": spans_at(rejected, wrong)}
        return row | spans | {"chosen_reward": 1.0, "rejected_reward": 0.0}

    # ---- What is right ----

    def reward(
        self, completions: Sequence[str], completion_ids: Sequence[Sequence[int]] | None = None, **columns: Any
    ) -> list[float]:
        """1 for a completion that comes to the right answer in the right form, else 0."""
        return [float(self.is_right(truth, words)) for truth, words in self._read(completions, completion_ids, columns)]

    def _read(self, completions: Any, completion_ids: Any, columns: Any) -> list[tuple[Truth, list[str]]]:
        words = [[*text.split(), EOS] for text in completions]
        if completion_ids is not None:
            words = [self.spoken(ids) for ids in completion_ids]
        rows = ({k: v[i] for k, v in columns.items() if k != "trainer_state"} for i in range(len(words)))
        return list(zip(rows, words, strict=True))

    def advantages(self, batch: TokenBatch) -> Tensor:
        """−1 at every word that is wrong, and 0 elsewhere, `[N]`."""
        return self._marked(batch, lambda marks: marks.wrong).float().neg()

    def decisions(self, batch: TokenBatch) -> Tensor:
        """The words that decide something, bool `[N]`."""
        return self._marked(batch, lambda marks: {*marks.decisions, *marks.wrong})

    def _marked(self, batch: TokenBatch, places: Callable[[Marks], Any]) -> Tensor:
        values = torch.zeros(len(batch.completion_ids), dtype=torch.bool)
        starts = batch.completion_offsets.tolist()
        for c, group in enumerate(batch.group.tolist()):
            row = batch.raw[group]  # of pairs only what they are made from
            truth = self.told([*row["chosen"].split(), EOS]) if "chosen" in row else dict(row)
            marks = self.marks(truth, self.spoken(batch.completion(c).tolist()))
            values[[starts[c] + place for place in places(marks)]] = True
        return values[batch.counted.cpu()].to(batch.device)

    @cached_property
    def _credit_truth(self) -> CreditTruth:
        return self.credit_truth()

    def credit_recovery(self, credit: Callable[[TokenBatch], Tensor]) -> dict[str, float]:
        """Agreement with the truth; `auc`: that a wrong word has less credit than another one that decides."""
        return recovered(credit, self._credit_truth, culprits=True)

    def credit_truth(self, prompts: int | None = None, seed: int = 0) -> CreditTruth:
        """Pairs of held-out scenes, true and false, with the words that are wrong and those that decide."""
        rows = self.pairs("eval", prompts, seed=seed)
        made = prepare_pairs(load_rows(rows), self.processor, TokenizeConfig())
        return self.truth_of(TokenBatch.from_samples([made[i] for i in range(len(made))]))

    def truth_of(self, batch: TokenBatch) -> CreditTruth:
        return CreditTruth(batch, self.advantages(batch), self.decisions(batch))

    # ---- What a policy is worth ----

    def sampling(self, seed: int, temperature: float = 1.0) -> SamplingConfig:
        return SamplingConfig(
            temperature=temperature, max_new_tokens=self.max_new_tokens, stop_ids=(self._ids[EOS],), seed=seed
        )

    def said(
        self,
        model: Any,
        rows: Sequence[Mapping[str, Any]],
        n: int,
        sampling: SamplingConfig,
        progress: Progress | None = None,
    ) -> list[list[list[str]]]:
        """What a policy says of the pictures of rows, n times of each, as words."""
        sampler = HFGenerate(model)
        sampler.progress = progress
        with base_models.single_thread():
            rollouts = sampler.sample(encode_prompts(rows, self.processor), n=n, sampling=sampling)
        return [[self.spoken(completion.ids) for completion in group] for group in rollouts.groups]

    def evaluate(
        self, model: Any, n: int | None = None, seed: int = 0, *, progress: Progress | None = None
    ) -> dict[str, float | None]:
        """A policy on the held-out scenes: n samples of each (None: 4) at temperature 1, and one at temperature 0.

        Returns:
            `form`: share of completions of the form, `accuracy`: of right ones; the same for the greedy ones; and
            what the world measures besides.
        """
        n, scenes = n or 4, self.drawn("prompts", "eval", self.held_out)
        rows = [self.row(scene, f"eval-{i}") for i, scene in enumerate(scenes)]
        sampled = self.said(model, rows, n, self.sampling(seed), progress)
        greedy = self.said(model, rows, 1, self.sampling(seed, temperature=0.0))
        found: dict[str, float | None] = {"samples": n, **self._measures(scenes, sampled)}
        found |= {f"greedy_{name}": value for name, value in self._measures(scenes, greedy).items()}
        return found | self.bounds(scenes)

    def _measures(self, scenes: Sequence[Scene], said: Sequence[Sequence[list[str]]]) -> dict[str, float]:
        both = [(scene.truth, words) for scene, group in zip(scenes, said, strict=True) for words in group]
        found = {
            "form": np.mean([self.marks(truth, words).form for truth, words in both]),
            "accuracy": np.mean([self.is_right(truth, words) for truth, words in both]),
        }
        return {name: float(value) for name, value in found.items()} | self.own_measures(both)

    def own_measures(self, said: Sequence[tuple[Truth, list[str]]]) -> dict[str, float]:
        """Further measures of what a policy said."""
        return {}

    def bounds(self, scenes: Sequence[Scene]) -> dict[str, float | None]:
        """What others reach on the same scenes."""
        return {}


def spans_at(words: Sequence[str], places: Sequence[int]) -> list[dict[str, int]]:
    """Spans of characters of the text of `words` at these places."""
    ends = np.cumsum([len(word) + 1 for word in words]).tolist()
    return [{"start": ends[i] - len(words[i]), "end": ends[i]} for i in sorted(places) if i < len(words)]
