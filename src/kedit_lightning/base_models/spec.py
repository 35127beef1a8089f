"""Specification of a base model, and its loader."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils import logging

from kedit_lightning.cache_folder import facts_30m_dir, where_facts_30m_is
from kedit_lightning.errors import BaseModelNotFoundError, MissingExtraError, UnsupportedUseError

#: Base models that come with the package.
PACKAGED = ("nano", "shapes")
#: A base model that scripts of the project make; too large to come with the package.
FACTS_30M = "facts-30m"
#: All of the project's own, stored in 16 bit.
OWN = (*PACKAGED, FACTS_30M)
#: Files of a saved tokenizer.
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")

Dtype: TypeAlias = Literal["auto", "float32", "float64", "bfloat16", "float16"]
Quantization: TypeAlias = Literal["8bit", "4bit"]


@dataclass(frozen=True)
class BaseModelSpec:
    """Which base model to load and how.

    Args:
        name: Name on the Hugging Face hub, a folder, or a packaged one: ``nano``, ``shapes``; or
            ``facts-30m``, where its scripts have made it.
        dtype: Number type of the weights; ``auto`` keeps that of the files.
        revision: Branch, tag or commit on the hub.
        device_map: Passed to transformers, such as ``auto`` to spread layers over devices.
        quantization: Load the weights in 8 or 4 bit with bitsandbytes.
        attn_implementation: Attention kernel, such as ``sdpa`` or ``eager``.
        trust_remote_code: Run code that comes with the model. Only for sources you trust.
    """

    name: str
    dtype: Dtype = "auto"
    revision: str | None = None
    device_map: str | None = None
    quantization: Quantization | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for field, known in (("dtype", Dtype), ("quantization", Quantization)):
            value = getattr(self, field)
            if value is not None and value not in get_args(known):
                raise UnsupportedUseError(
                    f"base model '{self.name}' cannot be loaded with {field} {value!r}; known are "
                    f"{', '.join(get_args(known))}"
                )


def resolve(name: str) -> str:
    """Where the files of a base model are: a folder of the project's own, or the name itself.

    Raises:
        BaseModelNotFoundError: It is ``facts-30m``, which has not been made here.
    """
    if name == FACTS_30M:
        folder = facts_30m_dir()
        if not (folder / "config.json").is_file():
            raise BaseModelNotFoundError(
                f"base model '{name}' is not on this machine: {where_facts_30m_is()}"
            )
        return str(folder)
    return str(files("kedit_lightning.base_models") / name) if name in PACKAGED else name


def own_at_hand() -> tuple[str, ...]:
    """The project's own base models that are on this machine."""
    made = (facts_30m_dir() / "config.json").is_file()
    return OWN if made else PACKAGED


def _quantization(spec: BaseModelSpec) -> dict[str, Any]:
    if spec.quantization is None:
        return {}
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"loading '{spec.name}' in {spec.quantization} needs bitsandbytes: "
            "pip install 'kedit-lightning[quantised]'"
        ) from error
    options: dict[str, Any] = {f"load_in_{spec.quantization}": True}
    if spec.quantization == "4bit":  # as QLoRA has them, closer than plain 4-bit floats are
        options |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return {"quantization_config": BitsAndBytesConfig(**options)}


@contextmanager
def _bar_for(name: str) -> Iterator[None]:
    """Show transformers' progress bar, except for models of our own: they load at once."""
    shown = logging.is_progress_bar_enabled()
    if name in OWN:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def longest_row(config: Any) -> int:
    """The longest row a model of this configuration can take, in tokens."""
    config = config.get_text_config(decoder=True)
    for field in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        # XLNet states -1 for a length without limit.
        if (length := int(getattr(config, field, None) or 0)) > 0:
            return length
    return 1_000_000


def load_tokenizer(spec: BaseModelSpec) -> tuple[Any, int]:
    """The tokenizer of a base model and the longest row it takes, without loading its weights.

    Raises:
        BaseModelNotFoundError: There is no such model.
        UnsupportedUseError: It needs code of its own, which is not trusted.
    """
    where, source = resolve(spec.name), _source(spec)
    with _errors_of(spec):
        config = AutoConfig.from_pretrained(where, **source)
        return AutoTokenizer.from_pretrained(where, **source), longest_row(config)


