"""The user's own facts, from a file or from the command line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from kedit_lightning.data.datamodule import EditDataModule, Split
from kedit_lightning.data.picture_files import located, picture
from kedit_lightning.data.records import Fields
from kedit_lightning.data.splits import LoadedSplit
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.image_reference import Image
from kedit_lightning.requests import EditExample, EditRequest, Probe


class Requests(EditDataModule):
    """Your own facts: a JSON, JSON Lines or CSV file, or one fact given as ``prompt``.

    Files in other formats of the field are recognised, and the dataset that reads them is named.

    Args:
        path: File with facts. A record has the fields prompt and target_new, and may have subject,
            target_old, id, task, rephrases (a list of texts), locality and portability. The last
            two map the name of a group to a list of probes, each with prompt and answers (a text
            or a list of texts; locality needs none), as in
            {"near": [{"prompt": "The capital of Italy is", "answers": ["Rome"]}]}. A constraint, a
            question (prompt) with the answer that should stay, is for methods that train on it,
            such as DINM. For a
            vision-language model a record and a probe may have an image, the path or URL of a
            picture, or a list of several, and a record image_rephrases, other pictures of the same
            thing; paths are relative to the file. In place of
            prompt there may be messages, a list of objects with role and content, which go into
            the chat template; a rephrase may be such a list, too. In a CSV file rephrases are
            separated by |, and there is no locality or portability.
        prompt: Text of a single fact, ending where the answer begins; instead of ``path``.
        subject: The part of ``prompt`` that the single fact is about.
        target_new: The answer that the single fact shall have.
        target_old: The answer that the single fact had before.
        task: Name of the kind of fact that the single fact is.
        image: Path or URL of the picture that the single fact is about.
        num_workers: Processes that open the pictures of records ahead of their use.
    """

    id_field = "id"
    known_fields = frozenset(
        {"prompt", "messages", "target_new", "subject", "target_old", "id", "task", "image"}
        | {"rephrases", "image_rephrases", "locality", "portability", "constraint"}
    )
    where_to_get_it = ", or give one fact with prompt, subject and target_new"

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
        prompt: str | None = None,
        subject: str | None = None,
        target_new: str | None = None,
        target_old: str | None = None,
        task: str | None = None,
        image: str | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            *(path, limit, on_bad_record, train_path, val_path, seed),
            *(locality_path, locality_probes, num_workers),
        )
        self.prompt = prompt
        self.subject = subject
        self.target_new = target_new
        self.target_old = target_old
        self.task = task
        self.image = image

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record; see the class for its fields."""
        request = EditRequest(
            prompt=fields.prompt(),
            target_new=fields.text("target_new"),
            subject=fields.optional_text("subject"),
            target_old=fields.optional_text("target_old"),
            id=id,
            task=fields.optional_text("task"),
            image=picture(fields, "image", self.folder),
            **self._constraint(fields),
        )
        answer, old = (request.target_new,), request.target_old
        probes = [
            Probe("rephrase", text, answer, "", old, request.image)
            for text in self._rephrases(fields)
        ]
        places = located(fields.texts("image_rephrases"), self.folder, "field 'image_rephrases'")
        probes += [
            Probe("rephrase", request.prompt, answer, "image", old, image) for image in places
        ]
        for group, item in fields.groups("locality"):
            image, answers = self._seen(item), tuple(item.texts("answers"))
            probes.append(Probe("locality", item.prompt(), answers, group, image=image))
        for group, item in fields.groups("portability"):
            image, answers = self._seen(item), tuple(item.required_texts("answers"))
            probes.append(Probe("portability", item.prompt(), answers, group, image=image))
        return EditExample.from_request(request, id, probes)

    def _seen(self, item: Fields) -> Image | None:
        """The picture of a probe, all of whose fields are known."""
        item.refuse_others("prompt", "messages", "answers", "image")
        return picture(item, "image", self.folder)

    @staticmethod
    def _constraint(fields: Fields) -> dict[str, str]:
        if "constraint" not in fields:
            return {}
        item = fields.fields("constraint")
        item.refuse_others("prompt", "answer")
        return {f"constraint_{name}": item.text(name) for name in ("prompt", "answer")}

    @staticmethod
    def _rephrases(fields: Fields) -> list[str]:
        value = fields.values.get("rephrases")
        if isinstance(value, str) and "|" in value:
            return [text.strip() for text in value.split("|") if text.strip()]
        return fields.prompts("rephrases")

    def _read(self, split: Split) -> LoadedSplit:
        fact = {
            name: value
            for name in ("prompt", "subject", "target_new", "target_old", "task", "image")
            if (value := getattr(self, name)) is not None
        }
        if not fact or split != "test":
            return super()._read(split)
        given = ", ".join(fact)
        if self.path is not None:
            raise UnsupportedUseError(
                f"Requests was given both a file (path: {self.path}) and a single fact ({given}); "
                "leave out one of them"
            )
        for name in ("prompt", "target_new"):
            if name not in fact:
                raise UnsupportedUseError(
                    f"the single fact has no {name} (given: {given}); add --data.{name}"
                )
        if self.image is not None:
            (fact["image"],) = located([self.image], None, "--data.image")
        example = EditExample.from_request(EditRequest(**fact, id="0"), "0")
        digest = hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).hexdigest()
        return LoadedSplit([example], None, digest)
