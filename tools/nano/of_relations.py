"""Write the facts of some relations to a file, to fit, validate or test on them alone.

Usage: ``python tools/nano/of_relations.py office.jsonl validation test --relations office``
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

FACTS = Path(__file__).parents[2] / "src/kedit_lightning/data/nano_facts"


def main() -> None:
    """Read the splits, and write those of their records that are about the relations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path, help="file to write")
    parser.add_argument("splits", nargs="+", choices=["train", "validation", "test"])
    parser.add_argument("--relations", nargs="+", required=True, help="names of relations")
    given = parser.parse_args()
    lines = [
        line
        for split in given.splits
        for line in (FACTS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        if json.loads(line)["requested_rewrite"]["relation_id"] in given.relations
    ]
    given.target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} facts -> {given.target}")


if __name__ == "__main__":
    main()
