"""Second moments of the keys that edited layers see, collected once and kept in a cache."""

from kedit_lightning.statistics.collect import KeyCollector
from kedit_lightning.statistics.directions import main_directions
from kedit_lightning.statistics.importer import import_second_moment
from kedit_lightning.statistics.moments import SecondMoment, factorise, shrunk
from kedit_lightning.statistics.store import (
    KeyStatistics,
    Provenance,
    estimate_from_few_samples,
    find_statistics,
    packaged_statistics,
    save_to_cache,
    write_statistics,
)
from kedit_lightning.statistics.text_pass import TextPass

__all__ = [
    "KeyCollector",
    "KeyStatistics",
    "Provenance",
    "SecondMoment",
    "TextPass",
    "estimate_from_few_samples",
    "factorise",
    "find_statistics",
    "import_second_moment",
    "main_directions",
    "packaged_statistics",
    "save_to_cache",
    "shrunk",
    "write_statistics",
]
