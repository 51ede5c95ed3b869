"""Model specs of a recipe as loaded models: folders, hub names, worlds, earlier stages, adapters."""

from __future__ import annotations

import contextlib
import copy
import difflib
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GenericForTokenClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from tokengrain.batch import Segments, TokenBatch
from tokengrain.data.vision import load_processor
from tokengrain.errors import (
    DataError,
    ModelError,
    RecipeError,
    RunError,
    TokengrainError,
    atomic_write,
    fault,
    file_fingerprint,
    fingerprint,
    read_json,
    regular_file,
    require,
    some,
    write_json,
)
from tokengrain.methods._shaping import Moments
from tokengrain.scoring.model import (
    HEADS,
    TOKEN_CLASSIFIER,
    device_of,
    evaluating,
    head_name,
    input_embeddings,
    is_encoder_decoder,
    output_embeddings,
    positions_of,
    text_config,
    vocabulary,
)
from tokengrain.scoring.prepare import TOLERANCE, relative_error, unwrapped
from tokengrain.scoring.reference import disable_dropout, is_peft, unsharded
from tokengrain.scoring.token_scores import (
    CompletionStatistics,
    Pooling,
    ScoreStatistics,
    config_of,
    frozen_token_scores,
    pooled_scores,
    set_statistics,
)
from tokengrain.scoring.vision import placeholders, tower
from tokengrain.settings import nearest
from tokengrain.specs import LoraSpec, ModelSpec, TokenizerSpec

ADAPTER = "adapter_config.json"
REAL = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_CONTENT = ("*.safetensors", "*.bin", "*.json", "*.model", "*.jinja", "*.txt")


def is_adapter(path: str) -> bool:
    """Whether `path` is a folder with a PEFT adapter instead of a whole model."""
    return (Path(path) / ADAPTER).is_file()


def _adapter(path: str) -> dict[str, Any]:
    """What an adapter's folder says of it."""
    found = read_json(Path(path) / ADAPTER, ModelError)
    require(isinstance(found, dict), ModelError, f"{path}/{ADAPTER} is damaged; expected an object")
    what = f"{path}/{ADAPTER} has megatron_config, for which peft imports the module in megatron_core; remove it"
    require(not found.get("megatron_config"), ModelError, what)
    return found


def base_of_adapter(path: str) -> str:
    """Where the base model of an adapter folder is; ModelError if the adapter does not say or the base has gone."""
    base = _adapter(path).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ModelError(f"{path}/{ADAPTER} does not name its base model (base_model_name_or_path)")
    itself = Path(base).is_dir() and Path(base).samefile(path)
    require(not itself, ModelError, f"{path}/{ADAPTER} names itself as the base model (base_model_name_or_path)")
    if Path(base).is_dir() or not os.path.isabs(base):
        return base
    # The base may be an earlier stage of the same run, whose folder was moved since.
    moved = Path(path).resolve().parent.parent / Path(base).parent.name / Path(base).name
    require(moved.is_dir(), ModelError, f"the base model of adapter {path} is not there: {base}")
    return str(moved)


def load_tokenizer(spec: ModelSpec, path: str) -> Any:
    """The tokenizer in a model's folder, with a padding token."""
    places = (path, base_of_adapter(path)) if is_adapter(path) else (path,)
    for place in places:
        try:
            with library_errors(f"no tokenizer could be loaded from {path}", place):
                tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=spec.trust_remote_code)
            break
        except ModelError:
            if place == places[-1]:
                raise
    if tokenizer.pad_token_id is None:
        # Only saved files and `generate` ever use it: batches are not padded with it.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_reader(spec: ModelSpec, path: str) -> Any:
    """What makes tokens of rows: the processor of a model that sees, else its tokenizer, with a padding token."""
    tokenizer = load_tokenizer(spec, path)
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file() and not is_adapter(path):
        return tokenizer  # there is nothing but a tokenizer
    config = load_config(spec, path)
    for place in (path, base_of_adapter(path)) if is_adapter(path) else (path,):
        with library_errors(f"no processor could be loaded from {path}", place):
            processor = load_processor(config, place, trust_remote_code=spec.trust_remote_code)
        if processor is not None:
            if processor.tokenizer.pad_token_id is None:
                processor.tokenizer.pad_token = tokenizer.pad_token
            return processor
    return tokenizer


def auto_class(config: Any) -> Any:
    """Which of transformers' classes makes the language model of a config."""
    if getattr(config, "is_encoder_decoder", False):
        return AutoModelForSeq2SeqLM
    sees = bool(placeholders(config)) and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def freeze_vision(model: nn.Module) -> None:
    """Train neither the vision tower nor the projector behind it. Raises ModelError if the model has none."""
    _, parameters = tower(unwrapped(model))
    require(parameters, ModelError, f"freeze is vision, and {type(model).__name__} has no vision tower")
    for parameter in parameters:
        parameter.requires_grad_(False)


