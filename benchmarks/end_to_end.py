r"""Processor time of editing and scoring, against those of an earlier version.

    git worktree add ../before COMMIT
    python benchmarks/end_to_end.py --against ../before
    python benchmarks/end_to_end.py --against ../before --methods None --facts 100
    python benchmarks/end_to_end.py --against ../before --models facts-30m

Both versions edit the same facts under the protocol `single` with its defaults, and score them,
each in a process of its own; the two take turns.  The base models are `nano` (a Llama) and a GPT-2
of the same shape with random weights, both with NanoFacts, and where it has been made `facts-30m`,
a GPT-2 that knows the facts of its own test split.  `None` edits nothing.  The answers of the base
model are read anew each time.  Beside the ratio stand the smallest cosine of the edits of a fact,
and the largest difference of a score.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from turns import Server, environment_of, timed_test

METHODS = ("FTM", "FTL", "GRACE", "ROME", "MEMIT", "AlphaEdit", "EMMET", "PMET", "KN")
MODELS = ("nano", "gpt2")
REPEATS = 5


def base_model(name: str):  # noqa: ANN201 - torch is imported in the child only
    """The packaged model, one of a folder, or a GPT-2 of nano's shape with random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from kedit_lightning import BaseModel

    if Path(name).is_dir():
        return BaseModel.load(name, dtype="float32")  # its files have 16 bit
    nano = BaseModel.load("nano")
    if name == "nano":
        return nano
    torch.manual_seed(0)
    vocabulary = nano.model.config.vocab_size
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = GPT2Config(n_embd=256, n_layer=6, n_head=4, vocab_size=vocabulary, **ends)
    return BaseModel(GPT2LMHeadModel(config).eval(), nano.tokenizer, name=name)


def editor_of(method: str, base: Any, key_statistics: Path | None = None) -> Any:
    """A method with its default settings, or one whose edits add zero.

    Args:
        method: Its name.
        base: The base model.
        key_statistics: Their file, for methods that read one.
    """
    from kedit_lightning import methods

    if method == "None":
        from evaluation import NoEdit

        return NoEdit(base_model=base)
    made = getattr(methods, method)
    reads = key_statistics and any(f.name == "statistics" for f in fields(made.settings_type))
    return made(base_model=base, **({"statistics": str(key_statistics)} if reads else {}))


def use_folders_of_version() -> None:
    """Take callbacks and configs from the folder of this version, not from an installed one."""
    import kedit_lightning

    root = Path(kedit_lightning.__file__).parents[2]
    for name in ("callbacks", "configs"):
        folder, full = root / name, f"kedit_lightning.{name}"
        spec = importlib.util.spec_from_file_location(
            full, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is not None and spec.loader is not None and (folder / "__init__.py").exists():
            sys.modules[full] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[full])


def serve(method: str, model: str, facts: int, output: str) -> None:
    """Run once for each line of input, and answer with seconds and scores."""
    use_folders_of_version()
    import torch
    from safetensors.torch import save_file

    from kedit_lightning.data import NanoFacts
    from kedit_lightning.errors import KEditError

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    base = base_model(model)
    own = Path(model) if Path(model).is_dir() else None
    # An earlier version does not find those beside the model by itself.
    editor = editor_of(method, base, own and own / "statistics.safetensors")
    path = own and own / "test.jsonl"

    def data(limit: int) -> NanoFacts:
        return NanoFacts(path=path, limit=limit, seed=0)

    groups = [example.requests for example in data(facts).examples("test")]
    trained = {}
    for number, edit in enumerate(editor.edit_each(groups)):
        try:
            found = edit.deltas()
        except KEditError:  # a memory changes no weights
            found = edit.state()[0]
        tensors = dict(sorted(found.items()))
        parts = [t.detach().flatten() for t in tensors.values()]
        trained[str(number)] = torch.cat(parts) if parts else torch.zeros(1)  # of a prompt, text
    save_file(trained, output)

    def run(limit: int) -> tuple[float, dict[str, float]]:
        return timed_test(editor, data(limit))

    run(2)  # what is done once in a process
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(run(facts)), flush=True)


def served(root: Path, method: str, model: str, facts: int, output: Path) -> Server:
    """A process that runs the version of a folder."""
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", method, model]
    command += ["--facts", str(facts), "--output", str(output)]
    return Server(command, environment_of(root))


def row(against: Path, method: str, model: str, facts: int, repeats: int) -> str:
    """The line of a method on a model."""
    from safetensors.torch import load_file
    from torch.nn.functional import cosine_similarity

    from kedit_lightning.cache_folder import facts_30m_dir

    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "before"), Path(folder, "now")
        roots = against, Path(__file__).parents[1]
        named = str(facts_30m_dir().resolve()) if model == "facts-30m" else model
        versions = [
            served(root, method, named, facts, file)
            for root, file in zip(roots, files, strict=True)
        ]
        pairs = [[version.run() for version in versions] for _ in range(repeats)]
        for version in versions:
            version.close()
        edits = [load_file(file) for file in files]
    old, new = (statistics.median(pair[i][0] for pair in pairs) for i in (0, 1))
    both = [(edits[0][name].double(), edits[1][name].double()) for name in edits[0]]
    cosine = min(
        1.0 if bool((one == other).all()) else float(cosine_similarity(one, other, dim=0))
        for one, other in both
    )
    scores = [scores for _, scores in pairs[0]]
    gap = max(abs(scores[0][key] - scores[1].get(key, float("inf"))) for key in scores[0])
    return (
        f"| {method} | {model} | {old / facts:.4f} | {new / facts:.4f} | {old / new:.2f} "
        f"| {cosine:.7f} | {gap:.1e} |"
    )


def main() -> None:
    """Print one line for each method and model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="folder of the earlier version")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=(*MODELS, "facts-30m"))
    parser.add_argument("--facts", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve, options.facts, options.output)
        return
    if options.against is None:
        parser.error("--against: give the folder of the earlier version")
    print("| method | model | before, s/fact | now, s/fact | times faster | cosine | scores |")
    print("|---|---|---|---|---|---|---|")
    for method in options.methods:
        for model in options.models:
            print(row(options.against, method, model, options.facts, options.repeats), flush=True)


if __name__ == "__main__":
    main()
