"""RippleEdits: what follows from an edit."""

from __future__ import annotations

from itertools import takewhile
from typing import Literal

from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.data.probe_fields import answers_of, differing
from kedit_lightning.data.records import Fields
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.probe_task import ProbeTask
from kedit_lightning.requests import EditExample, EditRequest, Probe, ProbeKind

#: Kind of probe of each of the six criteria.
_CRITERIA: dict[str, ProbeKind] = {
    "Logical_Generalization": "portability",
    "Compositionality_I": "portability",
    "Compositionality_II": "portability",
    "Subject_Aliasing": "portability",
    "Relation_Specificity": "locality",
    "Forgetfulness": "locality",
}
#: How the questions of a test count together.
_TOGETHER: dict[str, Literal["any", "all"]] = {"OR": "any", "AND": "all"}


class RippleEdits(EditDataModule):
    """RippleEdits, six criteria of what an edit must change and what it must keep.

    edit.prompt is a whole statement ("The name of the country of citizenship of X is Y."). It is
    cut where edit.original_fact.prompt begins to differ, or without one behind the last " is ";
    what follows is the new answer, and the old one comes of the original fact. Test queries become
    probes in groups named like the criteria: portability Logical_Generalization,
    Compositionality_I, Compositionality_II and Subject_Aliasing, locality Relation_Specificity and
    Forgetfulness; every value and alias of their answers counts. Queries without answer are left
    out. Each is also judged as a test (gen_test): any or all of its queries (test_condition) must
    be answered, and it counts only where the base model answers its condition_queries. Subjects are
    Wikidata ids in the published files, so requests have one only where a record names it as
    subject. About 5,000 edits in the files recent, random and popular. The licence is that of its
    repository. Paper: https://arxiv.org/abs/2307.12976.

    Args:
        path: File with the records to edit and test, such as ``popular.json``.
    """

    where_to_get_it = "; the files are published in the repository edenbiran/RippleEdits"

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        edit = fields.fields("edit")
        original = edit.fields("original_fact").text("prompt") if "original_fact" in edit else None
        prompt, new = split_statement(edit.text("prompt"), original)
        old = original[len(prompt) :].strip(" .") if original is not None else None
        subject = self.subject_of(prompt, edit.optional_text("subject"), id)
        task = edit.optional_text("relation")
        request = EditRequest(prompt, new, subject, differing(old or None, new), id, task)
        probes: list[Probe] = []
        for criterion, kind in _CRITERIA.items():
            for number, test in enumerate(fields.objects(criterion)):
                probes += _test(test, kind, criterion, number)
        return EditExample.from_request(request, id, probes)


def split_statement(statement: str, original: str | None = None) -> tuple[str, str]:
    """A prompt and its answer from a statement, with the help of the statement it replaces.

    >>> split_statement("The capital of France is Lyon.", "The capital of France is Paris.")
    ('The capital of France is', 'Lyon')

    Raises:
        InvalidRequestError: No answer stands where the statement would be cut.
    """
    if original is None:
        prompt, found, answer = statement.rpartition(" is ")
        prompt = f"{prompt} is" if found else ""
    else:
        pairs = zip(statement, original, strict=False)
        shared = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        prompt = shared[: shared.rfind(" ") + 1].rstrip()
        answer = statement[len(prompt) :]
    answer = answer.strip().removesuffix(".").strip()
    if not prompt or not answer:
        raise InvalidRequestError(
            f"field 'edit.prompt' must be a statement that ends in its answer, got {statement!r}"
        )
    return prompt, answer


def _test(test: Fields, kind: ProbeKind, group: str, number: int) -> list[Probe]:
    """The questions of a test, and the conditions under which it counts."""
    rule = test.optional_text("test_condition") or "OR"
    if rule not in _TOGETHER:
        raise InvalidRequestError(
            f"field '{test.place('test_condition')}' must be OR or AND, got {rule!r}"
        )
    task = ProbeTask("ripple", f"{group} {number}", _TOGETHER[rule])
    asked = [_query(query, kind, group, task) for query in test.objects("test_queries")]
    if not any(asked):
        return []
    known = ProbeTask("ripple", task.label, condition=True)
    # Conditions are judged on the base model alone, and learned from by no method.
    needed = [_query(q, "portability", group, known) for q in test.objects("condition_queries")]
    return [one for one in (*asked, *needed) if one is not None]


def _query(query: Fields, kind: ProbeKind, group: str, task: ProbeTask) -> Probe | None:
    answers: dict[str, None] = {}
    for answer in query.objects("answers"):
        answers |= dict.fromkeys((*answers_of(answer, "value"), *answers_of(answer, "aliases")))
    text = query.text("prompt")
    return Probe(kind, text, tuple(answers), group, task=task) if answers else None
