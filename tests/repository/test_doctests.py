"""Examples in docstrings are run."""

import doctest
from importlib import import_module

import pytest
from places import ROOT

PLACES = {
    "kedit_lightning": ROOT / "src" / "kedit_lightning",
    "kedit_lightning.callbacks": ROOT / "callbacks",
}


def modules():
    """Yield the modules whose text has an example; reading it keeps collection free of imports."""
    for name, place in PLACES.items():
        for path in sorted(place.rglob("*.py")):
            parts = path.relative_to(place).with_suffix("").parts
            if ">>> " in path.read_text():
                yield ".".join((name, *(part for part in parts if part != "__init__")))


@pytest.mark.parametrize("name", list(modules()))
def test_doctests(name):
    result = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
    assert result.attempted > 0