def load_model(
    spec: ModelSpec, path: str, *, merge_adapter: bool = False, train_adapter: bool = False
) -> torch.nn.Module:
    """The language model at `path`; an adapter folder is put on its base, and folded into it or trained."""
    if is_adapter(path):
        base = load_model(spec, base_of_adapter(path))
        # Folded and rounded to few bits again, the two would not be what they are apart.
        return _with_adapter(base, path, merge_adapter and not spec.quantised, train_adapter)
    config = load_config(spec, path)
    message = f"decoder_start_id is {spec.decoder_start_id}; expected none, since {path} has no decoder beside an "
    require(config.is_encoder_decoder or spec.decoder_start_id is None, ModelError, message + "encoder")
    model: Any = from_files(auto_class(config), "model", spec, path)
    for owner in (model.config, model.generation_config) if spec.decoder_start_id is not None else ():
        owner.decoder_start_token_id = spec.decoder_start_id
    return model


def from_files(kind: Any, what: str, spec: ModelSpec, path: str, *, fresh_head: bool = False, **more: Any) -> nn.Module:
    """The model at `path`, loaded by one of transformers' Auto classes; `what` it is called in messages.

    With a fresh head the head's tensors may be missing, and those of another head left over. ModelError if other
    tensors are missing, which would be random numbers, or left over.
    """
    how = {name: getattr(spec, name) for name in ("dtype", "attn_implementation", "trust_remote_code")}
    if spec.quantised:
        how["quantization_config"] = _bits(spec)
    log: Any = logging.get_logger("transformers.modeling_utils")
    log.addFilter(_tied_as_saved)
    try:
        with library_errors(f"no {what} could be loaded from {path}", path):
            # What has another shape is an error below, which names it.
            tell = {"output_loading_info": True, "ignore_mismatched_sizes": True}
            model, found = kind.from_pretrained(path, **tell, **how, **more)
    finally:
        log.removeFilter(_tied_as_saved)
    for name, saved, wanted in sorted(found["mismatched_keys"]):
        shapes = f"{name} has shape {list(saved)}; expected {list(wanted)}"
        raise ModelError(f"the weights in {path} do not fit its config.json: {shapes}")
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if fresh_head:
        missing = [name for name in missing if name.split(".")[0] not in HEADS]
        unexpected = [name for name in unexpected if name.startswith(model.base_model_prefix + ".")]
    # Masks and frequencies that older versions of transformers saved are computed now.
    unexpected = [name for name in unexpected if not name.endswith(("attn.bias", "masked_bias", "inv_freq"))]
    check_tensors(path, type(model).__name__, missing, unexpected)
    check_numbers(path, model.named_parameters())
    return model


