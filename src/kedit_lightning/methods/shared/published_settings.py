"""Published settings of known models, read from ``published_settings.yaml``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any, TypeAlias, TypeVar

import yaml

from kedit_lightning.base_models import BaseModel

T = TypeVar("T")
#: Model type, number of blocks and hidden size.
ModelKey: TypeAlias = tuple[str, int, int]


@cache
def published_tables() -> dict[str, dict[ModelKey, dict[str, Any]]]:
    """Published settings by method and model."""
    path = files("kedit_lightning.methods.shared") / "published_settings.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    models: dict[str, ModelKey] = {n: tuple(key) for n, key in content.pop("models").items()}
    return {
        method: {models[name]: values for name, values in table.items()}
        for method, table in content.items()
    }


def published_settings(base: BaseModel, method: str, kind: Callable[..., T]) -> T | None:
    """Published settings of a method for a base model, as an object of a kind, or ``None``."""
    key = (base.model.config.model_type, len(base.layout), base.layout.hidden_size)
    values = published_tables().get(method, {}).get(key)
    return None if values is None else kind(**values)
