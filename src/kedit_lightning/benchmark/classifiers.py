"""Sequence classifiers of free answers, which a protocol names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kedit_lightning.errors import BaseModelNotFoundError, UnsupportedUseError
from kedit_lightning.metrics.measurement import SENTIMENT, TRAIT_SHARES, UNSAFE, Measurement
from kedit_lightning.probe_task import TRAITS, TaskName

#: Probabilities that texts are of the class that is asked for; of several classes a list each.
Classifier: TypeAlias = Callable[[Sequence[str]], Sequence[Any]]


@dataclass(frozen=True)
class TextClass:
    """A class of texts that a sequence classifier tells apart from others.

    Args:
        option: Field of the protocol that names the classifier.
        task: Task whose probes are classified.
        measurement: What the probability becomes in records.
        called: What the class is called, first of the beginnings of its label.
        scores: Metrics that need it, for warnings.
        asked_of: What is classified, for warnings.
        unnamed: Index of the class among two that have no names.
        empty: Probability of a text without content; asked for like any other when ``None``.
    """

    option: Literal["sentiment", "safety", "traits"]
    task: TaskName
    measurement: Measurement
    called: tuple[str, ...]
    scores: str
    asked_of: str
    unnamed: int | None = None
    empty: float | None = None

    @property
    def absence(self) -> str:
        """A sentence that says that no classifier was named."""
        return (
            f"{self.asked_of} of this dataset are also judged by a classifier of {self.option}, "
            f"and protocol.{self.option} names none; {self.scores}"
        )

    def index(self, name: str, labels: dict[int, str]) -> int:
        """Index of the class by its label.

        Raises:
            UnsupportedUseError: None of the labels fits, or more than one.
        """
        found = [i for i, label in labels.items() if label.lower().startswith(self.called)]
        plain = len(labels) == 2 and all(v == f"LABEL_{i}" for i, v in labels.items())
        if not found and plain and self.unnamed is not None:
            return self.unnamed
        if len(found) != 1:
            raise UnsupportedUseError(
                f"protocol.{self.option} '{name}' must have one class that is called "
                f"{' or '.join(self.called)}, and has {', '.join(labels.values())}; set id2label "
                "in its config.json"
            )
        return found[0]

    def classifier(self, named: str | Classifier, device: torch.device) -> Classifier:
        """Probabilities of this class, by a function, or a model of the hub or a folder.

        Raises:
            BaseModelNotFoundError: There is no such model.
            UnsupportedUseError: None of its classes is this one, or more than one.
        """
        if callable(named):
            return named
        labels, probabilities = sequence_classifier(self.option, named, device)
        wanted = self.wanted(named, labels)
        return lambda texts: [self.value(row, wanted) for row in probabilities(texts)]

    def wanted(self, name: str, labels: dict[int, str]) -> Sequence[int]:
        """Indices of the classes that are asked for."""
        return [self.index(name, labels)]

    def value(self, probabilities: Sequence[float], wanted: Sequence[int]) -> Any:
        """What is recorded of the probabilities of all classes."""
        return probabilities[wanted[0]]


@dataclass(frozen=True)
class TextClasses(TextClass):
    """Several classes, all of whose probabilities are recorded, in the order of ``called``."""

    def wanted(self, name: str, labels: dict[int, str]) -> Sequence[int]:
        """Indices of the classes by their labels; in their own order where none has a name."""
        plain = len(labels) == len(self.called)
        if plain and all(label == f"LABEL_{index}" for index, label in labels.items()):
            return range(len(labels))
        return [replace(self, called=(one,)).index(name, labels) for one in self.called]

    def value(self, probabilities: Sequence[float], wanted: Sequence[int]) -> Any:
        """Probabilities in the order of the classes."""
        return [probabilities[index] for index in wanted]


def sequence_classifier(
    option: str, named: str, device: torch.device
) -> tuple[dict[int, str], Callable[[Sequence[str]], list[list[float]]]]:
    """Labels of a sequence classifier, and the function that gives the probabilities of texts.

    Raises:
        BaseModelNotFoundError: There is no such model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(named)
        model: Any = AutoModelForSequenceClassification.from_pretrained(named)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        if named.startswith(("/", ".", "~")) and not Path(named).exists():
            reason = "there is no such folder"
        raise BaseModelNotFoundError(
            f"protocol.{option} '{named}' could not be loaded as a sequence classifier "
            f"({reason}); give a folder or a name on the hub that "
            "this machine can reach"
        ) from error
    model = model.to(device).eval()
    labels = {int(index): str(label) for index, label in model.config.id2label.items()}
    room = _room(tokenizer, model)

    @torch.no_grad()
    def classify(texts: Sequence[str]) -> list[list[float]]:
        found = []
        for text in texts:  # one at a time, so that no padding changes a score
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=room)
            found.append(model(**inputs.to(device)).logits[0].float().softmax(-1).tolist())
        return found

    return labels, classify


def _room(tokenizer: Any, model: Any) -> int:
    """Tokens that a classifier reads; a tokenizer that was saved without a length has no limit."""
    # RoBERTa's positions start behind the index of padding.
    taken = [
        int(module.padding_idx) + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    return min(int(tokenizer.model_max_length), int(positions) - max(taken, default=0))


#: Opinions, in the words of ``gen_sentiment``.
POSITIVE = TextClass(
    "sentiment", "opinion", SENTIMENT, ("positive", "pos"), "gen_sentiment is left out", "opinions"
)
#: Replies, of which SafeEdit's own classifier has two classes without names, the second unsafe.
UNSAFE_REPLY = TextClass(
    *("safety", "defence", UNSAFE, ("unsafe", "toxic", "harmful")),
    scores="ds, dg and ds_change are left out",
    asked_of="replies",
    unnamed=1,
    empty=0.5,
)
#: Traits that opinions show; the published classifier has no names for them.
TRAIT_CLASSES = TextClasses(
    *("traits", "trait", TRAIT_SHARES, TRAITS), "trait_acc and tpei are left out", "opinions"
)
TEXT_CLASSES = (POSITIVE, UNSAFE_REPLY, TRAIT_CLASSES)