def check_tensors(path: str, kind: str, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raises ModelError unless a folder's weights are those of the model, or of the adapter, that they were put on."""
    for names, verb in ((missing, "lack tensors"), (unexpected, "have tensors that are none")):
        require(not names, ModelError, f"the weights in {path} {verb} of {kind}: {some(names)}")


def check_numbers(path: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raises ModelError for weights that are not finite: all that is computed with them would be no number."""
    real = ((name, p.detach()) for name, p in weights if p.numel() and p.dtype in REAL)
    bad = [name for name, p in real if not torch.stack(torch.aminmax(p)).isfinite().all()]
    require(not bad, ModelError, f"the weights in {path} are not finite: {some(bad)}")


def _tied_as_saved(record: Any) -> bool:
    """Not the advice to change the config of a model with a head of its own: encoder and decoder would come untied."""
    return "will NOT tie them" not in record.getMessage()


def _bits(spec: ModelSpec) -> BitsAndBytesConfig:
    """4 bits as in QLoRA: nf4, the scales quantised again. Computes in the type of the other weights."""
    missing = "load_in_4bit and load_in_8bit need bitsandbytes: pip install 'tokengrain[quantise]'"
    require(find_spec("bitsandbytes"), ModelError, missing)
    if spec.load_in_8bit:
        # With a threshold, columns are outliers by all tokens of a batch: a token's numbers would depend on the others.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    compute = torch.bfloat16 if spec.dtype == "auto" else getattr(torch, spec.dtype)
    nf4: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute, **nf4)


def _with_adapter(base: nn.Module, path: str, merge: bool, train: bool) -> Any:
    """The adapter at `path` on its base, or folded into it; new tokens that it was trained with get their rows."""
    peft, saved, known = import_peft(), adapter_embeddings(path), {id(p) for p in base.parameters()}
    rows = max(saved.values(), default=None)
    with library_errors(f"adapter {path} does not fit its base model", path):
        if rows is not None and rows != (size := vocabulary(base)):
            both = len(saved) > 1 or cast(Any, base).config.tie_word_embeddings or output_embeddings(base) is None
            message = f"adapter {path} was trained with {rows} tokens on a model of {size} and lacks the "
            require(both, ModelError, f"{message}{'embeddings' if 'lm_head' in saved else 'head'} of the new ones")
            cast(Any, base).resize_token_embeddings(rows, mean_resizing=False)
        adapted = peft.PeftModel.from_pretrained(base, path, is_trainable=train)
        found = adapted.load_adapter(path, adapted.active_adapter, is_trainable=train)  # says what was not there
    check_tensors(path, "this adapter", found.missing_keys, found.unexpected_keys)
    check_numbers(path, ((name, p) for name, p in adapted.named_parameters() if id(p) not in known))
    return _merged(adapted, path) if merge else adapted


def adapter_embeddings(path: str) -> dict[str, int]:
    """Rows of the embeddings and of the head that are saved with an adapter: resized ones are."""
    file, found = Path(path) / "adapter_model.safetensors", {}
    side = re.compile(r"\.(embed_tokens|wte|embed_in|word_embeddings|lm_head|embed_out)\.(base_layer\.)?weight$")
    if file.is_file():
        with library_errors(f"adapter {path} cannot be read"), safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                if match := side.search(key):
                    found[match[1]] = int(tensors.get_slice(key).get_shape()[0])
    return found


def _merged(adapted: Any, path: str) -> Any:
    """An adapter folded into its base, all of whose weights can then be trained; compared with the two as they were.

    Tied embeddings with an adapter on one side come apart first: a change of one would be a change of both.
    """
    what = f"adapter {path} cannot be merged"
    require(not adapted.active_peft_config.is_prompt_learning, ModelError, f"{what}: it is no change of weights")
    lm = adapted.get_base_model()
    tokens = _some_tokens(adapted)
    with library_errors(what), evaluating(adapted):
        before = _logits(adapted, tokens).clone()
        sides = [lm.get_input_embeddings(), lm.get_output_embeddings()]
        bases = [getattr(m, "base_layer", None) or getattr(m, "original_module", m) for m in sides]
        if None not in sides and any(hasattr(m, "base_layer") or hasattr(m, "modules_to_save") for m in sides):
            if bases[0].weight is bases[1].weight:
                bases[1].weight = nn.Parameter(bases[1].weight.detach().clone())
            lm.config.tie_word_embeddings = text_config(lm).tie_word_embeddings = False
        merged = adapted.merge_and_unload()
        after = _logits(merged, tokens)
    _same_logits(after, before, input_embeddings(merged).weight.dtype, f"{what}: the merged model")
    for parameter in merged.parameters():  # peft froze the base
        parameter.requires_grad_(parameter.is_floating_point())
    return merged


def _same_logits(after: Tensor, before: Tensor, dtype: torch.dtype, what: str) -> None:
    """Raises ModelError if two models' logits `[1, n, V]` differ by more than rounding weights to `dtype` explains.

    In 16 bits the median token counts, and three times the tolerance is allowed: rounding moves the logits of a
    published model (SmolLM2-135M) by .05 of their spread at the median token, and by more than their spread at some.
    """
    if before.shape[-1] == 1:  # scores: their spread is over the tokens
        before, after = before.transpose(1, 2), after.transpose(1, 2)
    errors, exact = relative_error(after, before), dtype.itemsize > 2
    apart = float(errors.max() if exact else errors.median())
    message = f"{what} gives other logits (relative difference {apart:.2g})"
    require(apart <= TOLERANCE[dtype] * (1 if exact else 3), ModelError, message)


def merge(path: str | os.PathLike[str], output: str | os.PathLike[str], dtype: str = "auto") -> Path:
    """Write the adapter at `path`, folded into its base, as a whole model with its tokenizer; returns the folder.

    It is folded in float32 and compared with base and adapter; what was saved is loaded again and compared with that.

    Args:
        output: a folder that does not exist, or is empty.
        dtype: float32, bfloat16, float16; "auto": as the base's weights are saved.

    Raises:
        ModelError: no adapter, one that cannot be merged, a merged model that computes something else.
        RunError: the output is in use.
    """
    path = os.fspath(path)
    require(is_adapter(path), ModelError, f"{path} is no adapter (no {ADAPTER}), so there is nothing to merge")
    target = Path(output)
    free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    require(free, RunError, f"{target} exists; give another folder with --output")
    spec, reward = ModelSpec(path=path), is_reward_adapter(path)
    load: Any = load_reward_model if reward else load_model
    merged = load(spec, path, merge_adapter=True).eval()
    if dtype == "auto":
        saved = getattr(load_config(spec, base_of_adapter(path)), "dtype", None)
        dtype = str(saved or "float32").removeprefix("torch.")
    size = vocabulary(merged)
    tokens = torch.arange(0, size, max(1, size // 24))[None, :24]
    with torch.no_grad():
        before = _logits(merged, tokens)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".merging-", dir=target.parent))
    try:
        merged.to(getattr(torch, dtype)).save_pretrained(staged)
        load_tokenizer(spec, path).save_pretrained(staged)
        with torch.no_grad():
            after = _logits(load(ModelSpec(path=str(staged)), str(staged)).eval(), tokens)
        _same_logits(after, before, getattr(torch, dtype), f"{path} cannot be merged in {dtype}: the saved model")
        staged.chmod(0o755)
        staged.replace(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return target


def recast(folder: Path, dtype: str) -> None:
    """Change the type of the weights in a saved model's folder (an adapter's too), and what its config says of it."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as content:
            about = content.metadata()
        tensors = {k: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for k, v in load_file(file).items()}
        with atomic_write(file) as temporary:
            save_file(tensors, temporary, about)
    if (config := folder / "config.json").is_file():
        write_json(config, {**read_json(config), "dtype": dtype})


class StreamedWeights:
    """A model's weights under the names that its checkpoints give them, each once, for whoever takes them in order.

    `described` has their names, types and shapes. Of a sharded model all ranks iterate: one tensor is gathered at a
    time. Raises `RecipeError` for a model whose checkpoints hold other tensors than it does.
    """

    def __init__(self, model: Any) -> None:
        held, first = model.state_dict(keep_vars=True), dict[int, str]()  # of tied weights the first name
        for name, value in held.items():
            first.setdefault(id(value), name)
        self._values = {name: held[name] for name in first.values()}
        self.described = [(name, value.dtype, tuple(value.shape)) for name, value in self._values.items()]
        outlines = {name: torch.empty(shape, dtype=dtype, device="meta") for name, dtype, shape in self.described}
        saved = {name: tuple(value.shape) for name, value in revert_weight_conversion(model, outlines).items()}
        other = [name for name, _, shape in self.described if saved.get(name) != shape]
        what = f"a server cannot be sent {other and other[0]!r}, which checkpoints of this model hold in another form"
        require(not other, RecipeError, f"{what}; expected refresh: checkpoint")

    def __iter__(self) -> Iterator[Tensor]:
        return (unsharded(value) for value in self._values.values())


def _numbers(weight: Any) -> int:
    """How many numbers a weight stands for; those of 4 bits are packed."""
    packed = getattr(weight, "quant_state", None)
    return int(weight.numel() if packed is None else packed.shape.numel())


def in_words(parameters: int) -> str:
    """`134.5 M`; a small number as it is."""
    return f"{parameters / 1e6:.4g} M" if parameters >= 1e5 else str(parameters)


def trained(model: Any, *, whole: bool = False) -> str:
    """What of a model is trained, for people: "trains 134.5 M of 134.5 M parameters".

    Raises ModelError if nothing is; or only a new head of a model that has an adapter or is to be trained whole.
    """
    given = [(name, _numbers(weight), weight.requires_grad) for name, weight in model.named_parameters()]
    own = [(name, size) for name, size, needed in given if needed]
    total, count = sum(size for _, size, _ in given), sum(size for _, size in own)
    shown = [in_words(n) for n in (count, total)]
    kind = type(model).__name__
    message = f"nothing in {kind} can be trained: none of its {shown[1]} parameters requires gradients; "
    expected = "expected weights that do, or an adapter loaded with is_trainable=True (FrozenReference and some credit "
    expected += "sources freeze the model that they are given: give them a copy)"
    require(own, ModelError, message + expected)
    heads = all({*HEADS, "modules_to_save"} & set(name.split(".")) for name, _ in own) and count < total
    message = f"only {own[0][0]} of {kind} would be trained, {shown[0]} of {shown[1]} parameters; "
    require(not heads or not (whole or is_peft(model)), ModelError, message + "expected the other weights too")
    return f"trains {shown[0]} of {shown[1]} parameters"


def _logits(model: Any, tokens: Tensor) -> Tensor:
    """A model's logits of a text `[1, n]`, which a decoder beside an encoder writes too."""
    given = {"input_ids": tokens, **({"decoder_input_ids": tokens} if is_encoder_decoder(model) else {})}
    logits: Tensor = model(**given).logits
    return logits


def _some_tokens(adapted: Any) -> Tensor:
    """A text `[1, n]` of tokens from all over the vocabulary, and of those that the adapter has trained."""
    lm, trained = adapted.get_base_model(), getattr(adapted.active_peft_config, "trainable_token_indices", None) or ()
    size, most = vocabulary(lm), min(24, positions_of(lm.config) or 24)
    own = [i for part in trained.values() for i in part] if isinstance(trained, dict) else list(trained)
    spread = range(0, size, max(1, size // most))
    return torch.tensor([[*own, *spread][:most]], device=device_of(lm))


@contextlib.contextmanager
def library_errors(what: str, path: str | None = None) -> Iterator[None]:
    """What transformers, peft and safetensors raise on bad files, as a ModelError that begins with `what`."""
    for file in sorted(Path(path).iterdir()) if path and Path(path).is_dir() else ():
        if not file.is_dir():
            regular_file(file, ModelError)
    try:
        yield
    except TokengrainError:
        raise
    except Exception as error:  # corrupted files raise errors of many kinds
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and fault(error)):
            raise  # of the machine
        if path and (missing := _near_path(path)):  # which says more than what the hub says of the name
            raise ModelError(f"{what}{missing} ({_first_line(error)})") from error
        damaged = _damaged(path) if path else ""
        raise ModelError(f"{what}: {damaged}{_first_line(error)}") from error


def _damaged(path: str) -> str:
    """Names the file of weights in a folder that cannot be read, if there is one."""
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except Exception:
            return f"{file.name} is damaged or incomplete: "
    return ""


def check_saved(path: str) -> None:
    """Raises ModelError, which names the file, if one of a saved model's files is missing or cut off."""
    folder = Path(path)
    adapter = is_adapter(path) or any(folder.glob("adapter_model*"))
    stem, config = ("adapter_model", ADAPTER) if adapter else ("model", "config.json")
    index, weights = folder / f"{stem}.safetensors.index.json", {f"{stem}.safetensors"}
    with library_errors(f"{path} cannot be read"):
        if index.is_file():  # of weights in several files
            weights = set(read_json(index, ModelError)["weight_map"].values())
        for name in (config, *sorted(weights)):
            require((folder / name).is_file(), ModelError, f"{folder / name} is not there")
        read_json(folder / config, ModelError)
    cut = _damaged(path).removesuffix(": ")
    require(not cut, ModelError, f"{folder / cut}")
    if adapter:
        base_of_adapter(path)


def load_config(spec: ModelSpec, path: str) -> Any:
    """The architecture's config, without the weights."""
    place = base_of_adapter(path) if is_adapter(path) else path
    is_there = Path(place).is_dir() or not (os.path.isabs(place) or place.startswith((".", "~")))
    near = _near_path(place)
    require(is_there, ModelError, f"no model at {place}{near}")
    if "did you mean" in near and not os.environ.get("HF_HUB_OFFLINE"):  # without a network it takes half a minute
        warnings.warn(f"{place}{near} Asking the hub for it", stacklevel=2)
    with library_errors(f"no model at {place}", place):
        if (file := Path(place) / "config.json").is_file():
            read_json(file, ModelError)  # transformers passes over a key that is given twice
        config = AutoConfig.from_pretrained(place, trust_remote_code=spec.trust_remote_code)
    kernel = str(getattr(config, "_attn_implementation", None))
    what = f"{place} names a kernel of the hub, {kernel}, as its attn_implementation, which is code"
    require("/" not in kernel or spec.trust_remote_code, ModelError, f"{what}; expected trust_remote_code: true")
    if place != path and (saved := adapter_embeddings(path)):
        config.get_text_config().vocab_size = max(saved.values())
    return config


def skeleton(spec: ModelSpec, path: str | None) -> nn.Module:
    """The model of a spec without its numbers, on the meta device; `path` None: one that is built from scratch."""
    if path is not None:
        config = load_config(spec, path)
    else:
        made = spec.tokenizer or TokenizerSpec()
        tokens = made.vocab_size if isinstance(made, TokenizerSpec) else len(load_tokenizer(spec, made))
        values: dict[str, Any] = {"vocab_size": tokens, **(spec.config or {})}
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    with library_errors(f"no model could be made of the config in {path}"), torch.device("meta"):
        model: nn.Module = auto_class(config).from_config(config, trust_remote_code=spec.trust_remote_code)
        return model


def adapter_size(model: nn.Module, lora: LoraSpec) -> int:
    """How many parameters a new adapter of a `skeleton` has. Raises ModelError where its target modules are not."""
    with library_errors("lora does not fit the model"), torch.device("meta"):
        adapted = import_peft().get_peft_model(model, lora_config(lora, model, init_lora_weights=True))
    return sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)


def check_vocabulary(tokenizer: Any, config: Any, tokens_of: str, model: str) -> None:
    """Warns if the tokenizer has a few tokens that the model has no embedding for, as of Gemma 3's text models.

    No row may use them, which is checked. Raises ModelError if they are many.
    """
    size, count = getattr(config.get_text_config(), "vocab_size", None), len(tokenizer)
    if size is not None:
        message = f"{model} has a vocabulary of {size} tokens, the tokenizer of {tokens_of} has {count}"
        check_sizes(count, size, message)


def check_sizes(tokens: int, vocabulary: int, message: str) -> None:
    """Warns of a few tokens more than the model has; raises ModelError if they are so many that it is another's."""
    more = tokens - vocabulary
    require(more <= vocabulary // 2, ModelError, f"{message}; they must share one tokenizer")
    if more > 0:
        warnings.warn(f"{message}: rows may not use the last {more} of its tokens", stacklevel=3)


def check_same_vocabulary(tokenizer: Any, other: Any, name: str, other_name: str) -> None:
    """Raises ModelError unless two models whose per-token numbers are combined give every token the same id."""
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    if len(ours) != len(theirs):
        detail = f"{len(ours)} tokens in {name}, {len(theirs)} in {other_name}"
    else:
        token = next(t for t in ours if theirs.get(t) != ours[t])
        detail = f"{len(ours)} tokens in both, but {token!r} is {ours[token]} in {name}, {theirs.get(token)} there"
    raise ModelError(f"{other_name} has another vocabulary than {name}: {detail}")


def model_fingerprint(path: str) -> str:
    """Identifies the content of a model folder (weights, config, tokenizer), or a hub name and revision."""
    folder = Path(path)
    if not folder.is_dir():
        found = None
        with contextlib.suppress(ValueError):  # not a possible hub name; loading it will say so
            found = try_to_load_from_cache(path, "config.json")
        return fingerprint(["hub", path, Path(found).parent.name if isinstance(found, str) else None])
    files = sorted({p for pattern in _CONTENT for p in folder.glob(pattern)})
    stats = [(p, p.stat()) for p in files]
    parts: list[Any] = [[p.name, _file_hash(p, stat.st_size, stat.st_mtime_ns)] for p, stat in stats]
    if is_adapter(path):
        parts.append(["base", model_fingerprint(base_of_adapter(path))])
    return fingerprint(parts)


@lru_cache(maxsize=256)
def _file_hash(path: Path, size: int, modified: int) -> str:
    # Size and time are part of the key, so that a file that changed is read again.
    return file_fingerprint(path)


def _first_line(error: BaseException) -> str:
    """The first line of an error; with the next one, which has the reason, if it ends in a colon."""
    first, *more = (str(error).strip() or repr(error)).splitlines()
    return f"{first} {' '.join(more[0].split())}" if first.endswith(":") and more else first.rstrip(".")


def _near_path(path: str) -> str:
    """Why there is nothing at a model's path, with the folder of a similar name."""
    if (place := Path(path)).is_dir():
        return ""
    beside = [p.name for p in place.parent.iterdir() if p.is_dir()] if place.parent.is_dir() else []
    close = difflib.get_close_matches(place.name, beside, n=1)
    from_hub = str(place.parent) == "." or not place.parent.is_dir()
    offline = from_hub and os.environ.get("HF_HUB_OFFLINE")
    hint = "there is no such folder" + (", and the hub is not asked while HF_HUB_OFFLINE is set" if offline else "")
    return f"; {hint}" + (f", did you mean {str(place.parent / close[0])!r}?" if close else "")


def import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModelError("LoRA needs peft: pip install 'tokengrain[peft]'") from error
    return peft


# ---- Token-level reward models: a causal model's decoder with one number per token instead of a vocabulary.
#
# The form on disk is a transformers token-classification model with one label, whole or as a LoRA adapter that
# carries its head. The head has no bias to speak of: it stays 0. (Q-RM's loss does not see a constant that is added to
# all scores, so a bias would drift on rounding errors.)

STATISTICS = "score_statistics.json"
"""Beside an adapter, which has no config of its own to keep the statistics in."""


def load_reward_model(
    spec: ModelSpec, path: str, *, merge_adapter: bool = False, train_adapter: bool = False
) -> nn.Module:
    """The reward model at `path`, or a new one with the decoder of the causal model at `path` and a fresh head.

    An adapter of either is folded into its base or trained on, as in `load_model`. The head's random numbers are
    torch's; seed them first. Dropout is off.
    """
    if is_adapter(path):
        if not is_reward_adapter(path):  # a policy's adapter: its merged model gives the decoder
            return reward_model_from(load_model(spec, path, merge_adapter=True))
        adapted = _with_adapter(load_reward_model(spec, base_of_adapter(path)), path, merge_adapter, train_adapter)
        if (file := Path(path) / STATISTICS).is_file():
            for name, value in read_json(file, ModelError).items():
                setattr(config_of(adapted), name, value)
        return adapted
    config = load_config(spec, path)
    _check_architecture(config)
    fresh, labels = not is_classifier_config(config), config.num_labels
    one = fresh or labels == 1
    require(one, ModelError, f"{path} is a token classifier of {labels} labels; a reward model has one")
    if fresh and auto_class(config) is AutoModelForImageTextToText:  # whose tensors go by its own class's names
        return reward_model_from(load_model(spec, path))
    config.num_labels, config.classifier_dropout = 1, 0.0
    verbosity = logging.get_verbosity()
    try:
        if fresh:  # no report on weights that are missing or left over: with a fresh head both are as they should be
            logging.set_verbosity_error()
        model = from_files(AutoModelForTokenClassification, "reward model", spec, path, fresh_head=fresh, config=config)
    finally:
        logging.set_verbosity(verbosity)
    return _finished(model, fresh=fresh)


def load_trained_reward_model(path: str | os.PathLike[str], *, dtype: Any = "auto", merge: bool = True) -> nn.Module:
    """A reward model that was trained before, ready to score: in evaluation mode, without gradients.

    An adapter is folded into its base if `merge`. Raises ModelError for a causal model, whose head would be random.
    """
    path = os.fspath(path)
    spec = ModelSpec(path=path, dtype=dtype)
    trained = is_reward_adapter(path) if is_adapter(path) else is_classifier_config(load_config(spec, path))
    message = f"{path} is not a reward model but a language model; expected a token classifier with one label, such as "
    require(trained, ModelError, message + "a stage of kind `reward` makes")
    return load_reward_model(spec, path, merge_adapter=merge).eval().requires_grad_(False)


def reward_model_from(model: nn.Module, *, share: bool = True) -> nn.Module:
    """A reward model with a fresh head and the decoder of a causal model (no PEFT model) that is in memory.

    With `share` it is the decoder itself, so that training one trains both; otherwise a copy.
    """
    message = "the model has an adapter; expected a plain model, as merge_and_unload() gives"
    require(not is_peft(model), ModelError, message)
    config: Any = copy.deepcopy(model.config)
    _check_architecture(config)
    config.num_labels, config.classifier_dropout = 1, 0.0
    with torch.device("meta"):
        made = AutoModelForTokenClassification.from_config(config)
    decoder: Any = model.base_model
    setattr(made, made.base_model_prefix, decoder if share else copy.deepcopy(decoder))
    like, name = input_embeddings(model).weight, head_name(made)
    setattr(made, name, getattr(made, name).to_empty(device=like.device).to(like.dtype))
    return _finished(made.train(model.training), fresh=True)


def lora_config(lora: LoraSpec, model: Any, **own: Any) -> Any:
    """A recipe's `lora:` as peft's configuration for a model.

    "all-linear" leaves out the vision tower and its projector. Raises ModelError for a module to save that the model
    does not have: peft ignores it.
    """
    wanted = () if "modules_to_save" in own else lora.modules_to_save or ()
    names = [name for name, _ in model.named_modules()] if wanted else []
    for one in set(wanted) - set(HEADS):  # a reward model gets those later
        near = nearest(one, {name.rpartition(".")[2] for name in names})
        what = f"lora.modules_to_save has {one!r}, and {type(model).__name__} has no such module{near}"
        require(any(name.endswith(one) for name in names), ModelError, what)
    if lora.target_modules == "all-linear" and tower(model)[1]:
        decoder = model.get_decoder()
        inside = next(name for name, module in model.named_modules() if module is decoder)
        layers = {name.rpartition(".")[2] for name, m in decoder.named_modules() if isinstance(m, nn.Linear)}
        own["target_modules"] = rf"{re.escape(inside)}\..*\.({'|'.join(sorted(layers))})"
    same = ("r", "target_modules", "modules_to_save", "use_rslora", "use_dora", "init_lora_weights")
    given = {"task_type": "CAUSAL_LM", "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    return import_peft().LoraConfig(**{**given, **{name: getattr(lora, name) for name in same}, **own})


def reward_lora_config(lora: LoraSpec, model: Any = None) -> Any:
    """The same for a reward model: the head is trained in full and saved."""
    saved = [*HEADS, *(m for m in lora.modules_to_save or () if m not in HEADS)]
    # "all-linear" would put a LoRA on the head, which is trained as it is.
    return lora_config(lora, model, task_type="TOKEN_CLS", exclude_modules=list(HEADS), modules_to_save=saved)


MEASURED_ROWS, MEASURED_TOKENS = 512, 8192  # of a data set, and of a forward pass


def measure_scores(
    model: nn.Module, dataset: Any, *, max_rows: int = MEASURED_ROWS, max_tokens: int = MEASURED_TOKENS
) -> ScoreStatistics:
    """Mean and standard deviation of the scores of a data set's completion tokens; also set on the model's config.

    Of a longer data set `max_rows` rows are taken, evenly spread (of a stream the first). The raw scale of the scores
    is arbitrary (the loss pushes pairs gamma/beta apart), so whatever uses them needs these two numbers.
    """
    (moments,) = _moments(model, dataset, max_rows, max_tokens, _each)
    return set_statistics(model, ScoreStatistics(moments.mean, moments.std))


def measure_completions(
    model: nn.Module,
    dataset: Any,
    *,
    pooling: Pooling = "mean",
    max_rows: int = MEASURED_ROWS,
    max_tokens: int = MEASURED_TOKENS,
) -> CompletionStatistics:
    """The same of the scores of whole completions, pooled as in the loss that the model was trained with."""
    (moments,) = _moments(model, dataset, max_rows, max_tokens, _whole(pooling))
    return set_statistics(model, CompletionStatistics(moments.mean, moments.std, pooling))


def measure_both(model: nn.Module, dataset: Any, pooling: Pooling) -> tuple[ScoreStatistics, CompletionStatistics]:
    """`measure_scores` and `measure_completions` in one pass."""
    tokens, whole = _moments(model, dataset, MEASURED_ROWS, MEASURED_TOKENS, _each, _whole(pooling))
    found = ScoreStatistics(tokens.mean, tokens.std), CompletionStatistics(whole.mean, whole.std, pooling)
    return set_statistics(model, found[0]), set_statistics(model, found[1])


Read = Callable[[Tensor, Segments], Tensor]


def _each(scores: Tensor, segments: Segments) -> Tensor:
    return scores


def _whole(pooling: Pooling) -> Read:
    return lambda scores, segments: pooled_scores(scores, segments, pooling)[segments.lengths > 0]


def _moments(model: nn.Module, dataset: Any, max_rows: int, max_tokens: int, *reads: Read) -> list[Moments]:
    """Mean and spread of what each of `reads` takes from the token scores of a data set's completions."""
    if hasattr(dataset, "__len__"):
        samples = [dataset[i] for i in range(0, len(dataset), max(1, -(-len(dataset) // max_rows)))]
    else:
        samples = list(islice(dataset, max_rows))
    name = getattr(dataset, "name", None)
    require(samples, DataError, "the dataset is empty", file=name, expected="at least one row")
    device = next(model.parameters()).device
    parts = TokenBatch.from_samples(samples).split(max_tokens)
    found = [Moments() for _ in reads]
    for part in parts:
        scores = frozen_token_scores(model, part.to(device)).cpu()
        found = [one + Moments.of(read(scores, part.segments)) for one, read in zip(found, reads, strict=True)]
    return found


def save_statistics(path: str | Path, *statistics: ScoreStatistics) -> None:
    """Write statistics into a saved reward model's folder: its config, or a file beside an adapter."""
    file = Path(path) / (STATISTICS if is_adapter(str(path)) else "config.json")
    kept = read_json(file) if file.exists() else {}
    write_json(file, {k: v for part in (kept, *(one.as_dict() for one in statistics)) for k, v in part.items()})


def is_reward_adapter(path: str) -> bool:
    """Whether an adapter folder is a reward model's, with its head, and not a policy's."""
    return bool(_adapter(path).get("task_type") == "TOKEN_CLS")


def is_classifier_config(config: Any, kind: str = TOKEN_CLASSIFIER) -> bool:
    """Whether it is the config of a token classifier (or of another kind of architecture)."""
    return any(name.endswith(kind) for name in config.architectures or ())


def _check_architecture(config: Any) -> None:
    written = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    causal, kind = written and not getattr(config, "is_encoder_decoder", False), repr(config.model_type)
    require(causal, ModelError, f"model type {kind} is not a causal language model, which a reward model needs")
    message = f"transformers has no token-classification form of model type {kind}; expected one that has "
    known = type(config) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    if not known and auto_class(config) is AutoModelForImageTextToText:
        _make_classifier(type(config))
        known = True
    require(known, ModelError, message + "(llama, qwen2, qwen3, mistral, gemma2, gpt2, gpt_neox, ...)")


def _make_classifier(kind: Any) -> None:
    """Make the token classifier of a kind of models that see, which transformers lacks, and let its Auto class know."""
    model: Any = MODEL_MAPPING[kind]
    base = next(cls for cls in model.__mro__ if cls.__name__.endswith("PreTrainedModel"))
    name = base.__name__.replace("PreTrainedModel", TOKEN_CLASSIFIER)
    made = type(name, (GenericForTokenClassification, base), {"config_class": kind})
    AutoModelForTokenClassification.register(kind, made, exist_ok=True)


def reset_head(model: nn.Module) -> None:
    """Draw a token classifier's head anew, with torch's random numbers, its bias 0."""
    head: Any = getattr(model, head_name(model))
    # Scores start with a spread of about 1 (Stiennon et al. 2020): little beside gamma/beta.
    nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def _finished(model: Any, *, fresh: bool) -> nn.Module:
    head = getattr(model, head_name(model))
    if fresh:
        reset_head(model)
    if isinstance(head.bias, nn.Parameter):
        value = head.bias.detach().clone()
        del head.bias
        # A buffer is saved under the same name and stays frozen where peft makes whole modules trainable.
        head.register_buffer("bias", value)
    return disable_dropout(model)


# ---- The `init` stage: a model built from a config, with a tokenizer trained on the data.

PAD, EOS = "<pad>", "<eos>"
MOST_LAYERS = 10_000
TEXT_COLUMNS = ("prompt", "chosen", "rejected", "completion", "text", "messages")


def check_config(values: dict[str, Any]) -> str | None:
    """What is wrong with the `config:` of a model built from scratch, or None."""
    model_type = values["model_type"]
    if model_type not in CONFIG_MAPPING:
        near = nearest(str(model_type), list(CONFIG_MAPPING))
        return f"config.model_type: no architecture {model_type!r} in transformers{near}"
    cls = CONFIG_MAPPING[model_type]
    legal = {**cls().to_dict(), **dict.fromkeys(cls.attribute_map)}
    for key in values:
        if key not in legal:
            return f"config.{key}: unknown key of a {model_type} config{nearest(key, legal)}"
    for key, value in values.items():
        if "layer" in key and isinstance(value, int) and value > MOST_LAYERS:  # configs list their layers
            return f"config.{key}: got {value}; expected at most {MOST_LAYERS}"
    try:
        cls(**{k: v for k, v in values.items() if k != "model_type"})
    except Exception as error:  # configs validate themselves with exceptions of many kinds
        return f"config: {' '.join(str(error).split())}"
    return None


def build(spec: ModelSpec, rows: Iterable[tuple[int, Any]], seed: int, folder: Path) -> None:
    """Write a new model and its tokenizer (default: a BPE of 4,096 tokens, trained on the rows) to `folder`."""
    if isinstance(spec.tokenizer, str):
        with library_errors(f"no tokenizer could be loaded from {spec.tokenizer}"):
            tokenizer: Any = AutoTokenizer.from_pretrained(spec.tokenizer)
    else:
        tokenizer = train_tokenizer(spec.tokenizer or TokenizerSpec(), texts(rows))
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    values: dict[str, Any] = dict(spec.config or {})
    model_type = values.pop("model_type")
    # Some architectures (qwen2) load any tokenizer as their own class, which adds tokens: count as it will be loaded.
    tokenizer.save_pretrained(folder)
    AutoConfig.for_model(model_type).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if getattr(AutoConfig.for_model(model_type), "is_encoder_decoder", False):
        ids |= {"decoder_start_token_id": tokenizer.pad_token_id, "forced_eos_token_id": None}
    config = AutoConfig.for_model(model_type, **{"vocab_size": len(tokenizer), "bos_token_id": None, **ids, **values})
    message = f"model.config.vocab_size is {config.vocab_size}; expected at least {len(tokenizer)}, the "
    message += "tokens of the tokenizer (leave it out to get just that)"
    require(config.vocab_size >= len(tokenizer), RecipeError, message)
    _check_size(config)
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config)
    if spec.dtype != "auto":
        model = model.to(getattr(torch, spec.dtype))
    model.save_pretrained(folder)


def _check_size(config: Any) -> None:
    """Raise RecipeError for a model that no machine like this one could hold; trying might end the process."""
    with torch.device("meta"), library_errors("model.config cannot be built"):
        needed = 4 * sum(p.numel() for p in auto_class(config).from_config(config).parameters())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sizes = ", ".join(f"{k} {v}" for k, v in config.to_diff_dict().items() if isinstance(v, int) and v > 2**16)
    what = f"model.config ({sizes}) makes weights of {needed / 2**30:.3g} GiB; expected at most {memory / 2**30:.3g}"
    require(needed <= memory, RecipeError, f"{what}, this machine's memory")


def train_tokenizer(spec: TokenizerSpec, corpus: Iterable[str]) -> Any:
    """A byte-level BPE trained on `corpus`, or one without merges (every byte a token)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size if spec.type == "bpe" else len(alphabet) + 2,
        special_tokens=[PAD, EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus if spec.type == "bpe" else (), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def texts(rows: Iterable[tuple[int, Any]]) -> Iterator[str]:
    """The texts of the rows, whatever their format."""
    for _, fields in rows:
        for name in TEXT_COLUMNS:
            value = fields.get(name) if isinstance(fields, dict) else None
            if isinstance(value, str):
                yield value
            elif isinstance(value, list):
                yield from (m["content"] for m in value if isinstance(m, dict) and isinstance(m.get("content"), str))
