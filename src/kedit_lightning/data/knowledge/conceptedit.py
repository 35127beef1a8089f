"""ConceptEdit: definitions of concepts, in the place of which another concept's is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from kedit_lightning.data.datamodule import EditDataModule, Split
from kedit_lightning.data.probe_fields import answers_of, of_task, rephrases
from kedit_lightning.data.records import Fields, Record
from kedit_lightning.errors import InvalidRequestError, UnsupportedUseError
from kedit_lightning.probe_task import ProbeTask
from kedit_lightning.requests import EditExample, EditRequest, Probe

Module: TypeAlias = Literal["inter", "intra"]
FileModel: TypeAlias = Literal["gpt2", "gptj", "llama2chat", "mistral"]

#: Before a question about an instance: one that belongs to its category, and one that does not.
DEMONSTRATIONS = (
    "Whether Lake Ladoga belongs to category lake? Yes\n"
    "Whether Lake Ladoga belongs to category airline? No\n"
)
#: Forms of both answers; a space goes before them where one belongs.
YES, NO = ("Yes", "yes"), ("No", "no")


class ConceptEdit(EditDataModule):
    """ConceptEdit, definitions of concepts, each to be replaced by that of another concept.

    The other concept is of the same superclass (intra) or of another one (inter). Read are the
    files of each model (prompt, target_new_desc, label, which is the concept and subject,
    phrase_prompt as a rephrase, locality_prompt with locality_answer as locality neighborhood, and
    instance_prompt), and concept_data.json, an object with concept_def and, in module_inter or
    module_intra, replace_def for each concept. Generated definitions are compared with the new one
    by a judge and by embeddings where the protocol names them. Each instance_prompt asks whether an
    instance belongs to the concept, as portability instance: whether the model says yes or no
    before and after the edit follows from its logits. 452 concepts, 8,767 instances. Licence MIT.
    Paper: https://arxiv.org/abs/2403.06259.

    Args:
        path: File with the records to edit and test, such as ``final_gpt2_inter.json``; or the
            folder of all of them, where module and model choose one.
        module: Whose definition is written: ``inter`` that of a concept of another superclass,
            ``intra`` of the same. Taken from the name of the file where that says it.
        model: The model whose file of a folder is read.
        demonstrations: What stands before each question about an instance.
        template: The prompt of a concept of concept_data.json, in which ``{concept}`` stands for
            it.
    """

    where_to_get_it = "; the files are published as the dataset zjunlp/ConceptEdit of the hub"

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
        module: Module | None = None,
        model: FileModel | None = None,
        demonstrations: str = DEMONSTRATIONS,
        template: str = "Definition of {concept}:",
    ) -> None:
        super().__init__(
            *(path, limit, on_bad_record, train_path, val_path, seed),
            *(locality_path, locality_probes),
        )
        if "{concept}" not in template:
            raise InvalidRequestError(
                f"the template of a concept needs {{concept}} in it, got {template!r} "
                "(--data.template)"
            )
        self.module, self.model = module, model
        self.demonstrations, self.template = demonstrations, template
        self._read_module: Module | None = module

    def split_path(self, split: Split) -> Path | None:
        """The file of a split; of a folder the one that module and model name."""
        path = super().split_path(split)
        if path is None:
            return None
        if path.is_dir():
            if self.module is None or self.model is None:
                raise UnsupportedUseError(
                    f"'{path}' is a folder: choose a file of it with module and model "
                    "(--data.module inter --data.model gpt2), or name the file"
                )
            return path / f"final_{self.model}_{self.module}.json"
        named = [name for name in get_args(Module) if path.stem.endswith(f"_{name}")]
        self._read_module = self.module or (named[0] if named else None)
        return path

    def unpack(self, records: list[Record]) -> list[Record]:
        """The concepts of concept_data.json, which is an object of them."""
        if len(records) != 1 or not isinstance(whole := records[0].values, dict):
            return records
        if not whole or not all(isinstance(v, dict) and "concept_def" in v for v in whole.values()):
            return records
        return [
            Record(f"{records[0].where} {name}", {"label": name, **values})
            for name, values in whole.items()
        ]

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        concept = fields.text("label")
        if "concept_def" in fields:
            prompt, old = self.template.replace("{concept}", concept), fields.text("concept_def")
            target = fields.fields(f"module_{self._required_module()}").text("replace_def")
        else:
            prompt, target, old = fields.text("prompt"), fields.text("target_new_desc"), None
        subject = self.subject_of(prompt, concept, id)
        request = EditRequest(prompt, target, subject, old, id)
        example = EditExample.from_request(
            request, id, rephrases(request, fields.texts("phrase_prompt"))
        )
        probes = of_task(ProbeTask("concept"), example.probes)
        if "locality_prompt" in fields:
            answers = answers_of(fields, "locality_answer")
            probes.append(
                Probe("locality", fields.text("locality_prompt"), answers, "neighborhood")
            )
        belongs = ProbeTask("instance", self._read_module or "", against=NO, apart=True)
        probes += [
            Probe("portability", self.demonstrations + question, YES, "instance", task=belongs)
            for question in fields.texts("instance_prompt")
        ]
        return replace(example, probes=tuple(probes))

    def _required_module(self) -> Module:
        if self.module is None:
            raise InvalidRequestError(
                "a concept has a new definition for each module; choose inter or intra "
                "(--data.module)"
            )
        return self.module
