"""Edits of a ledger, computed again from their facts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from kedit_lightning.base_models import BaseModel
from kedit_lightning.benchmark.costs import fixed_randomness
from kedit_lightning.edits import Edit
from kedit_lightning.edits.edit_file import content_id
from kedit_lightning.errors import LedgerError
from kedit_lightning.registry import entries
from kedit_lightning.runs.ledger_lines import EditLine, LedgerBase


class Recomputation:
    """The methods of a ledger, each built once, with what it had learned.

    Args:
        base: The base model.
        methods: Methods that cannot be built from the ledger, such as those with a checkpoint.
    """

    def __init__(self, base: BaseModel, methods: Sequence[Any] = ()) -> None:
        self._base, self._methods = base, methods
        self._found: dict[str, Any] = {}

    def edit(self, line: EditLine, settings: Mapping[str, Any]) -> Edit:
        """The edit of a line, on top of the stack as it stands.

        Args:
            line: The line.
            settings: The settings that its edit was computed with.

        Raises:
            LedgerError: Its method cannot be built, or is another one now.
        """
        method = self.method(line, settings)
        with fixed_randomness(line.random.seed, line.random.name):
            edit: Edit = method.noted_edit(line.requests)
        return edit

    def method(self, line: EditLine, settings: Mapping[str, Any]) -> Any:
        """The method that computed the edit of a line, from the ledger or as it was given.

        Args:
            line: The line.
            settings: The settings that its edit was computed with.

        Raises:
            LedgerError: It cannot be built, or is another one now.
        """
        key = json.dumps([line.method, line.given, line.learned, dict(settings)], default=str)
        if key not in self._found:
            self._found[key] = self._matching(line, settings)
        return self._found[key]

    def _matching(self, line: EditLine, settings: Mapping[str, Any]) -> Any:
        for method in (*self._methods, *_built(line, self._base)):
            if method.base is not self._base or type(method).__name__ != line.method:
                continue
            method.configure_model()
            same = json.loads(json.dumps(dict(method.origin([]).settings), default=str)) == settings
            if same and learned_hash(method) == line.learned:
                return method
        raise LedgerError(
            f"line {line.number} cannot be computed again: {line.method} cannot be built from the "
            "ledger with the same settings, or had learned something else before; give the method "
            "with `methods` in Python, or keep later edits as they are"
        )


def given_settings(method: Any) -> dict[str, Any] | None:
    """The parameters a method was given, with its seed; ``None`` if they are no plain values.

    Args:
        method: The editing method.
    """
    values = {n: v for n, v in method.hparams.items() if not n.startswith("_")}
    if {*type(method).unsaved} - {"base_model"} or type(method).__name__ not in entries("method"):
        return None
    try:
        found: dict[str, Any] = json.loads(json.dumps({**values, "seed": method.settings.seed}))
    except (TypeError, ValueError):
        return None
    return found


def _built(line: EditLine, base: BaseModel) -> Iterator[Any]:
    """The method of a line, if it can be built."""
    entry = entries("method").get(line.method)
    if entry is not None and line.given is not None:
        yield entry.load()(base_model=base, **line.given)


def learned_hash(method: Any) -> str:
    """Hash of what a method has learned; empty if that is nothing.

    Args:
        method: The editing method.
    """
    module: nn.Module = method
    tensors = {name: tensor for name, tensor in module.state_dict().items() if tensor.numel()}
    return content_id("", {}, {}, tensors) if tensors else ""


def described_base(base: BaseModel, edit: Edit) -> LedgerBase:
    """What a line says about its base model, and the edit about its identity."""
    return LedgerBase(
        base.name,
        str(base.dtype).removeprefix("torch."),
        base.revision,
        edit.origin.fingerprint,
        edit.origin.full_fingerprint,
        edit.origin.tokenizer_fingerprint,
    )
