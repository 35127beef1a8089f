"""Numbers among a method's settings that make no sense are refused before the model is loaded."""

from __future__ import annotations

from dataclasses import fields
from typing import get_type_hints

import pytest
from support import REQUESTS

from kedit_lightning import methods
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.capabilities import Bounds

#: Numbers that any value is right for, or that the base model bounds.
FREE = {"seed", "layer", "key_layer", "projection"}
NUMBERS = {int, float, int | None, float | None}
#: Values that are wrong wherever 0, 1 and all that is larger are right.
WRONG = (-1, float("nan"), -float("inf"))


def numbers(name):
    """Settings of a method that are numbers and have bounds."""
    settings = getattr(methods, name).settings_type
    hints = get_type_hints(settings)
    listed = (field.name for field in fields(settings))
    return [field for field in listed if hints[field] in NUMBERS and field not in FREE]


CASES = [(method, field) for method in methods.METHODS for field in numbers(method)]


@pytest.mark.parametrize(("name", "field"), CASES)
def test_a_number_out_of_bounds_is_refused_by_name_and_value(name, field):
    for value in WRONG:
        if name in ("MEND", "InstructEdit") and field == "edit_lr" and value == -1:
            continue  # training may turn its sign, so it may start with either
        method = getattr(methods, name)(base_model="no/such-model", **{field: value})
        for check in (method.configure_model, lambda method=method: method.setup("test")):
            with pytest.raises(UnsupportedUseError, match=f"^{name}: {field} must .* got {value}$"):
                check()


@pytest.mark.parametrize("name", methods.METHODS)
def test_default_values_are_within_bounds(name):
    getattr(methods, name)(base_model="no/such-model").given.check_bounds(name)


@pytest.mark.parametrize(
    ("name", "field", "value", "words"),
    [
        ("MEND", "rank", 0, "a whole number of at least 1, got 0"),
        ("ROME", "contexts", -1, "a whole number of at least 0, got -1"),
        ("ROME", "steps", 2.5, "a whole number of at least 1, got 2.5"),
        ("UltraEdit", "batch_size", 0, "a whole number of at least 1, got 0"),
        ("ROME", "lr", 0.0, "a finite number above 0, got 0.0"),
        ("ROME", "lr", float("inf"), "a finite number above 0, got inf"),
        ("SERAC", "threshold", 2.0, "lie between 0 and 1, got 2.0"),
        ("MEMIT", "keep_share", 0.0, "lie between 0 and 1, without 0, got 0.0"),
        ("MALMEN", "edit_lr", -1.0, "a finite number above 0, got -1.0"),
        ("FTM", "norm_constraint", -1.0, "a number of at least 0, got -1.0"),
        ("GRACE", "radius", "wide", "a finite number of at least 0, got 'wide'"),
        ("KN", "threshold", None, "lie between 0 and 1, got None"),
    ],
)
def test_the_message_says_what_is_right(name, field, value, words):
    method = getattr(methods, name)(base_model="no/such-model", **{field: value})
    with pytest.raises(UnsupportedUseError, match=f"{field} must (be )?{words}"):
        method.setup("test")


def test_all_wrong_values_are_named_in_one_sentence():
    method = methods.ROME(base_model="nano", steps=-1, lr=-1.0)
    with pytest.raises(UnsupportedUseError, match=r"^ROME: steps must .*-1; lr must .*-1\.0$"):
        method.edit(REQUESTS[:1])


def test_bounds_tell_their_ends():
    assert Bounds(0).hold(0)
    assert not Bounds(0, above=True).hold(0)
    assert Bounds(0, float("inf")).hold(float("inf"))
    assert not Bounds(0).hold(float("inf"))
