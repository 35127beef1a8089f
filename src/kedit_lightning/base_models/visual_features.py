"""Visual features: what a vision tower makes of pictures, computed once for all rows about them."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from kedit_lightning.base_models.blocks import removing
from kedit_lightning.base_models.cross_attention import attended_pictures, picture_states
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
        decoder: The model that is edited: the same, or the language model inside that reads its
            features in place of embeddings.
        images: Encoder of its pictures, where there is a processor.
        taken: Names of the arguments of the decoder's ``forward``.
    """

    def __init__(
        self, model: Any, decoder: Any, images: ImageEncoder | None, taken: Collection[str]
    ) -> None:
        self._model, self._decoder = model, decoder
        self._images, self._taken = images, frozenset(taken)
        self._known: OrderedDict[object, RowPictures] = OrderedDict()
        self._state: object = None
        #: Whether features are kept; a pass without is slower, and gives the same bits.
        self.cached = True

    @cached_property
    def _takes_features(self) -> bool:
        return "mm_encoder_outputs" in self._taken and hasattr(self._model, "get_image_features")

    @cached_property
    def _embeds(self) -> bool:
        """Whether features stand in place of the decoder's embeddings."""
        return self._decoder is not self._model

    @cached_property
    def _attends(self) -> bool:
        """Whether the decoder reads features by cross-attention."""
        return "cross_attention_states" in self._taken

    @cached_property
    def _token(self) -> int:
        """Id of the token that stands for a picture."""
        config = self._model.config
        found = getattr(config, "image_token_id", None)
        return int(config.image_token_index if found is None else found)

    def _check_places(
        self, encoded: Sequence[EncodedRow], pictures: Sequence[RowPictures | None]
    ) -> None:
        """Refuse rows with more pictures than the processor writes placeholders for."""
        for row, own in zip(encoded, pictures, strict=True):
            places = row.prompt.count(self._token)
            if own is not None and places != len(own.kept["embeddings"]):
                raise UnsupportedUseError(
                    f"a model of type '{self._model.config.model_type}' reads one picture a "
                    f"prompt, and one of the prompts has {len(row.images)}; leave the others out"
                )

    @contextmanager
    def embedded(self, rows: TokenRows) -> Iterator[None]:
        """Inside, passes of a decoder find the rows' features where placeholders stand."""
        seen = [one for one in rows.pictures if one is not None]
        if not self._embeds or not seen:
            yield
            return
        own = [one.kept["embeddings"] for one in seen]
        pictured = torch.tensor([one is not None for one in rows.pictures])

        def put(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # Beams of a row stand together, each with all pictures.
            beams = len(args[0]) // len(pictured)
            rows_here = pictured.repeat_interleave(beams)[:, None].to(output.device)
            here = (args[0] == self._token) & rows_here
            times = int(here.sum()) // sum(map(len, own))
            if not times:  # a step behind the prompts
                return output
            values = torch.cat([one.repeat(times, 1) for one in own])
            return output.masked_scatter(here[..., None], values.to(output.dtype))

        reader = self._decoder
        if getattr(reader.config, "is_encoder_decoder", False):
            reader = reader.get_encoder()
        with removing([reader.get_input_embeddings().register_forward_hook(put)]):
            yield

    def to(self, device: torch.device | str) -> None:
        """Move what sees, where it is no part of the decoder."""
        if self._embeds:
            self._model.to(device)

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
        pictures = tuple(self._of(row.images, base) if row.images else None for row in encoded)
        if self._embeds:
            self._check_places(encoded, pictures)
        types = pad_types(encoded, rows, self._taken)
        types |= prompt_types(rows) if self._reads_prompts_whole else {}
        if self._attends:
            most = self._model.config.vision_config.max_num_tiles
            types |= attended_pictures(pictures, encoded, rows, self._token, most)
        return replace(rows, pictures=pictures, types=types)

    def vector(self, images: Sequence[str], base: Seeing) -> tuple[float, ...]:
        """Mean of the visual features of pictures over their tokens, of length 1.

        Raises:
            UnsupportedUseError: The model gives no features by themselves.
        """
        found = self._of(tuple(images), base)
        kept = found.kept.get("embeddings", found.kept.get("states"))
        values = kept if found.features is None else found.features.pooler_output
        if values is None:
            raise UnsupportedUseError(
                f"a model of type '{self._model.config.model_type}' gives no features of pictures "
                "by themselves, by which they could be compared; leave picture_similarity out"
            )
        parts = [values] if isinstance(values, Tensor) else list(values)
        mean = torch.cat([part.flatten(0, -2).double() for part in parts]).mean(0)
        return tuple(round(x, 7) for x in torch.nn.functional.normalize(mean, dim=0).tolist())

    def _of(self, images: tuple[str, ...], base: Seeing) -> RowPictures:
        edited = any(not base.layout.has_in_blocks(name) for name in base.edits.modules)
        state = (base.device, base.dtype, *_versions(self._model))
        if state != self._state:
            self._known.clear()
            self._state = state
        key = as_they_are(images)
        if key in self._known and not edited and self.cached:
            self._known.move_to_end(key)
            return self._known[key]
        found = self._computed(images, base.device, base.dtype)
        made = self._takes_features or self._embeds or self._attends
        if made and not edited and self.cached:
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
        if self._attends:
            return RowPictures({}, kept=picture_states(self._model.model, inputs))
        if self._embeds:
            given = {n: v for n, v in inputs.items() if n == "pixel_values"}
            found = self._model.get_image_features(**given, return_dict=True).pooler_output
            return RowPictures({}, kept={"embeddings": found.flatten(0, 1)})
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
        assert self._images is not None  # rows with pictures were made by it
        return self._images.pixels(images)

    def _drop(self) -> None:
        """Forget the features that were used longest ago, once there are too many."""
        sizes = {
            key: _size(found.features) + sum(value.nbytes for value in found.kept.values())
            for key, found in self._known.items()
        }
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
