"""Edits that put facts into the context."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, TypedDict

from kedit_lightning.chat_turns import put_before, question_in
from kedit_lightning.edits.edit import Edit, EditableModel, Tensors, Values
from kedit_lightning.edits.effects import Effect, PromptFunction, RewritePrompt
from kedit_lightning.edits.kinds.prompt.retriever import LEXICAL, text_index
from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.edits.state_schema import check_names, check_value
from kedit_lightning.image_reference import PictureHashes

#: The pictures of a prompt without any.
NO_PICTURES = PictureHashes()


@dataclass(frozen=True)
class PromptEntry:
    """A fact, as text before a prompt.

    Args:
        key: The prompt of the fact, by which it is retrieved when there are several.
        context: The last text before the question, which follows directly.
        demonstrations: Examples before everything else, the most similar one last.
        fact: The line that states the fact, before the context; empty where the context does.
        instruction: Text before the facts.
        top_k: Number of facts that are stated where this one is the most similar to a question;
            ``None`` for all.
        retriever: ``lexical``, or a sentence-transformers model, by which the facts are retrieved.
        images: Hashes of the pictures that the fact is about; see ``image_reference``.
        features: What the model sees of them, as a vector of length 1; empty where facts are found
            by words and by the very pictures alone.
        similarity: Least cosine of these features and those of a question's pictures for the fact
            to be stated before it.
    """

    key: str
    context: str
    demonstrations: tuple[str, ...] = ()
    fact: str = ""
    instruction: str = ""
    top_k: int | None = 1
    retriever: str = LEXICAL
    images: tuple[str, ...] = ()
    features: tuple[float, ...] = ()
    similarity: float = -1.0

    @property
    def statement(self) -> str:
        """The text before a question, without demonstrations and other facts."""
        return self.instruction + self.fact + self.context


class _Entries(TypedDict):
    entries: list[PromptEntry]


class PromptEdit(Edit):
    """States facts before each prompt: of several on the stack, those most similar to it."""

    kind: ClassVar[str] = "prompt"
    rows_apart: ClassVar[bool] = False

    def __init__(
        self, base: EditableModel, entries: Sequence[PromptEntry], origin: EditOrigin | None = None
    ) -> None:
        super().__init__(base, origin)
        self.entries = tuple(entries)

    def effects(self) -> Sequence[Effect]:
        """The rewriting of prompts; all prompt edits retrieve from the same facts."""
        found = partial(retrieval, look=getattr(self.base, "picture_vector", None))
        return [RewritePrompt(self.kind, found, self.entries)]

    def state(self) -> tuple[Tensors, Values]:
        """The texts; there are no tensors."""
        entries = [asdict(entry) for entry in self.entries]
        for values in entries:
            if not values["images"]:  # earlier releases had none; their edits keep their ids
                del values["images"]
            if not values["features"]:
                del values["features"], values["similarity"]
        return {}, {"entries": entries}

    @classmethod
    def from_state(
        cls, base: EditableModel, origin: EditOrigin, tensors: Tensors, values: Values
    ) -> PromptEdit:
        """Rebuild from the texts."""
        check_value("the edit", values, _Entries)
        check_names("the edit", tensors, ())
        entries: list[dict[str, Any]] = [
            {name: tuple(v) if isinstance(v, list) else v for name, v in entry.items()}
            for entry in values["entries"]
        ]
        return cls(base, [PromptEntry(**entry) for entry in entries], origin)


def retrieval(
    contents: Sequence[Sequence[PromptEntry]],
    look: Callable[[Sequence[str]], tuple[float, ...]] | None = None,
) -> PromptFunction:
    """A function that puts the facts most similar to a prompt before it; of equals the latest.

    Nothing is more similar to a prompt than itself, not even its words in another order. Facts
    about the very pictures of a prompt, or about none where it has none, go before all others.
    Facts with features add the cosine with those of the prompt's pictures to that of words.

    Demonstrations are dropped, the least similar first, until the text leaves room for an answer,
    and then other facts; the most similar fact and the question never are.

    Args:
        contents: The facts of each edit, oldest first.
        look: What the model sees of pictures, as a vector of length 1.
    """
    entries = [entry for content in contents for entry in content]
    keys = [question_in(entry.key) for entry in entries]
    index = text_index(keys, entries[-1].retriever) if len(entries) > 1 else None

    described = any(entry.features for entry in entries)

    def rewrite(
        prompt: str, fits: Callable[[str], bool], images: PictureHashes = NO_PICTURES
    ) -> str:
        if not entries:
            return prompt
        scores = index.scores(question_in(prompt)) if index is not None else [0.0]
        seen = look(images.references) if described and look is not None and images else ()
        cosines = [_cosine(entry.features, seen) for entry in entries]
        # Rounded, since the order of words moves the last digits of a score.
        ranks = [
            (e.images == images, e.key == prompt, round(score + cosine, 9))
            for e, score, cosine in zip(entries, scores, cosines, strict=True)
        ]
        meant = [i for i, e in enumerate(entries) if not e.features or cosines[i] >= e.similarity]
        order = sorted(meant, key=lambda i: (ranks[i], i), reverse=True)
        if not order:
            return prompt
        return _longest(entries[order[0]], _beside(entries, order), prompt, fits)

    return rewrite


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """Cosine of two vectors of length 1; 0 where one is missing."""
    return sum(a * b for a, b in zip(one, other, strict=True)) if one and other else 0.0


def _beside(entries: Sequence[PromptEntry], order: Sequence[int]) -> tuple[list[str], list[str]]:
    """Facts stated before and behind the most similar one; of equal prompts the latest.

    They stand in the order of their similarity, the most similar last, or where all are stated in
    the order in which they were written.

    Args:
        entries: The facts, oldest first.
        order: Their numbers, the most similar first.
    """
    best, beside = order[0], dict[tuple[str, tuple[str, ...]], int]()
    count = entries[best].top_k
    for at in order[1:]:
        if count is not None and len(beside) + 1 >= count:
            break
        fact = entries[at].key, entries[at].images
        if entries[at].fact and fact != (entries[best].key, entries[best].images):
            beside.setdefault(fact, at)
    numbers = sorted(beside.values()) if count is None else list(beside.values())[::-1]
    before = [at for at in numbers if count is not None or at < best]
    behind = numbers[len(before) :]
    return [entries[at].fact for at in before], [entries[at].fact for at in behind]


def _longest(
    best: PromptEntry,
    beside: tuple[Sequence[str], Sequence[str]],
    prompt: str,
    fits: Callable[[str], bool],
) -> str:
    """The text with as much as fits of what may be dropped, from the front."""
    demonstrations, (before, behind) = best.demonstrations, beside
    most = len(demonstrations) + len(before) + len(behind)

    def text(dropped: int) -> str:
        facts = max(0, dropped - len(demonstrations))
        later = max(0, facts - len(before))
        parts = (*demonstrations[dropped:], best.instruction, *before[facts:], best.fact)
        return put_before("".join((*parts, *behind[later:], best.context)), prompt)

    whole = text(0)
    if fits(whole):
        return whole
    return text(min(most, bisect_left(range(most + 1), True, key=lambda n: fits(text(n)))))
