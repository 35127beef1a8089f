"""Intervals hold the truth as often as they say."""

import pytest
from interval_coverage import table


@pytest.mark.slow
def test_intervals_cover_95_percent_within_two():
    for name, share in table(samples=1000).items():
        assert abs(share - 0.95) <= 0.02, name
