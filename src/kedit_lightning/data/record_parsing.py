"""From the records of a file to examples, with every complaint about them collected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

from kedit_lightning.data.complaints import Complaint
from kedit_lightning.data.field_names import misspelt
from kedit_lightning.data.records import Fields, Record
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.requests import EditExample


class SkipRecord(Exception):  # noqa: N818 - not an error: the format allows such records
    """Raised by ``EditDataModule.parse`` for a record that states no edit in its format."""


class RecordFormat(Protocol):
    """The part of a dataset that says how one record is read."""

    id_field: ClassVar[str | None]
    known_fields: ClassVar[frozenset[str] | None]

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record."""


class Parsed(NamedTuple):
    """What has become of the records of a file."""

    examples: list[EditExample]
    bad: list[Complaint]
    skipped: list[Complaint]
    #: Where the record of each example stands, by the example's id.
    places: dict[str, str]


def parsed(dataset: RecordFormat, records: Sequence[Record]) -> Parsed:
    """Examples, complaints about bad and skipped records, and where each example stands."""
    found = Parsed([], [], [], {})
    own_ids = [_own_id(record, dataset.id_field) for record in records]
    taken = set(own_ids)
    for index, (record, own) in enumerate(zip(records, own_ids, strict=True)):
        if record.problem is not None:
            found.bad.append(Complaint(record.where, record.problem))
            continue
        place = record.where if own is None else f"{record.where} ({dataset.id_field} {own!r})"
        # Records without an id are named by position, unless another record has that id.
        id = own or (f"record-{index}" if str(index) in taken else str(index))
        try:
            fields = Fields(record.values)
            _check_id(fields, dataset.id_field)
            _refuse_misspelt(fields, dataset.known_fields)
            example = dataset.parse(fields, id)
            if id in found.places:
                raise InvalidRequestError(
                    f"field '{dataset.id_field}' is the same as in {found.places[id]}; "
                    "records need different names"
                )
        except InvalidRequestError as error:
            # The clause names the record already; the request's name would repeat it.
            found.bad.append(Complaint(place, str(error).removeprefix(f"request {id!r}: ")))
        except SkipRecord as reason:
            found.skipped.append(Complaint(place, str(reason)))
        else:
            found.places[id] = place
            found.examples.append(example)
    return found


def _own_id(record: Record, field: str | None) -> str | None:
    values = record.values
    own = values.get(field) if isinstance(values, dict) and field else None
    return str(own).strip() or None if isinstance(own, str | int) else None


def _check_id(fields: Fields, field: str | None) -> None:
    own = fields.values.get(field) if field else None
    if own is None or (isinstance(own, int) and not isinstance(own, bool)):
        return
    if not isinstance(own, str) or not own.strip():
        raise InvalidRequestError(
            f"field '{field}' must be text or a whole number, or absent, got {own!r}"
        )


def _refuse_misspelt(fields: Fields, known: frozenset[str] | None) -> None:
    for name in fields.values.keys() - (known or fields.values.keys()):
        close = misspelt(str(name), known or ())
        if close and abs(len(name) - len(close)) <= 1:
            raise InvalidRequestError(f"field '{name}' is not known; was '{close}' meant?")
