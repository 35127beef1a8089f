"""Collect the key statistics that stand beside ``nano``, or ``facts-30m``.

Usage: ``python tools/nano/key_statistics.py --text ../shared/data/wikitext-2/valid.txt``

       ``python tools/nano/key_statistics.py --base-model facts-30m --facts FOLDER
       --text FOLDER/text.txt --lines 20000``

The text is the kind the model was trained on: the facts in all training templates, and plain text.
``kedit fit`` collects, into a cache of its own; the result is then put beside the model.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from dataclasses import replace
from pathlib import Path

from fact_book import FactBook, plain_sentences

from kedit_lightning import BaseModel
from kedit_lightning.cache_folder import facts_30m_dir
from kedit_lightning.cli.main import main as kedit
from kedit_lightning.statistics import find_statistics, packaged_statistics, write_statistics

PACKAGE = Path(__file__).parents[2] / "src/kedit_lightning"
#: Number types in which the packaged model may be loaded; the keys hardly differ.
DTYPES = ("float32", "bfloat16", "float16", "float64")


def main() -> None:
    """Write the text, run ``kedit fit``, and package what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="plain text file")
    parser.add_argument("--facts", type=Path, default=PACKAGE / "data/nano_facts")
    parser.add_argument("--base-model", default="nano", choices=["nano", "facts-30m"])
    parser.add_argument("--lines", type=int, help="lines read, drawn at random; all if absent")
    args = parser.parse_args()
    target = packaged_statistics(args.base_model)
    target.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("KEDIT_FACTS_30M", str(facts_30m_dir()))  # in the cache of before
        os.environ["KEDIT_CACHE"] = folder
        text = Path(folder) / "text.txt"
        lines = [*FactBook.read(args.facts).sentences(), *plain_sentences(args.text)]
        if args.lines is not None:
            lines = random.Random(0).sample(lines, args.lines)
        text.write_text("\n".join(lines), encoding="utf-8")
        # Short texts, as the prompts of edits are: the keys of a first token differ from others.
        kedit(
            [
                "fit",
                "-c",
                "methods/rome",
                "--data",
                "Texts",
                "--data.path",
                str(text),
                "--data.max_chars",
                "240",
                "--data.batch_size",
                "64",
                "--model.base_model",
                args.base_model,
                "--trainer.default_root_dir",
                folder,
            ]
        )
        base = BaseModel.load(args.base_model)
        moments = {}
        for block in base.layout.blocks:
            found = find_statistics(base, block.down)
            assert found is not None
            moments[block.down] = found.moment
        prints = tuple(BaseModel.load(args.base_model, dtype=d).fingerprint for d in DTYPES)
        source = f"training text of {args.base_model}"
        provenance = replace(found.provenance, fingerprints=prints, source=source)
        write_statistics(target, moments, provenance)
    print(f"{target}: {target.stat().st_size / 2**20:.1f} MB, {found.moment.count:,} tokens")


if __name__ == "__main__":
    main()
