"""Pictures in rows: placeholder tokens in the prompt, pixel values beside the ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.image_utils import load_image

from kedit_lightning.chat_turns import put_before
from kedit_lightning.errors import InvalidRequestError


class ImageEncoder:
    """Turns pictures into placeholder tokens and model inputs with a model's own processor.

    A prompt holds the processor's image token once a picture, at the places where the model sees
    them; where it holds fewer, the rest are put before it.  Inputs that count pictures or patches
    (``pixel_values``, ``image_sizes``, ``image_grid_thw``, …) are passed on; inputs with a value
    a token, such as ``token_type_ids``, are not.

    Args:
        processor: The processor of a vision-language model, as ``AutoProcessor`` loads it.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        # A benchmark asks several questions about a picture; few pictures fill much memory.
        self._process = lru_cache(maxsize=16)(self._load)

    def _load(self, image: str) -> tuple[tuple[int, ...], dict[str, Tensor]]:
        """Placeholder ids of a picture, and the inputs that hold its pixels."""
        try:
            picture = load_image(image)
        except Exception as error:  # Pillow, httpx and transformers raise many kinds
            raise InvalidRequestError(
                f"image {image!r} cannot be read ({error}); give the path or URL of a picture"
            ) from error
        inputs = {"images": [picture], "text": [self.processor.image_token]}
        values = self.processor(**inputs, add_special_tokens=False, return_tensors="pt")
        ids = values["input_ids"]
        pixels = {name: value for name, value in values.items() if value.shape != ids.shape}
        return tuple(ids[0].tolist()), pixels

    def prompt(self, text: str, images: Sequence[str]) -> str:
        """The prompt with an image token a picture.

        Raises:
            InvalidRequestError: It holds more image tokens than there are pictures.
        """
        token = self.processor.image_token
        missing = len(images) - text.count(token)
        if missing < 0:
            raise InvalidRequestError(
                f"prompt {text!r} holds {token!r} {text.count(token)} times, and has "
                f"{len(images)} images"
            )
        return put_before(f"{token}\n" * missing, text)

    def count(self, images: Sequence[str]) -> int:
        """Number of tokens that pictures add to a row."""
        return sum(len(self._process(image)[0]) for image in images)

    def expand(self, ids: Sequence[int], images: Sequence[str]) -> tuple[list[int], list[int]]:
        """Replace each image token by the placeholder ids of its picture.

        Gives the new ids, and the index at which each old one, or its replacement, now begins.
        """
        left, expanded, index = list(images), list[int](), list[int]()
        for token in ids:
            index.append(len(expanded))
            picture = left and token == self.processor.image_token_id
            expanded += self._process(left.pop(0))[0] if picture else (token,)
        return expanded, index

    def pixels(self, image: str, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Model inputs of one picture, on a device, its floats in a dtype."""
        return {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in self._process(image)[1].items()
        }
