"""The six sets of KnowEdit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.probe_fields import (
    answers_of,
    differing,
    grouped_probes,
    of_task,
    rephrases,
)
from kedit_lightning.data.records import Fields, Record
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.probe_task import ProbeTask
from kedit_lightning.requests import EditExample, EditRequest, Probe

Subset: TypeAlias = Literal[
    "wiki_recent", "zsre", "wikibio", "wiki_counterfact", "convsent", "sanitation"
]
Sentiment: TypeAlias = Literal["positive", "negative"]

#: Questions about a topic, the first to edit and the others to rephrase it.
_OPINIONS = ("What do you think of {}?", "How do you feel about {}?", "What is your view of {}?")


class KnowEdit(EditDataModule):
    """KnowEdit, six sets of edits: facts, biographies, opinions, and answers to forget.

    Facts (wiki_recent, zsre, wiki_counterfact) have locality and portability probes in the groups
    that their files name (Relation_Specificity, Forgetfulness; Subject_Aliasing, Reasoning,
    Logical_Generalization). Each answer there is a text, or a list with all aliases of each right
    answer; all of them count. A probe without answer is left out of portability, and asks in
    locality whether the base model's own answer stays. rephrase_prompt and generate_prompt become
    rephrase probes. wikibio continues a biography (text, labels, concept). convsent asks for an
    opinion about ent and writes the first sentence of the wished sentiment; all sentences of it
    count as answers, and the next record's ent is asked about as locality other_topic. sanitation
    writes the answer of success (or K_F) items, and deals the questions of locality (or K_R) out to
    them in turn as group retained. A subject that its prompt lacks is dropped, and counted in a
    warning. Sizes (train, test): wiki_recent 570, 1,266; zsre 10,000, 1,304; wiki_counterfact
    1,428, 885; wikibio 464, 306; convsent 14,390, 800; sanitation 80, 80. Licence MIT. Paper:
    https://arxiv.org/abs/2401.01286.

    Args:
        path: File with the records to edit and test, such as ``recent_test.json``.
        subset: Which set the files belong to; found by the fields of each record when absent.
        sentiment: The opinion that convsent writes.
        train_path: File with the records that ``fit`` learns from.
    """

    where_to_get_it = "; the files are published as the dataset zjunlp/KnowEdit of the hub"

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
        subset: Subset | None = None,
        sentiment: Sentiment = "positive",
    ) -> None:
        super().__init__(
            *(path, limit, on_bad_record, train_path, val_path, seed),
            *(locality_path, locality_probes),
        )
        self.subset = subset
        self.sentiment = sentiment

    def unpack(self, records: list[Record]) -> list[Record]:
        """Items of sanitation with questions to retain, and opinions with another topic to ask for.

        The questions to retain are dealt out in turn; the other topic is that of the next record.
        """
        values = [record.values for record in records]
        if len(values) > 1 and all(
            isinstance(v, dict) and {"ent", "pos"} <= v.keys() for v in values
        ):
            others = [*values[1:], values[0]]
            return [
                replace(record, values={**record.values, "other_topic": other["ent"]})
                for record, other in zip(records, others, strict=True)
            ]
        if len(records) != 1 or not isinstance(whole := records[0].values, dict):
            return records
        keys = ("success", "locality") if "success" in whole else ("K_F", "K_R")
        edits, kept = (whole.get(key) for key in keys)
        if not isinstance(edits, list) or not isinstance(kept, list):
            return records
        return [
            Record(
                f"{records[0].where} {keys[0]}[{i}]",
                {**item, "retained": kept[i :: len(edits)]} if isinstance(item, dict) else item,
            )
            for i, item in enumerate(edits)
        ]

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        subset = self.subset or _subset_of(fields.values)
        if subset == "convsent":
            return self._opinion(fields, id)
        if subset == "sanitation":
            return self._answer_to_forget(fields, id)
        return self._fact(fields, id, *_FACTS[subset == "wikibio"])

    def _fact(self, fields: Fields, id: str, prompt: str, new: str, subject: str) -> EditExample:
        old = next(iter(answers_of(fields, "ground_truth")), None)
        text, target = fields.text(prompt), fields.text(new)
        subject_found = self.subject_of(text, fields.optional_text(subject), id)
        request = EditRequest(text, target, subject_found, differing(old, target), id)
        wordings = [*fields.texts("rephrase_prompt"), *answers_of(fields, "generate_prompt")]
        probes = rephrases(request, wordings)
        probes += grouped_probes(fields, "locality") + grouped_probes(fields, "portability")
        return EditExample.from_request(request, id, probes)

    def _opinion(self, fields: Fields, id: str) -> EditExample:
        wished, other = ("pos", "neg") if self.sentiment == "positive" else ("neg", "pos")
        subject = fields.text("ent")
        answers, others = fields.required_texts(wished), fields.required_texts(other)
        prompts = [question.replace("{}", subject) for question in _OPINIONS]
        request = EditRequest(prompts[0], answers[0], subject, others[0], id)
        task = ProbeTask("opinion", self.sentiment, against=tuple(others))
        probes = [Probe("rewrite", prompts[0], answers, "", others[0], task=task)]
        probes += [Probe("rephrase", p, answers, "", others[0], task=task) for p in prompts[1:]]
        if (topic := fields.optional_text("other_topic")) not in (None, subject):
            asked = prompts[0].replace(subject, str(topic))
            probes.append(Probe("locality", asked, (), "other_topic"))
        return EditExample((request,), tuple(probes), id)

    def _answer_to_forget(self, fields: Fields, id: str) -> EditExample:
        prompt, target = fields.text("question"), fields.text("target_new")
        forbidden = answers_of(fields, "ground_truth")
        old = differing(next(iter(forbidden), None), target)
        subject = self.subject_of(prompt, fields.optional_text("subject"), id)
        request = EditRequest(prompt, target, subject, old, id)
        asked = EditExample.from_request(request, id).probes
        probes = of_task(ProbeTask("forget", against=forbidden), asked)
        kept = [
            Probe("locality", item.text("question"), answers_of(item, "ground_truth"), "retained")
            for item in fields.objects("retained")
        ]
        probes += of_task(ProbeTask("retain"), kept)
        return EditExample((request,), tuple(probes), id)


#: Names of the prompt, the new answer and the subject in facts, and in biographies.
_FACTS = (("prompt", "target_new", "subject"), ("text", "labels", "concept"))


def _subset_of(values: Any) -> Subset:
    if "ent" in values and "pos" in values:
        return "convsent"
    if "retained" in values or "question" in values:
        return "sanitation"
    if "labels" in values or "concept" in values:
        return "wikibio"
    if "prompt" in values or "target_new" in values:
        return "wiki_counterfact"
    names = ", ".join(map(str, values)) or "none"
    raise InvalidRequestError(
        f"the record is of none of KnowEdit's six sets (fields here: {names}); name the set with "
        "subset"
    )
