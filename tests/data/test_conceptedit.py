"""ConceptEdit: which file is read, and what is asked about a concept."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from places import SAMPLES

from kedit_lightning.data import ConceptEdit
from kedit_lightning.data.knowledge.conceptedit import DEMONSTRATIONS
from kedit_lightning.errors import DataFileError, InvalidRequestError, UnsupportedUseError

FOLDER = SAMPLES / "published"
INTER = FOLDER / "final_gpt2_inter.json"


def test_a_concept_with_its_instances() -> None:
    example = ConceptEdit(path=INTER).examples()[0]
    (request,) = example.requests
    assert request.subject == "lighthouse"
    assert request.prompt == "Definition of lighthouse: "
    assert request.target_new == "a company that carries passengers by air."
    asked = {(probe.kind, probe.group): probe for probe in reversed(example.probes)}
    assert list(asked)[::-1] == [
        ("rewrite", "rewrite"), ("rephrase", "rephrase"), ("locality", "neighborhood"),
        ("portability", "instance"),
    ]  # fmt: skip
    assert asked["locality", "neighborhood"].answers == (
        "a piece of land on which fruit trees grow.",
    )
    belongs = asked["portability", "instance"]
    assert belongs.prompt == (
        DEMONSTRATIONS + "Whether Cape Orrin Light belongs to category lighthouse?"
    )
    assert DEMONSTRATIONS.count("Yes\n") == DEMONSTRATIONS.count("No\n") == 1
    assert belongs.task is not None
    assert (belongs.task.name, belongs.task.label, belongs.task.apart) == (
        "instance", "inter", True,
    )  # fmt: skip
    assert not set(belongs.answers) & set(belongs.task.against)
    for kind in ("rewrite", "rephrase"):
        task = asked[kind, kind].task
        assert task is not None
        assert (task.name, task.apart) == ("concept", False)


def test_a_file_of_a_folder_is_chosen_by_module_and_model(tmp_path: Path) -> None:
    for name in ("gpt2_inter", "gptj_inter", "gptj_intra"):
        shutil.copy(INTER, tmp_path / f"final_{name}.json")
    data = ConceptEdit(path=tmp_path, module="intra", model="gptj")
    asked = [probe for example in data.examples() for probe in example.probes]
    (label,) = {p.task.label for p in asked if p.task and p.task.name == "instance"}
    assert label == "intra"
    assert data.source["test"]["path"].endswith("final_gptj_intra.json")
    with pytest.raises(UnsupportedUseError, match=r"choose a file.*module and model"):
        ConceptEdit(path=tmp_path, module="intra").examples()
    with pytest.raises(DataFileError, match="final_mistral_inter"):
        ConceptEdit(path=tmp_path, module="inter", model="mistral").examples()


def test_both_modules_of_the_whole_data() -> None:
    path = FOLDER / "concept_data.json"
    first, second = (ConceptEdit(path=path, module=name).examples() for name in ("inter", "intra"))
    assert [e.requests[0].subject for e in first] == ["lighthouse", "sonnet"]
    assert first[0].requests[0].target_new == "a company that carries passengers by air."
    assert second[0].requests[0].target_new == "a building in which goods are kept."
    assert {e.requests[0].target_old for e in (first[0], second[0])} == {
        "a tower with a light that guides ships."
    }
    assert first[0].requests[0].prompt == "Definition of lighthouse:"
    with pytest.raises(DataFileError, match=r"choose inter or intra"):
        ConceptEdit(path=path).examples()
    with pytest.raises(InvalidRequestError, match=r"needs \{concept\}"):
        ConceptEdit(path=path, template="What is it?")


@pytest.mark.real_data
def test_the_published_files_load_whole(shared_data: Path) -> None:
    folder = shared_data / "conceptedit"
    if not folder.is_dir():
        pytest.skip("shared/data/conceptedit is absent")
    concepts = set()
    for path in sorted(folder.glob("final_*.json")):
        data = ConceptEdit(path=path)
        examples = data.examples()
        assert data.source["test"]["skipped"] == 0
        concepts |= {example.requests[0].prompt for example in examples}
    assert len(concepts) <= 452
