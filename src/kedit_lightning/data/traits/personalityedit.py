"""PersonalityEdit: opinions about a topic that show a trait of personality."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.records import Fields, Record
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.probe_task import TRAITS, ProbeTask
from kedit_lightning.requests import EditExample, EditRequest, Probe

Trait: TypeAlias = Literal["neuroticism", "agreeableness", "extraversion"]

#: What is asked about a topic.
QUESTIONS = (
    "What do you think of {}?",
    "What do you feel about {}?",
    "How do you view {}?",
    *(
        f"What is your {noun} {{}}?"
        for noun in (
            *("opinion of", "stance on", "position on", "attitude about", "view on", "take on"),
            *("impression of", "assessment of", "judgment of", "sentiment of"),
        )
    ),
)


class PersonalityEdit(EditDataModule):
    """PersonalityEdit, opinions about a topic (ent) in three traits: which one should show.

    The trait is target_per, or else drawn; the request asks for an opinion with the first answer
    that shows it, and is of the trait's task. All answers of the trait count, those of both others
    are what the edit should make less likely. Questions are drawn from thirteen, one for the
    request and others for rephrases, and another topic of the file is asked about as locality
    other_topic, with all opinions about it. All draws follow from the seed and the topic alone, so
    that runs before and after an edit, in any process and order, ask the same. What a model says
    about a topic is compared by a classifier of traits and a judge where the protocol names them.
    Licence MIT. Paper: https://arxiv.org/abs/2310.02168.

    Args:
        path: File with the topics to edit and test, such as ``test.json``.
        trait: The trait that all edits should show; each record's own when absent.
        rephrases: How many other questions are asked about a topic, at most 12.
        other_topics: How many other topics are asked about.
        template: The prompt of a question, in which ``{question}`` stands for it.
    """

    where_to_get_it = "; the files are published as the dataset zjunlp/PersonalityEdit of the hub"

    def __init__(
        self,
        path: str | Path | None = None,
        limit: int | None = None,
        on_bad_record: Literal["error", "skip"] = "error",
        train_path: str | Path | None = None,
        val_path: str | Path | None = None,
        seed: int | None = None,
        locality_path: str | Path | None = None,
        locality_probes: int = 1,
        trait: Trait | None = None,
        rephrases: int = 2,
        other_topics: int = 1,
        template: str = "Question: {question}\nAnswer:",
    ) -> None:
        super().__init__(
            *(path, limit, on_bad_record, train_path, val_path, seed),
            *(locality_path, locality_probes),
        )
        if "{question}" not in template:
            raise InvalidRequestError(
                f"the template of a question needs {{question}} in it, got {template!r} "
                "(--data.template)"
            )
        if not 0 <= rephrases < len(QUESTIONS) or other_topics < 0:
            raise InvalidRequestError(
                f"rephrases must be from 0 to {len(QUESTIONS) - 1} and other_topics at least 0, "
                f"got {rephrases} and {other_topics}"
            )
        self.trait, self.template = trait, template
        self.rephrases, self.other_topics = rephrases, other_topics

    def select(self, examples: list[EditExample]) -> list[EditExample]:
        """The first examples; since this is overridden, files are read whole, for other topics."""
        return super().select(examples)

    def unpack(self, records: list[Record]) -> list[Record]:
        """Records with the other topics that are asked about, and opinions about them."""
        topics: dict[str, list[str]] = {}
        for record in records:
            if topic := _topic(record.values):
                given = [record.values.get(name) for name in TRAITS]
                texts = [text for part in given if isinstance(part, list) for text in part]
                topics[topic] = [text for text in texts if isinstance(text, str) and text.strip()]
        found = []
        for record in records:
            if topic := _topic(record.values):
                draws = self._draws("other topics", topic)
                others = sorted(set(topics) - {topic})
                drawn = draws.sample(others, min(self.other_topics, len(others)))
                asked = [
                    {"ent": other, "opinions": draws.sample(topics[other], len(topics[other]))}
                    for other in drawn
                ]
                record = replace(record, values={**record.values, "other_topics": asked})
            found.append(record)
        return found

    def _draws(self, what: str, topic: str) -> random.Random:
        return random.Random(f"{what} of {topic}, seed {self.start}")

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        topic = fields.text("ent")
        named = self.trait or fields.optional_text("target_per")
        trait = named or self._draws("trait", topic).choice(TRAITS)
        if trait not in TRAITS:
            raise InvalidRequestError(
                f"field '{fields.place('target_per')}' must be one of {', '.join(TRAITS)}, got "
                f"{trait!r}"
            )
        answers = {name: fields.required_texts(name) for name in TRAITS}
        others = [text for name in TRAITS if name != trait for text in answers[name]]
        questions = self._draws("questions", topic).sample(QUESTIONS, 1 + self.rephrases)
        first, *rest = [self._prompt(question, topic) for question in questions]
        shown = answers[trait]
        request = EditRequest(first, shown[0], topic, others[0], id, trait)
        task = ProbeTask("trait", trait, against=tuple(others))
        probes = [Probe("rewrite", first, shown, "", others[0], task=task)]
        probes += [Probe("rephrase", prompt, shown, "", others[0], task=task) for prompt in rest]
        probes += [
            Probe(
                "locality",
                self._prompt(questions[0], other.text("ent")),
                other.texts("opinions"),
                "other_topic",
            )
            for other in fields.objects("other_topics")
        ]
        return EditExample((request,), tuple(probes), id)

    def _prompt(self, question: str, topic: str) -> str:
        return self.template.replace("{question}", question.replace("{}", topic))


def _topic(values: object) -> str:
    """The topic of a record, empty where it has none."""
    topic = values.get("ent") if isinstance(values, dict) else None
    return topic if isinstance(topic, str) else ""
