#!/usr/bin/env bash
# jsonargparse 4.53.0 offers the options of a base class by reading in the source of a constructor where `**kwargs` goes. The parser
# does not run the code: a name that is bound again is followed (`kwargs = checked(kwargs)`), an expression is not. As soon as the
# keywords pass through a call, a new dictionary or an operator on their way to `super().__init__`, all options of the base class are
# gone, without an error or a warning, though the constructor takes them as before. For a command that is built on LightningCLI, a
# trainer of one's own that checks its keywords in that line has none of Lightning's options left.
#
# Seen with jsonargparse 4.53.0, Python 3.11:
#   super().__init__(**kwargs)                                 devices own precision
#   kwargs = checked(kwargs); super().__init__(**kwargs)       devices own precision
#   super().__init__(**checked(kwargs))                        own
#   super().__init__(**{**kwargs})                             own
#   super().__init__(**(kwargs | {}))                          own
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jsonargparse==4.53.0
cat > "$folder/run.py" <<'PYTHON'
import sys
from importlib.metadata import version

from jsonargparse import ArgumentParser


class Base:
    def __init__(self, devices: int = 1, precision: str = "32"):
        self.given = devices, precision


def checked(settings: dict) -> dict:
    return settings


class Passed(Base):
    def __init__(self, own: int = 0, **kwargs):
        super().__init__(**kwargs)


class BoundAgain(Base):
    def __init__(self, own: int = 0, **kwargs):
        kwargs = checked(kwargs)
        super().__init__(**kwargs)


class InACall(Base):
    def __init__(self, own: int = 0, **kwargs):
        super().__init__(**checked(kwargs))


class InADictionary(Base):
    def __init__(self, own: int = 0, **kwargs):
        super().__init__(**{**kwargs})


class WithAnOperator(Base):
    def __init__(self, own: int = 0, **kwargs):
        super().__init__(**(kwargs | {}))


def options(kind):
    """Options that a parser offers for a class."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "x")
    return sorted(vars(parser.get_defaults().x))


print("jsonargparse", version("jsonargparse"))
found = {}
for kind in (Passed, BoundAgain, InACall, InADictionary, WithAnOperator):
    assert kind(devices=2, precision="16").given == (2, "16")  # each passes the keywords on when it runs
    found[kind.__name__] = options(kind)
    print(f"{kind.__name__:15}", *found[kind.__name__])
every = ["devices", "own", "precision"]
wanted = {"Passed": every, "BoundAgain": every, "InACall": ["own"], "InADictionary": ["own"], "WithAnOperator": ["own"]}
sys.exit(0 if found == wanted else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
