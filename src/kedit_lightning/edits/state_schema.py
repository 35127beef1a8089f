"""Checks of what a file says an edit consists of, before anything is built from it."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import (
    Any,
    Literal,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import torch
from torch import Tensor

from kedit_lightning.errors import EditFileError, article_list

#: What torch computes in on every device.
FULL_PRECISION = (torch.float32, torch.float64)
FLOATS = (*FULL_PRECISION, torch.float16, torch.bfloat16)
#: What JSON makes of containers.
_CONTAINERS = {tuple: list, Mapping: dict}
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = 80  # for names of modules
_short = _BRIEF.repr


class NoValues(TypedDict):
    """The plain values of a kind that has none."""


def check_names(
    what: str, found: Iterable[str], needed: Iterable[str], optional: Iterable[str] = ()
) -> None:
    """Refuse names that are missing or unknown.

    Raises:
        EditFileError: The message lists them.
    """
    missing = sorted({*needed} - {*found})
    unknown = sorted({*found} - {*needed} - {*optional})
    problems = [f"{what} lacks {article_list(missing, 4)}"] if missing else []
    problems += [f"{what} has unknown {_short(unknown)}"] if unknown else []
    if problems:
        raise EditFileError(" and ".join(problems))


def check_value(what: str, value: object, schema: Any) -> None:
    """Refuse plain values that are not those of a type.

    Args:
        what: Names the value in messages.
        value: What JSON gives or takes.
        schema: ``Any``, a plain type, a literal, a union, a list or tuple of one type, a mapping
            with text as keys, or a dataclass or ``TypedDict``, whose fields all need a value unless
            they have a default.

    Raises:
        EditFileError: The message names the value.
    """
    value = list(value) if isinstance(value, tuple) else value  # one that JSON has yet to see
    origin, parts = get_origin(schema) or schema, get_args(schema)
    container = _CONTAINERS.get(origin, origin)
    if is_dataclass(schema) or is_typeddict(schema):
        hints = dict(_hints(schema))
        given = fields(schema) if is_dataclass(schema) else ()
        if is_dataclass(schema):  # less its class variables
            hints = {field.name: hints[field.name] for field in given}
        optional = {f.name for f in given if (f.default, f.default_factory) != (MISSING, MISSING)}
        check_value(what, value, dict)
        assert isinstance(value, dict)
        check_names(what, value, hints.keys() - optional, optional)
        for name, item in value.items():
            check_value(f"'{name}' of {what}", item, hints[name])
        return
    if origin is Any:
        return
    if origin is Literal:
        fits = any(type(value) is type(part) and value == part for part in parts)
    elif origin in (Union, UnionType):
        fits = any(_fits(value, part) for part in parts)
    elif origin is float:
        fits = type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    else:
        fits = type(value) is container
    if not fits:
        name = getattr(schema, "__name__", schema)
        raise EditFileError(f"{what} is {_short(value)}, which is no {name}")
    if isinstance(value, list) and parts:
        for index, item in enumerate(value):
            check_value(f"item {index} of {what}", item, parts[0])


@cache
def _hints(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema)


def _fits(value: object, schema: Any) -> bool:
    try:
        check_value("", value, schema)
    except EditFileError:
        return False
    return True


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Iterable[int | None],
    dtypes: Iterable[torch.dtype] = FLOATS,
) -> None:
    """Refuse a tensor of another shape, where ``None`` is any size, or of none of the dtypes.

    Raises:
        EditFileError: The message names the tensor.
    """
    shape, dtypes = list(shape), list(dtypes)
    sizes = zip(tensor.shape, shape, strict=False)
    if tensor.dim() != len(shape) or any(need not in (None, size) for size, need in sizes):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise EditFileError(
            f"tensor '{name}' has shape {list(tensor.shape)}, and [{wanted}] is needed"
        )
    if tensor.dtype not in dtypes:
        raise EditFileError(
            f"tensor '{name}' is of {tensor.dtype}, and {article_list(list(map(str, dtypes)))} "
            "can be used"
        )
