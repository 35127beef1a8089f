"""What a model must be called with: token ids of one tokenizer, or more than that."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from kedit_lightning.errors import InvalidRequestError, UnsupportedUseError

#: Errors of models that miss an input.
MISSING_INPUT = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def call_parameters(model: nn.Module) -> dict[str, bool]:
    """Names of what a model's ``forward`` takes, and whether each must be given.

    Those that a wrapper passes on without a name are not among them.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name: p.default is p.empty for p in parameters if p.kind not in _VARIADIC}


def language_part(model: Any) -> Any:
    """The language model inside of one that must be given pixels, as BLIP-2; else the model.

    Such a model puts features of pictures in place of embeddings, and does nothing else.  It is
    frozen as a whole.

    Raises:
        UnsupportedUseError: It needs more than token ids of one tokenizer.
    """
    needed = {name for name, must in call_parameters(model).items() if must} - {"input_ids"}
    inside = getattr(model, "language_model", None)
    sees = needed == {"pixel_values"} and hasattr(model, "get_image_features")
    decoder = inside if sees and inside is not None else model
    check_text_inputs(decoder)
    model.eval().requires_grad_(False)
    return decoder


def check_text_inputs(model: Any) -> None:
    """Check that a model can be called with token ids of one tokenizer, and nothing else.

    Image-text models can where pictures are optional.

    Raises:
        UnsupportedUseError: It must be given pixels, sound or other inputs, its decoder has another
            vocabulary than its encoder, or it does not say with which token answers begin.
    """
    taken = call_parameters(model)
    needed = [name for name, must in taken.items() if must and name != "input_ids"]
    first = getattr(model, "main_input_name", "input_ids")
    if not needed and (first != "input_ids" or (taken and "input_ids" not in taken)):
        needed = [next(iter(taken)) if first == "input_ids" else first]
    if needed:
        raise UnsupportedUseError(
            f"a model of type '{_kind(model)}' must be given {' and '.join(needed)}, and rows "
            f"of text alone have none; {_WAY_OUT}"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        sizes = [_entries(half) for half in (model.get_encoder(), model.get_decoder())]
        if None not in sizes and sizes[0] != sizes[1]:
            raise UnsupportedUseError(
                f"the encoder of this model of type '{_kind(model)}' reads {sizes[0]} tokens and "
                f"its decoder {sizes[1]}, so that prompts and answers need a tokenizer each; use a "
                "model whose halves share their vocabulary"
            )
        if getattr(model.config, "decoder_start_token_id", None) is None:
            raise UnsupportedUseError(
                f"the configuration of this model of type '{_kind(model)}' does not say with which "
                "token answers begin; set model.config.decoder_start_token_id"
            )


_WAY_OUT = "use a language model, or the language part of this one as a model of its own"


def lacks_inputs(model: Any, error: Exception) -> UnsupportedUseError:
    """The error of a model that failed on token ids alone."""
    said = next(iter(str(error).strip().splitlines()), "")
    return UnsupportedUseError(
        f"a model of type '{_kind(model)}' does not run on token ids alone "
        f"({type(error).__name__}: {said[:160]}); {_WAY_OUT}"
    )


def _kind(model: Any) -> str:
    return str(getattr(model.config, "model_type", "") or type(model).__name__)


def _entries(half: Any) -> int | None:
    """Number of tokens that a half of an encoder-decoder embeds, if it says so."""
    try:
        return int(half.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        return None


def refuse_one_text(prompts: Sequence[str]) -> None:
    """Refuse a text in place of a list of texts, as it would be read letter by letter.

    Raises:
        InvalidRequestError: It is one.
    """
    if isinstance(prompts, str):
        raise InvalidRequestError(f"prompts must be a list of texts, got the text {prompts!r}")
