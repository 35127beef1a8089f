"""Make a small checkpoint of one that ``kedit fit`` wrote: what editing needs, and nothing else.

Usage: ``python tools/nano/slim_checkpoint.py outputs/fit/last.ckpt mend.ckpt``
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from kedit_lightning.methods.training.checkpoint import read_checkpoint, slim


def main() -> None:
    """Read one file, write the other, and say how large they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="checkpoint of a fit")
    parser.add_argument("target", type=Path, help="file to write")
    given = parser.parse_args()
    torch.save(slim(read_checkpoint(given.source)), given.target)
    sizes = [f"{path} {path.stat().st_size / 1e6:.1f} MB" for path in (given.source, given.target)]
    print(" -> ".join(sizes))


if __name__ == "__main__":
    main()
