"""A config from an ``hparams`` file of EasyEdit, with what became of each of its keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import yaml

from kedit_lightning.cli.easyedit.key_rules import Hparams, number
from kedit_lightning.cli.easyedit.method_keys import Converted, converted
from kedit_lightning.cli.messages import UsageError
from kedit_lightning.data.field_names import misspelt
from kedit_lightning.errors import article_list

#: First parts of settings that are no settings of the method.
_OF_THE_RUN = ("trainer", "seed_everything")
_WIDTH = 100
_INDENT: dict[str, Any] = {
    "initial_indent": "  ",
    "subsequent_indent": "    ",
    "break_long_words": False,
    "break_on_hyphens": False,
}


@dataclass(frozen=True)
class HparamsConversion:
    """What a file becomes.

    Args:
        method: The method here.
        settings: Settings by name, as in :class:`~.key_rules.Reading`.
        differs: Keys on whose account the edit is another one, with the reason.
        own: Settings that no key has, with the reason.
        remarks: Keys that are settings, with what else there is to know of them.
        unused: Keys without a setting, with the reason.
        unknown: Keys that the method's files do not have.
    """

    method: Converted
    settings: Mapping[str, Any]
    differs: Mapping[str, str]
    own: Mapping[str, str]
    remarks: Mapping[str, str]
    unused: Mapping[str, str]
    unknown: tuple[str, ...]

    @property
    def config(self) -> dict[str, Any]:
        """The config, as YAML has it."""
        nested: dict[str, Any] = {}
        model: dict[str, Any] = {"class_path": self.method.method, "init_args": {}}
        for name, value in self.settings.items():
            first, *_ = path = name.split(".")
            place = nested if first in _OF_THE_RUN else model["init_args"]
            for part in path[:-1]:
                place = place.setdefault(part, {})
            place[path[-1]] = value
        return {"model": model, **nested}

    def text(self, source: str, name: str) -> str:
        """The config with a head that says how it is run, and what became of each key.

        Args:
            source: Name of the file it comes from.
            name: Name that the config is to have.
        """
        lines = [f"kedit edit -c {name} --data Requests --data.path facts.json --output run/"]
        if self.method.fitted:
            data = "--data Requests --data.train_path train.json --data.val_path val.json"
            lines = [f"kedit fit -c trainer/fit -c {name} {data} --output fit/"]
            run = f"kedit edit -c {name} --ckpt_path fit/checkpoints/best.ckpt"
            lines.append(f"{run} --data Requests --data.path facts.json --output run/")
        lines += ["", f"From {source}, a file of EasyEdit."]
        for heading, part in (
            ("Not in the file, and set so that the edit is EasyEdit's:", self.own),
            ("Other than in EasyEdit:", self.differs),
            ("To know of settings:", self.remarks),
            ("Keys without a setting:", _together(self.unused)),
        ):
            if part:
                lines += ["", heading]
                for key, reason in part.items():
                    lines += wrap(f"{key}: {reason}", _WIDTH - 2, **_INDENT)
        if self.unknown:
            names = ", ".join(self.unknown)
            lines += ["", "Unknown keys, which are left out:", *wrap(names, _WIDTH - 2, **_INDENT)]
        head = "".join(f"# {line}".rstrip() + "\n" for line in lines)
        return head + yaml.safe_dump(
            self.config, sort_keys=False, allow_unicode=True, width=_WIDTH, default_flow_style=None
        )


def hparams_conversion(values: Hparams, method: str | None = None) -> HparamsConversion:
    """Read the keys of a file.

    Args:
        values: The file's keys and values.
        method: EasyEdit's name of the method where the file has none.

    Raises:
        UsageError: The method has no counterpart, or a value is none that its key may have.
    """
    hparams = number(_flat(values))
    found = converted(hparams, method)
    settings: dict[str, Any] = {}
    differs: dict[str, str] = {}
    remarks: dict[str, str] = {}
    unused: dict[str, str] = {}
    for key, value in hparams.items():
        if key not in found.keys:
            continue
        try:
            reading = found.keys[key](value, hparams)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise UsageError(f"{key} is {value!r}, which is no value of it: {error}") from error
        settings |= reading.settings
        if reading.differs:
            differs[key] = reading.remark
        elif reading.remark:
            (remarks if reading.settings else unused)[key] = reading.remark
    own = {name: value for name, value in found.own.items() if name not in settings}
    why = {name: found.why[name] for name in own}
    settings |= own
    if not settings.keys() & {"base_model.dtype", "base_model.quantization"}:
        settings["base_model.dtype"] = "float32"
        why["base_model.dtype"] = "EasyEdit loads weights in float32 unless told otherwise"
    order = {"base_model.name": 0, "base_model.dtype": 1}
    settings = dict(sorted(settings.items(), key=lambda item: order.get(item[0], 2)))
    unknown = tuple(key for key in hparams if key not in found.keys)
    return HparamsConversion(found, settings, differs, why, remarks, unused, unknown)


def unknown_keys(conversion: HparamsConversion) -> str:
    """A sentence about keys that are not known, with the known ones that they resemble."""
    known = conversion.method.keys
    named = []
    for key in conversion.unknown:
        near = misspelt(key, known)
        named.append(f"'{key}' (was '{near}' meant?)" if near else f"'{key}'")
    return f"unknown keys for {conversion.method.method}: {article_list(named, len(named))}"


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Keys of nested mappings, joined by dots.

    >>> _flat({"grace": {"num_iter": 5}, "alg_name": "MELO"})
    {'grace.num_iter': 5, 'alg_name': 'MELO'}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def _together(remarks: Mapping[str, str]) -> dict[str, str]:
    """The same with keys of one reason in one line.

    >>> _together({"a": "none", "b": "other", "c": "none"})
    {'a, c': 'none', 'b': 'other'}
    """
    keys: dict[str, list[str]] = {}
    for key, reason in remarks.items():
        keys.setdefault(reason, []).append(key)
    return {", ".join(names): reason for reason, names in keys.items()}
