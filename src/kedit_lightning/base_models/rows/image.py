"""Pictures in rows: placeholder tokens in the prompt, pixel values beside the ids."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_utils import load_image

from kedit_lightning.base_models.rows.video_frames import video_frame, video_size
from kedit_lightning.chat_turns import put_before
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.image_reference import as_they_are, frame_of

#: Bytes of pixels that are kept beside the visual features made of them.
_KEPT = 1 << 28
#: Prompts whose tokens are kept; a benchmark asks each before and after an edit.
_PROMPTS = 512
#: Widths and heights by which it shows whether the number of tokens depends on them.
_SIZES = ((64, 64), (640, 96), (480, 640))


class SeenPrompt(NamedTuple):
    """A prompt with its pictures as the processor makes it.

    ``ids`` hold placeholders where the model sees pictures; ``types`` are other inputs with a value
    a token, such as ``token_type_ids``, by name.
    """

    ids: tuple[int, ...]
    types: tuple[tuple[str, tuple[int, ...]], ...] = ()


class SeenPictures(NamedTuple):
    """What the image processor makes of the pictures of a row; arrays in place of tensors.

    Arrays travel between processes as they are, where tensors take a file descriptor each.
    """

    values: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(v.nbytes for v in self.values.values() if isinstance(v, np.ndarray))


class _Recording:
    """An image processor that remembers what it gave."""

    def __init__(self, own: Any) -> None:
        self._own = own
        self.given: list[BatchFeature] = []

    def __call__(self, *args: Any, **options: Any) -> BatchFeature:
        found: BatchFeature = self._own(*args, **options)
        self.given.append(BatchFeature({k: copy.copy(v) for k, v in found.items()}))
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


class _Repeating(_Recording):
    """An image processor that gives what is known already, whatever pictures it gets."""

    def __init__(self, own: Any, seen: SeenPictures) -> None:
        super().__init__(own)
        self._seen = seen

    def __call__(self, *args: Any, **options: Any) -> BatchFeature:
        return BatchFeature(
            {
                name: torch.from_numpy(v) if isinstance(v, np.ndarray) else copy.copy(v)
                for name, v in self._seen.values.items()
            }
        )


class ImageEncoder:
    """Turns prompts with pictures into tokens and model inputs with a model's own processor.

    A prompt holds the processor's image token once a picture, at the places where the model sees
    them; where it holds fewer, the rest are put before it, as the processor's chat template writes
    them.  A processor that places its tokens itself, as that of BLIP-2, gets prompts without.

    Args:
        processor: The processor of a vision-language model, as ``AutoProcessor`` loads it.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        token = getattr(processor, "image_token", None) or processor.tokenizer.image_token
        self.token = str(token)
        #: Bytes of pixels that are kept.
        self.kept_bytes = _KEPT
        self._seen: OrderedDict[Any, SeenPictures] = OrderedDict()
        self._prompts: OrderedDict[Any, SeenPrompt] = OrderedDict()
        self._counts: dict[tuple[int, int], int] = {}

    @cached_property
    def marker(self) -> str:
        """What stands for a picture in a prompt: the image token, and what a template puts by it.

        The chat template renders a turn with a picture and one without; the text that only the
        first has is the marker, where it holds the token once.
        """
        text = {"type": "text", "text": "X"}
        try:
            seen, plain = (
                self.processor.apply_chat_template([{"role": "user", "content": content}])
                for content in ([{"type": "image"}, text], [text])
            )
        except Exception:  # there is no template, or it takes no pictures
            return f"{self.token}\n"
        start = next((i for i, (a, b) in enumerate(zip(seen, plain, strict=False)) if a != b), 0)
        rest = plain[start:]
        found = seen[start : len(seen) - len(rest)] if seen.endswith(rest) else ""
        return str(found) if found.count(self.token) == 1 else f"{self.token}\n"

    @cached_property
    def _places_itself(self) -> bool:
        """Whether the processor puts placeholders before the prompt, and leaves those in it."""
        token = self.processor.tokenizer.convert_tokens_to_ids(self.token)
        ids = self._call(f"a{self.token}", [_blank()], True)["input_ids"][0].tolist()
        return bool(ids[0] == ids[-1] == token)

    def _call(
        self, text: str, pictures: Sequence[Any], special: bool, image_processor: Any = None
    ) -> Any:
        options = {} if special else {"add_special_tokens": False}
        processor = self.processor
        if image_processor is not None:
            processor = copy.copy(processor)
            processor.image_processor = image_processor
        return processor(
            images=list(pictures), text=[text], return_tensors="pt", padding=False, **options
        )

    def prompt(self, text: str, images: Sequence[str]) -> str:
        """The prompt with an image token a picture.

        Raises:
            InvalidRequestError: It holds more image tokens than there are pictures.
        """
        if self._places_itself:
            return text
        missing = len(images) - text.count(self.token)
        if missing < 0:
            raise InvalidRequestError(
                f"prompt {text!r} holds {self.token!r} {text.count(self.token)} times, and has "
                f"{len(images)} images"
            )
        return put_before(self.marker * missing, text)

    def encode(self, text: str, images: tuple[str, ...], special: bool) -> SeenPrompt:
        """Tokens of a prompt with its pictures.

        Args:
            text: The prompt of :meth:`prompt`, inside the chat template where it is.
            images: References to its pictures.
            special: Whether the tokenizer begins the text by itself.

        Raises:
            InvalidRequestError: A picture cannot be read, or the processor refuses it.
        """
        key = text, as_they_are(images), special
        if key not in self._prompts:
            self._prompts[key] = self._encoded(text, images, special)
            if len(self._prompts) > _PROMPTS:
                self._prompts.popitem(last=False)
        return self._prompts[key]

    def _encoded(self, text: str, images: tuple[str, ...], special: bool) -> SeenPrompt:
        values = self._values(text, images, special)
        ids = values["input_ids"]
        by_token = {
            name: tuple(value[0].tolist())
            for name, value in values.items()
            if value.shape == ids.shape and name not in ("input_ids", "attention_mask", "labels")
        }
        return SeenPrompt(tuple(ids[0].tolist()), tuple(by_token.items()))

    def _values(self, text: str, images: tuple[str, ...], special: bool) -> Any:
        """What the processor makes of a prompt, and of its pictures where they are not known."""
        key = as_they_are(images)
        if key not in self._seen:
            self.take(images, self.seen(images))
        self._seen.move_to_end(key)
        known = self._seen[key]
        with _refusals(text, images):
            if known.values:
                return self._repeated(text, len(images), special, known)
            return self._call(text, [_opened(image) for image in images], special)

    def _repeated(self, text: str, count: int, special: bool, known: SeenPictures) -> Any:
        repeating = _Repeating(self.processor.image_processor, known)
        return self._call(text, [_blank()] * count, special, repeating)

    def seen(self, images: tuple[str, ...]) -> SeenPictures:
        """What the image processor makes of the pictures of a row.

        It is empty for a processor that reads pictures in another way than by one call of its image
        processor; such a one is called anew for each prompt.

        Raises:
            InvalidRequestError: A picture cannot be read, or the processor refuses it.
        """
        pictures, text = [_opened(image) for image in images], self.prompt("a", images)
        recording = _Recording(self.processor.image_processor)
        with _refusals(text, images):
            whole = self._call(text, pictures, True, recording)
        if len(recording.given) != 1:
            return SeenPictures({})
        found = SeenPictures(
            {k: v.numpy() if isinstance(v, Tensor) else v for k, v in recording.given[0].items()}
        )
        again = self._repeated(text, len(images), True, found)
        same = torch.equal(again["input_ids"], whole["input_ids"])
        return found if same else SeenPictures({})

    def take(self, images: tuple[str, ...], seen: SeenPictures) -> None:
        """Keep what was made of pictures, here or in another process."""
        self._seen[as_they_are(images)] = seen
        size = sum(one.nbytes for one in self._seen.values())
        while size > self.kept_bytes and len(self._seen) > 1:
            size -= self._seen.popitem(last=False)[1].nbytes

    def count(self, images: Sequence[str]) -> int:
        """Number of tokens that pictures add to a row."""
        if not images:
            return 0
        text = self.prompt("a", images)
        return len(self.encode(text, tuple(images), True).ids) - 1

    def usual_count(self, images: Sequence[str]) -> int:
        """Number of tokens that pictures add to a row, by their sizes; none is decoded.

        Of pictures that are elsewhere, or cannot be read, it is that of a small one.
        """
        return sum(self._count_of(_size(image)) for image in images)

    def _count_of(self, size: tuple[int, int]) -> int:
        """Number of tokens of a picture of this width and height; tried once a size."""
        if self._same_for_all:
            size = _SIZES[0]
        if size not in self._counts:
            ids = self._call(self.prompt("a", ("",)), [_blank(*size)], True)["input_ids"]
            self._counts[size] = int(ids.shape[1]) - 1
        return self._counts[size]

    @cached_property
    def _same_for_all(self) -> bool:
        """Whether pictures of all sizes take as many tokens."""
        text = self.prompt("a", ("",))
        ids = [self._call(text, [_blank(*size)], True)["input_ids"] for size in _SIZES]
        return len({one.shape for one in ids}) == 1

    def pixels(self, images: tuple[str, ...]) -> Mapping[str, Tensor]:
        """Model inputs of the pictures of a row, such as ``pixel_values``."""
        values = self._values(self.prompt("a", images), images, True)
        shape = values["input_ids"].shape
        return {name: value for name, value in values.items() if value.shape != shape}


