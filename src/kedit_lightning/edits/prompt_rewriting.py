"""Rewriting of a prompt by several edits, within the window of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kedit_lightning.edits.effects import PromptFunction
from kedit_lightning.image_reference import PictureHashes


def rewritten(
    prompt: str,
    rewrites: Sequence[PromptFunction],
    room: Callable[[str], int],
    images: Sequence[str] = (),
) -> str:
    """The prompt after all rewrites, each of which drops what it can spare where room is short.

    A later edit may need room for its fact that demonstrations of an earlier one have taken: then
    all is rewritten again with as much left free, until it fits or nothing more can be dropped.

    Args:
        prompt: The text.
        rewrites: Functions of the edits, oldest first.
        room: Tokens that are left behind a text and its answer; below 0 it is too long.
        images: References to the pictures that the prompt is about.
    """

    def leaves(spare: int) -> Callable[[str], bool]:
        return lambda text: room(text) >= spare

    seen = (PictureHashes.of(images),) if images else ()
    text, spare = prompt, 0
    while rewrites:
        text, left = prompt, list[int]()
        for rewrite in rewrites:
            text = rewrite(text, leaves(spare), *seen)
            left.append(room(text))
        over = -left.pop()
        fuller = [rest for rest in left if rest >= spare]
        if over <= 0 or not fuller:
            break
        spare = min(fuller) + over
    return text
