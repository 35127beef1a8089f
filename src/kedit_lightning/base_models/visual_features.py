"""Visual features: what a vision tower makes of pictures, computed once for all rows about them."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from kedit_lightning.base_models.layout import Layout
from kedit_lightning.base_models.rows import EncodedRow, ImageEncoder, TokenRows
from kedit_lightning.base_models.rows.padding import RowPictures, pad_types, prompt_types
from kedit_lightning.edits import EditStack
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.image_reference import as_they_are

#: Bytes of features that are kept.
_KEPT = 1 << 28
#: Parts of a vision tower's output that no decoder reads.
_UNREAD = ("last_hidden_state", "hidden_states", "attentions")


class Seeing(Protocol):
    """What visual features need to know of a base model."""

    edits: EditStack
    layout: Layout

    @property
    def device(self) -> torch.device:
        """Device that its first weights are computed with."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its weights."""


class VisualFeatures:
    """Gives a model the pictures of rows, as features where it takes them and as pixels elsewhere.

    Features of a row's pictures are computed by the model's own ``get_image_features`` from these
    pictures alone, so they do not depend on other rows; a pass that reads them from the cache is
    bit-equal to one that computes them.  They are computed anew when weights of the model have
    changed; edits of the decoder leave them as they are.

    Args:
        model: The vision-language model.
        images: Encoder of its pictures, where there is a processor.
        taken: Names of the arguments of its ``forward``.
    """

    def __init__(self, model: Any, images: ImageEncoder | None, taken: Collection[str]) -> None:
        self._model, self._images, self._taken = model, images, frozenset(taken)
        self._known: OrderedDict[object, RowPictures] = OrderedDict()
        self._state: object = None
        #: Whether features are kept; a pass without is slower, and gives the same bits.
        self.cached = True

    @cached_property
    def _takes_features(self) -> bool:
        return "mm_encoder_outputs" in self._taken and hasattr(self._model, "get_image_features")

    @cached_property
    def _reads_prompts_whole(self) -> bool:
        """Whether the decoder reads prompts in both directions, and is told where they end.

        Without being told it would read answers so, too.
        """
        config = self._model.config.get_text_config(decoder=True)
        whole = getattr(config, "use_bidirectional_attention", None) is True
        return whole and "token_type_ids" in self._taken

    @cached_property
    def _positioned_by(self) -> frozenset[str]:
        """Names of the inputs by which the model finds its positions, beside ids and mask."""
        finders = [getattr(module, "get_rope_index", None) for module in self._model.modules()]
        return frozenset(
            n for f in finders if f is not None for n in inspect.signature(f).parameters
        )

    def added(self, rows: TokenRows, encoded: Sequence[EncodedRow], base: Seeing) -> TokenRows:
        """Padded rows with their pictures.

        Args:
            rows: The padded rows.
            encoded: The same rows before.
            base: The base model; edits of its vision tower, if any, act.
        """
        if self._images is None or not any(row.images for row in encoded):
            return replace(rows, types=prompt_types(rows)) if self._reads_prompts_whole else rows
        edited = any(not base.layout.has_in_blocks(name) for name in base.edits.modules)
        pictures = tuple(
            self._of(row.images, base.device, base.dtype, edited) if row.images else None
            for row in encoded
        )
        types = pad_types(encoded, rows, self._taken)
        types |= prompt_types(rows) if self._reads_prompts_whole else {}
        return replace(rows, pictures=pictures, types=types)

    def _of(
        self, images: tuple[str, ...], device: torch.device, dtype: torch.dtype, edited: bool
    ) -> RowPictures:
        state = (device, dtype, *_versions(self._model))
        if state != self._state:
            self._known.clear()
            self._state = state
        key = as_they_are(images)
        if key in self._known and not edited and self.cached:
            self._known.move_to_end(key)
            return self._known[key]
        found = self._computed(images, device, dtype)
        if self._takes_features and not edited and self.cached:
            self._known[key] = found
            self._drop()
        return found

    # Tensors of an inference mode could not be saved for a backward pass later on.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _computed(
        self, images: tuple[str, ...], device: torch.device, dtype: torch.dtype
    ) -> RowPictures:
        inputs = {
            name: value.clone().to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in self._pixels(images).items()
        }
        if not self._takes_features:
            own = {name: value for name, value in inputs.items() if name in self._taken}
            return RowPictures(own, positioned=bool(self._positioned_by))
        read = inspect.signature(self._model.get_image_features).parameters
        given = {name: value for name, value in inputs.items() if name in read}
        output = self._model.get_image_features(**given, return_dict=True)
        kept = {
            name: value
            for name, value in output.items()
            if name not in _UNREAD and not isinstance(value, ModelOutput)
        }
        positioned = {n: v for n, v in inputs.items() if n in self._positioned_by & self._taken}
        return RowPictures(positioned, type(output)(**kept), bool(self._positioned_by))

    def _pixels(self, images: tuple[str, ...]) -> Mapping[str, Tensor]:
        if "cross_attention_mask" in self._taken:
            raise UnsupportedUseError(
                f"a model of type '{self._model.config.model_type}' reads pictures by "
                "cross-attention, and rows with and without them cannot share a pass; use one "
                "that has pictures among its tokens"
            )
        assert self._images is not None  # rows with pictures were made by it
        return self._images.pixels(images)

    def _drop(self) -> None:
        """Forget the features that were used longest ago, once there are too many."""
        sizes = {key: _size(found.features) for key, found in self._known.items()}
        while len(self._known) > 1 and sum(sizes.values()) > _KEPT:
            sizes.pop(self._known.popitem(last=False)[0])


def _versions(model: nn.Module) -> Iterator[Any]:
    """Places of a model's weights in memory, and torch's counts of their changes."""
    for parameter in model.parameters():
        yield None if parameter.is_inference() else parameter._version
        yield id(parameter)


def _size(value: Any) -> int:
    """Bytes of the tensors in an output."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, (list, tuple)):
        return sum(map(_size, value))
    return sum(map(_size, value.values())) if isinstance(value, ModelOutput) else 0