@contextmanager
def _refusals(text: str, images: Sequence[str]) -> Iterator[None]:
    """Errors of a processor, told as one."""
    try:
        yield
    except Exception as error:  # processors refuse pictures with errors of many kinds
        raise InvalidRequestError(
            f"the processor refuses prompt {text[:60]!r} with {len(images)} images: {error}"
        ) from error


def _opened(image: str) -> Any:
    """The picture behind a reference."""
    if (frame := frame_of(image)) is not None:
        return video_frame(*frame)
    try:
        return load_image(image)
    except Exception as error:  # Pillow, httpx and transformers raise many kinds
        shown = f"{image[:80]}…" if image.startswith("data:") else image
        raise InvalidRequestError(
            f"image {shown!r} cannot be read ({error}); give the path or URL of a picture"
        ) from error


def _size(image: str) -> tuple[int, int]:
    """Width and height of a picture, from the beginning of its file."""
    with suppress(Exception):  # what cannot be read is reported where a row about it is made
        if (frame := frame_of(image)) is not None:
            return video_size(frame[0])
        if image.startswith("data:"):
            return load_image(image).size
        with Image.open(image) as picture:
            return picture.size
    return _SIZES[0]


def _blank(width: int = 64, height: int = 64) -> Any:
    """A picture of one colour, as an array."""
    return np.full((height, width, 3), 128, dtype=np.uint8)
