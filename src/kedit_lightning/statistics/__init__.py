"""Covariances of keys (uncentred second moments) and null spaces, with their cache."""

from kedit_lightning.statistics.covariance import SecondMoment, factorise, shrunk
from kedit_lightning.statistics.covariance_cache import (
    KeyStatistics,
    chosen_statistics,
    estimate_from_few_samples,
    few_sample_texts,
    find_statistics,
    packaged_statistics,
    save_to_cache,
)
from kedit_lightning.statistics.covariance_import import import_second_moment
from kedit_lightning.statistics.key_collector import KeyCollector, keyed_projections
from kedit_lightning.statistics.moment_file import MomentFile, Provenance, write_statistics
from kedit_lightning.statistics.null_space import main_directions
from kedit_lightning.statistics.text_pass import TextPass

__all__ = [
    "KeyCollector",
    "KeyStatistics",
    "MomentFile",
    "Provenance",
    "SecondMoment",
    "TextPass",
    "chosen_statistics",
    "estimate_from_few_samples",
    "factorise",
    "few_sample_texts",
    "find_statistics",
    "import_second_moment",
    "keyed_projections",
    "main_directions",
    "packaged_statistics",
    "save_to_cache",
    "shrunk",
    "write_statistics",
]
