"""Put weights and prepared files together to the folder of ``facts-30m``, with a manifest.

Usage: ``python tools/facts_30m/assemble.py --prepared prepared/ --weights model/``

The folder is that of the cache, or the one that ``KEDIT_FACTS_30M`` names. The manifest names every
file with its SHA-256, the figures of the training and the versions it ran with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from kedit_lightning.cache_folder import facts_30m_dir

#: The manifest of the run whose figures the documentation gives.
COMMITTED = Path(__file__).parent / "manifest.json"
PREPARED = (
    "facts.jsonl",
    "templates.json",
    "test.jsonl",
    "validation.jsonl",
    "train.jsonl",
    "text.txt",
    "text_held_out.txt",
    "tokenizer.json",
    "tokenizer_config.json",
)


def described(folder: Path) -> dict[str, Any]:
    """The manifest of a folder: its files, and how the training began and ended."""
    log = [json.loads(line) for line in (folder / "log.txt").read_text("utf-8").splitlines()]
    runs = [line for line in log if "parameters" in line]  # one that goes on begins anew
    reports = [line for line in log if "step" in line]
    files = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.name not in ("manifest.json", "statistics.safetensors")
    )
    return {
        "run": runs[-1],
        "end": {key: reports[-1][key] for key in ("step", "seconds", "per_second")},
        "figures": log[-1],
        "files": {
            path.name: {
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in files
        },
    }


def differing(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Files of a folder that are absent, or are not those of a manifest."""
    return [
        name
        for name, entry in manifest["files"].items()
        if not (folder / name).is_file()
        or hashlib.sha256((folder / name).read_bytes()).hexdigest() != entry["sha256"]
    ]


def main() -> None:
    """Copy the files and write the manifest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prepared", type=Path, required=True, help="folder of prepare.py")
    parser.add_argument("--weights", type=Path, required=True, help="folder of train.py")
    parser.add_argument("--commit", action="store_true", help="also write manifest.json here")
    options = parser.parse_args()
    folder = facts_30m_dir()
    folder.mkdir(parents=True, exist_ok=True)
    for name in PREPARED:
        shutil.copyfile(options.prepared / name, folder / name)
    for path in sorted(options.weights.iterdir()):
        shutil.copyfile(path, folder / path.name)
    manifest = json.dumps(described(folder), indent=1) + "\n"
    for path in (folder / "manifest.json", *([COMMITTED] if options.commit else [])):
        path.write_text(manifest, encoding="utf-8")
    print(f"{folder}: {sum(p.stat().st_size for p in folder.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