def _source(spec: BaseModelSpec) -> dict[str, Any]:
    return {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}


@contextmanager
def _errors_of(spec: BaseModelSpec) -> Iterator[None]:
    """Inside, what transformers says about files that do not load becomes an error of ours."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if "trust_remote_code" in str(error) and not spec.trust_remote_code:
            raise UnsupportedUseError(
                f"base model '{spec.name}' needs code that comes with it; set "
                "model.base_model.trust_remote_code to true if you trust its source"
            ) from error
        kind = "folder" if Path(resolve(spec.name)).is_dir() else "base model"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelNotFoundError(
            f"{kind} '{spec.name}' could not be loaded ({reason}); give a folder with config, "
            "weights and tokenizer, a name on the hub that this machine can reach or has in its "
            f"cache, or one of the packaged models: {', '.join(PACKAGED)}"
        ) from error


def _sees(config: Any) -> bool:
    """Whether a configuration is that of a vision-language model."""
    known = AutoModelForImageTextToText._model_mapping
    return hasattr(config, "vision_config") and type(config) in known


def _processor(spec: BaseModelSpec) -> Any:
    """The processor of a vision-language model; ``None`` where its files have none."""
    where, source = resolve(spec.name), _source(spec)
    folder = Path(where)
    if folder.is_dir() and not any((folder / name).is_file() for name in _PROCESSOR_FILES):
        return None
    try:
        return AutoProcessor.from_pretrained(where, **source)
    except (ImportError, AttributeError) as error:
        # Without torchvision, transformers fails on processors that read videos too, in two ways.
        raise MissingExtraError(
            f"the processor of '{spec.name}' does not load ({str(error).strip().splitlines()[0]}); "
            "it needs pillow and, for most models, torchvision: "
            "pip install 'kedit-lightning[vision]'"
        ) from error


def _warn_of_float16(name: str) -> None:
    if not torch.accelerator.is_available():
        warnings.warn(
            f"the weights of '{name}' are float16, which most processors multiply many times "
            "slower than float32, and no GPU was found: --model.base_model.dtype float32 "
            '(dtype="float32" in Python), or bfloat16, which takes half of that memory',
            stacklevel=4,
        )


def load_pretrained(spec: BaseModelSpec) -> dict[str, Any]:
    """Load ``model`` and ``tokenizer``, and the ``processor`` of a vision-language model.

    Raises:
        BaseModelNotFoundError: There is no such model.
        UnsupportedUseError: It needs code of its own, which is not trusted.
        MissingExtraError: Its processor needs a package that is not installed.
    """
    where = resolve(spec.name)
    # Models of our own are stored in 16 bit and compute in 32.
    dtype = "float32" if spec.dtype == "auto" and spec.name in OWN else spec.dtype
    source = _source(spec)
    choices = {n: getattr(spec, n) for n in ("device_map", "attn_implementation")}
    options = {name: value for name, value in choices.items() if value is not None}
    options |= {**source, **_quantization(spec)}
    folder = Path(where)
    with _errors_of(spec):
        # For a folder without a tokenizer transformers returns an empty one.
        if folder.is_dir() and not any(any(folder.glob(name)) for name in _TOKENIZER_FILES):
            raise OSError("it holds no tokenizer")
        config = AutoConfig.from_pretrained(where, **source)
        tokenizer = AutoTokenizer.from_pretrained(where, **source)
        loader: Any = AutoModelForCausalLM
        if _sees(config):
            loader = AutoModelForImageTextToText
        elif getattr(config, "is_encoder_decoder", False):
            loader = AutoModelForSeq2SeqLM
        with _bar_for(spec.name):
            model = loader.from_pretrained(where, dtype=dtype, **options)
        processor = _processor(spec) if _sees(config) else None
    if spec.dtype == "auto" and model.dtype == torch.float16:
        _warn_of_float16(spec.name)
    return {"model": model, "tokenizer": tokenizer, "processor": processor}
