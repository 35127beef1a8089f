"""Texts of a dataset of the Hugging Face hub, as a stream."""

from __future__ import annotations

from collections.abc import Iterator

from datasets import load_dataset

from kedit_lightning.errors import DataFileError


def hub_texts(name: str, config: str | None, split: str, column: str) -> Iterator[str]:
    """The texts of a dataset in order.

    Raises:
        DataFileError: The dataset cannot be reached, or has no such column.
    """
    try:
        for row in load_dataset(name, config, split=split, streaming=True):
            text = row.get(column)
            if not isinstance(text, str):
                raise DataFileError(
                    f"dataset '{name}' has no text in column '{column}' (columns: "
                    f"{', '.join(row)}); name the right one with text_column"
                )
            yield text
    except DataFileError:
        raise
    except Exception as error:  # the library and what it is built on raise many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataFileError(
            f"dataset '{name}' cannot be read from the hub: {reason}; check hub_name, "
            "hub_config and split, or give text of your own with path"
        ) from error
