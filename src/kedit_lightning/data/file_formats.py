"""Formats of the field's published files, recognised by the fields of their records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kedit_lightning.data.field_names import ours
from kedit_lightning.errors import article_list

#: Records by which a file is recognised.
_READ = 50


@dataclass(frozen=True)
class FileFormat:
    """How the records of a published format look.

    Args:
        name: What its authors call it.
        fields: Fields that its records have and those of formats below it lack; the parts of a
            path are joined by dots, and of a list the first item counts.
        dataset: The dataset that reads it, where there is one.
        renamed: Whether records of ``Requests`` come of giving fields other names.
        note: What else there is to know for who makes such records of it.
    """

    name: str
    fields: tuple[str, ...]
    dataset: str | None = None
    renamed: bool = True
    note: str = ""


def _read(dataset: str, name: str, *fields: str) -> FileFormat:
    return FileFormat(name, fields, dataset)


def _renamed(name: str, *fields: str, note: str = "") -> FileFormat:
    return FileFormat(name, fields, note=note)


def _foreign(name: str, *fields: str, note: str = "it states no facts to write") -> FileFormat:
    return FileFormat(name, fields, None, False, note)


#: The most telling first.
FORMATS = (
    _read("NanoFacts", "NanoFacts", "requested_rewrite", "other_relation"),
    _read("NanoFacts", "NanoFacts", "requested_rewrite", "one_hop"),
    _read("AKEW", "AKEW", "requested_rewrite.fact_new_uns"),
    _read("MQuAKE", "MQuAKE", "requested_rewrite", "questions", "new_answer"),
    _read("CounterFact", "CounterFact", "requested_rewrite.subject"),
    _read("CounterFact", "CounterFact", "prompt", "target_new", "locality_prompt"),
    _read("CounterFact", "CounterFact", "prompt", "target_new", "rephrase_prompt", "case_id"),
    _read("ADSEdit", "ADS-Edit", "image_type", "m_loc"),
    _read("EVQA", "E-VQA or E-IC (MMEdit)", "m_loc"),
    _read("ComprehendEdit", "ComprehendEdit", "multimodal_locality_prompt"),
    _read("LEME", "LEME", "coupled_prompts_and_properties"),
    _read("ZsRE", "zsRE", "src", "alt"),
    *(
        _read("KnowEdit", "KnowEdit", group)
        for group in (
            *("locality.Relation_Specificity", "locality.Forgetfulness", "portability.Reasoning"),
            *("portability.Subject_Aliasing", "portability.Logical_Generalization"),
        )
    ),
    _read("KnowEdit", "KnowEdit (WikiBio)", "text", "labels", "concept"),
    _read("KnowEdit", "KnowEdit (ConvSent)", "ent", "pos", "neg"),
    _read("KnowEdit", "KnowEdit (Sanitation)", "K_F"),
    _read("KnowEdit", "KnowEdit (Sanitation)", "success"),
    _read("PersonalityEdit", "PersonalityEdit", "ent", "extraversion"),
    _read("QAEdit", "QAEdit", "prompt", "target", "rephrase"),
    _read("CKnowEdit", "CKnowEdit", "prompt", "target_new", "target_old", "rephrase"),
    _read("WikiBigEdit", "WikiBigEdit", "update", "ans"),
    _read("HalluEditBench", "HalluEditBench", "relation", "object", "question"),
    _renamed("InstructEdit", "type", "prompt", "target_new"),
    _read("SafeEdit", "SafeEdit", "adversarial prompt"),
    _read("ConceptEdit", "ConceptEdit", "target_new_desc"),
    _read("RippleEdits", "RippleEdits", "edit.prompt", "example_type"),
    _read("UnKE", "UnKE", "question", "para_question", "answer"),
    _read("KnownFacts", "known_1000 (causal tracing)", "attribute", "template", "prediction"),
    _foreign("relations (LRE)", "prompt_templates", "samples",
             note="its facts are the items of samples, put into a template"),
    _renamed("ParaRel", "sub_label", "obj_label", note="its prompts are in files of patterns"),
    _foreign("ParaRel (patterns)", "pattern", "lemma"),
    _foreign("PIQA", "goal", "sol1", "sol2",
             note="it states no facts to write; locality_path takes it"),
    _renamed("Alpaca", "instruction", "output"),
    _renamed("NQ-open", "question", "answer"),
)  # fmt: skip


_READERS = {"Requests", *(one.dataset for one in FORMATS)}


def recognised(records: Iterable[Any]) -> FileFormat | None:
    """The format that most of the first records have, if any."""
    found: Counter[str] = Counter()
    formats: dict[str, FileFormat] = {}
    for _, values in zip(range(_READ), records, strict=False):
        one = next((f for f in FORMATS if all(_has(values, path) for path in f.fields)), None)
        if one is not None:
            found[one.name] += 1
            formats.setdefault(one.name, one)
    return formats[found.most_common(1)[0][0]] if found else None


def advice(records: list[Any], reader: str) -> str:
    """What to do about a file that is in the format of another dataset than its reader, if it is.

    Args:
        records: Its records, as JSON parses them.
        reader: Class name of the dataset that was to read it.
    """
    known = recognised(records)
    if known is None or known.dataset == reader or reader not in _READERS:
        return ""  # a dataset of another package knows its format best
    if known.dataset is not None:
        return (
            f"it is in the format of {known.name}, which the dataset {known.dataset} reads: "
            f"--data {known.dataset} in place of {reader}"
        )
    text = f"it is in the format of {known.name}, which no dataset here reads"
    rows = [values for values in records[:_READ] if isinstance(values, Mapping)]
    names = dict.fromkeys(str(name) for row in rows for name in row) if known.renamed else {}
    pairs = [f"{name} is {field}" for name in names if (field := ours(name)) not in (None, name)]
    if pairs:
        text += f"; in records for Requests, its {article_list(pairs)}"
    return f"{text}; {known.note}" if known.note else text


def _has(values: Any, path: str) -> bool:
    for name in path.split("."):
        if isinstance(values, list):
            values = values[0] if values else None
        if not isinstance(values, Mapping) or values.get(name) is None:
            return False
        values = values[name]
    return True
