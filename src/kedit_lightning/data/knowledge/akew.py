"""One fact, written from a triple, a passage, or the triples of a passage: AKEW."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.probe_fields import (
    answers_of,
    differing,
    filled,
    neighbours,
    rephrases,
)
from kedit_lightning.data.records import Fields
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.probe_task import ProbeTask
from kedit_lightning.requests import EditExample, EditRequest, Probe

Form: TypeAlias = Literal["structured", "unstructured", "triplets"]


class AKEW(EditDataModule):
    """AKEW, facts of CounterFact, MQuAKE-CF and WikiUpdate in structured and unstructured form.

    form says what is written: structured, the prompt and target_new of requested_rewrite;
    unstructured, the passage fact_new_uns as the answer to the question; triplets, each item of
    unsfact_triplets_GPT. Whatever was written is asked for by the rewrite probes of the structured
    fact; the question becomes a rephrase probe of it, and in unstructured form asks for the passage
    too (rewrite passage: BLEU, ROUGE, embeddings). paraphrase_prompts become rephrase probes,
    neighborhood_prompts locality neighborhood, loc with loc_ans locality nq, questions with
    new_answer portability multi_hop. About a thousand records each. The licence is that of its
    repository. Paper: https://arxiv.org/abs/2402.18909.

    Args:
        path: File with the records to edit and test, such as ``CounterFact.json``.
        form: What is written.
    """

    id_field = "case_id"
    where_to_get_it = "; the files are published in the repository bobxwu/AKEW"

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
        form: Form = "structured",
    ) -> None:
        super().__init__(
            *(path, limit, on_bad_record, train_path, val_path, seed),
            *(locality_path, locality_probes),
        )
        self.form = form

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        several = isinstance(fields.values.get("requested_rewrite"), list)
        rewrites = (
            fields.objects("requested_rewrite") if several else [fields.fields("requested_rewrite")]
        )
        if not rewrites:
            raise InvalidRequestError("field 'requested_rewrite' must hold at least one edit")
        requests: list[EditRequest] = []
        probes: list[Probe] = []
        for index, rewrite in enumerate(rewrites):
            name = f"{id}-{index}" if len(rewrites) > 1 else id
            fact = _fact(rewrite, name)
            requests += self._written(rewrite, fact)
            probes += EditExample.from_request(fact, id).probes
            probes += rephrases(fact, rewrite.texts("question"))
            if self.form == "unstructured":
                probes += _passage(requests[-1])
        first = requests[0] if self.form == "structured" else _fact(rewrites[0], id)
        probes += rephrases(first, fields.texts("paraphrase_prompts"))
        if first.target_old is not None:
            around = fields.texts("neighborhood_prompts")
            probes += neighbours(around, first.target_old, first.target_new)
        if "loc" in fields:
            kept = answers_of(fields, "loc_ans")
            probes.append(Probe("locality", fields.text("loc"), kept, "nq"))
        final = (*answers_of(fields, "new_answer"), *answers_of(fields, "new_answer_alias"))
        if final:
            asked = fields.texts("questions")
            probes += [Probe("portability", text, final, "multi_hop") for text in asked]
        return EditExample(tuple(requests), tuple(probes), id)

    def _written(self, rewrite: Fields, fact: EditRequest) -> list[EditRequest]:
        if self.form == "structured":
            return [fact]
        if self.form == "unstructured":
            question = rewrite.optional_text("question") or fact.prompt
            passage = rewrite.text("fact_new_uns")
            return [EditRequest(question, passage, None, None, fact.id, fact.task)]
        items = rewrite.objects("unsfact_triplets_GPT")
        if not items:
            raise InvalidRequestError(
                f"field '{rewrite.place('unsfact_triplets_GPT')}' must hold at least one triple"
            )
        return [
            EditRequest(
                filled(item.text("prompt"), item.text("subject"), item.place("prompt")),
                item.text("target"),
                item.text("subject"),
                None,
                f"{fact.id}-{index}",
            )
            for index, item in enumerate(items)
        ]


def _passage(written: EditRequest) -> list[Probe]:
    """The question that a passage answers, of which its own metrics judge the answer."""
    task = ProbeTask("passage", apart=True)
    asked = Probe("rewrite", written.prompt, (written.target_new,), "passage", task=task)
    return [asked]


def _fact(rewrite: Fields, id: str) -> EditRequest:
    """The structured fact; a full prompt is preferred to the template with braces."""
    subject = rewrite.text("subject")
    new = rewrite.fields("target_new").text("str") if "target_new" in rewrite else None
    new = new or rewrite.text("answer_new")
    old = rewrite.fields("target_true").text("str") if "target_true" in rewrite else None
    old = old or rewrite.optional_text("answer_true")
    prompt = rewrite.optional_text("prompt_full")
    if prompt is None:
        prompt = filled(rewrite.text("prompt"), subject, rewrite.place("prompt"))
    return EditRequest(prompt, new, subject, differing(old, new), id)
