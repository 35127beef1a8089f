"""``python -m kedit_lightning.statistics FILE.npz``: import published key statistics.

python -m kedit_lightning.statistics transformer.h.17.mlp.c_proj_float32_mom2_100000.npz \
    --base_model gpt2-xl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kedit_lightning.base_models import BaseModel
from kedit_lightning.errors import KEditError
from kedit_lightning.statistics.covariance_import import import_second_moment


def main(args: Sequence[str] | None = None) -> None:
    """Import files and print their places in the cache."""
    parser = argparse.ArgumentParser(
        prog="python -m kedit_lightning.statistics",
        description="Import second moments of keys that the ROME and MEMIT code has written.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE.npz")
    parser.add_argument("--base_model", required=True, help="name or folder of the base model")
    parser.add_argument("--dtype", default="auto", help="number type it will be edited in")
    parser.add_argument("--layer", type=int, help="block the keys belong to, if no name says so")
    given = parser.parse_args(args)
    try:
        if given.layer is not None and len(given.files) > 1:
            parser.error("--layer goes with one file")
        base = BaseModel.load(given.base_model, dtype=given.dtype)
        module = None if given.layer is None else base.layout.block(given.layer).down
        for file in given.files:
            sys.stdout.write(f"{file} is in {import_second_moment(file, base, module)}\n")
    except KEditError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
