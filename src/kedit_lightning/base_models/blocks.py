"""Location of a model's list of blocks, by a probe of a few tokens where needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kedit_lightning.base_models.text_inputs import MISSING_INPUT, lacks_inputs
from kedit_lightning.edits import EditStack
from kedit_lightning.edits.compilation import uncompiled
from kedit_lightning.edits.weight_storage import device_of
from kedit_lightning.errors import KEditError, ModuleNotLocatedError

#: Number of tokens of the probe.
PROBE_TOKENS = 6


@dataclass(frozen=True)
class Block:
    """Names of the parts of one block that methods edit.

    Args:
        name: The block.
        down: The projection that writes the MLP's result; of routed experts all of theirs, as
            :class:`~kedit_lightning.edits.experts.ExpertProjection` describes.
        mlp: The module that owns it: the block's MLP, or the projection itself where it has none.
        projections: All matrices of the MLP in the order they run, ``down`` last.
        is_routed: Whether they are those of routed experts.
    """

    name: str
    down: str
    mlp: str
    projections: tuple[str, ...]
    is_routed: bool = False

    @property
    def writer(self) -> str:
        """The module whose output the MLP adds to the block: ``down``, or all experts."""
        return self.mlp if self.is_routed else self.down


def text_config(model: nn.Module, encoder: bool = False) -> Any:
    """The part of a configuration that is about the decoder, or about the encoder."""
    config: Any = model.config
    return config.get_text_config(decoder=not encoder, encoder=encoder)


def _layer_counts(config: Any, encoder: bool) -> tuple[int, ...]:
    """Possible numbers of layers in a configuration, the likeliest first.

    ``num_hidden_layers`` is the encoder's number in decoders taken from a Blenderbot, and twice the
    number of blocks in a LongCat.
    """
    fields = ["num_decoder_layers", "num_hidden_layers", "decoder_layers", "num_layers"]
    if encoder:
        fields = ["encoder_layers", "num_hidden_layers", "num_layers"]
    counts = tuple(int(getattr(config, field, None) or 0) for field in fields)
    if not any(counts):
        raise ModuleNotLocatedError(
            f"the configuration of model type '{config.model_type}' does not say how many layers "
            "it has; use IKE, which needs none, or report the model type"
        )
    return tuple(filter(None, counts))


def find_blocks(model: nn.Module, encoder: bool = False) -> tuple[str, nn.ModuleList]:
    """Name and modules of the decoder's blocks, or of the encoder's.

    Of the lists of as many modules as there are layers that text runs through, they are the one
    with most parameters.

    Raises:
        ModuleNotLocatedError: No list of modules has the length the configuration states.
    """
    config = text_config(model, encoder)
    counts = _layer_counts(config, encoder)
    lists = [(k, m) for k, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    fitting = ([pair for pair in lists if len(pair[1]) == count] for count in counts)
    lists = next(filter(None, fitting), [])
    if not lists:
        raise ModuleNotLocatedError(
            f"no list of {counts[0]} blocks in a model of type '{config.model_type}'; use IKE, "
            "which needs none, or report the model type"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        # Encoder and decoder have equal blocks; the decoder's also attend to the encoder.
        side = "encoder" if encoder else "decoder"
        lists = [pair for pair in lists if side in pair[0]] or lists
    if len(lists) > 1:  # towers of vision and audio may have as many blocks as the decoder
        lists = _that_run(model, lists) or lists
    return max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


def _that_run(
    model: nn.Module, lists: list[tuple[str, nn.ModuleList]]
) -> list[tuple[str, nn.ModuleList]]:
    """Those of the lists whose modules run when the input is text."""
    ran: set[nn.Module] = set()
    with removing([m[0].register_forward_pre_hook(lambda m, _: ran.add(m)) for _, m in lists]):
        read_probe(model)
    return [pair for pair in lists if pair[1][0] in ran]


@torch.no_grad()
def read_probe(model: Any) -> None:
    """Run a forward pass on a few tokens, uncompiled.

    Raises:
        UnsupportedUseError: The model needs more than these.
    """
    device = device_of(model)
    vocabulary = int(text_config(model).vocab_size)
    ids = torch.arange(1, PROBE_TOKENS + 1, device=device)[None] % vocabulary
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if encoder_decoder else {})}
    try:
        with uncompiled():
            model(**inputs, use_cache=False)
    except MISSING_INPUT as error:
        if isinstance(error, KEditError):
            raise
        raise lacks_inputs(model, error) from error


@contextmanager
def naming_inputs(model: nn.Module, edits: EditStack) -> Iterator[None]:
    """Say so where a call inside the block fails since the model needs more than token ids."""
    try:
        yield
    except MISSING_INPUT as error:
        if not isinstance(error, KEditError):  # ours says what is wrong already
            with edits.suspended():
                read_probe(model)  # raises if it does
        raise


@contextmanager
def removing(handles: list[Any]) -> Iterator[None]:
    """Remove hooks at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
