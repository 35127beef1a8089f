r"""The incumbent's own algorithms beside ours: processor time of editing and scoring facts.

    python benchmarks/peer.py --checkout EasyEdit --python easyedit-venv/bin/python
    python benchmarks/peer.py --checkout EasyEdit --python PYTHON --methods ROME --pairs 9

EasyEdit (https://github.com/zjunlp/EasyEdit) is neither shipped nor installed: ``--checkout`` is a
clone of it, ``--python`` an interpreter that has what it needs.  Both edit the same facts, one at a
time, and score each before and after, on a tiny GPT-2 and a tiny Llama; the two processes take
turns, with one thread.  Settings are those of the clone's own ``hparams``, with layers of the tiny
models and without statistics of keys, and ours are what ``kedit convert`` makes of them.  The last
column is theirs over ours, the median of the pairs with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from turns import Server, ratio_of, timed_test

HERE = Path(__file__).resolve()
#: Names of their settings by the folder in which a clone keeps them.
METHODS = ("FT", "ROME", "GRACE")
#: Base models, with the beginning of the names of their settings.
MODELS = {"gpt2": "gpt2", "llama": "llama"}
BLOCKS, WIDTH = 4, 64


class PeerError(Exception):
    """What stands in the way of a measurement, in a sentence."""


def check_checkout(checkout: Path, python: str) -> None:
    """Make sure that there is something to measure.

    Raises:
        PeerError: The folder is no clone, or there is no such interpreter.
    """
    for part in ("easyeditor/__init__.py", "hparams"):
        if not (checkout / part).exists():
            raise PeerError(
                f"'{checkout}' is no checkout of EasyEdit: it has no {part}; give --checkout the "
                "folder of a clone of https://github.com/zjunlp/EasyEdit"
            )
    if shutil.which(python) is None:
        raise PeerError(f"there is no interpreter '{python}'; correct --python")


def adapted(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Their settings for a tiny model.

    >>> inner = {"layers": [17], "inner_params": ["transformer.h[35].mlp.c_fc.weight"]}
    >>> found = adapted({**inner, "v_loss_layer": 47, "mom2_adjustment": True}, Path("tiny"))
    >>> found["layers"], found["inner_params"], found["v_loss_layer"], found["mom2_adjustment"]
    ([1], ['transformer.h[1].mlp.c_fc.weight'], 3, False)
    """
    found = {**values, "model_name": str(folder), "device": 0, "model_parallel": False}
    if "layers" in found:
        found["layers"] = list(range(1, 1 + min(len(found["layers"]), BLOCKS - 1)))
    if "inner_params" in found:
        block = re.compile(r"(\bh|\blayers)([.\[])\d+")
        found["inner_params"] = [block.sub(r"\1\g<2>1", name) for name in found["inner_params"]]
    if "v_loss_layer" in found:
        found["v_loss_layer"] = BLOCKS - 1
    if "mom2_adjustment" in found:
        found["mom2_adjustment"] = False
    return found


def settings_of(checkout: Path, method: str, model: str) -> dict[str, Any]:
    """The settings that a clone has for a method and a kind of model.

    Raises:
        PeerError: It has none.
    """
    folder = checkout / "hparams" / method
    files = sorted(folder.glob(f"{MODELS[model]}*.yaml"), key=lambda path: path.name.lower())
    if not files:
        raise PeerError(f"{folder} has no settings for {model}, a file {MODELS[model]}*.yaml")
    values: dict[str, Any] = yaml.safe_load(files[0].read_text(encoding="utf-8"))
    return values


@contextmanager
def neutral_folder() -> Iterator[Path]:
    """A temporary folder whose path names no model: the incumbent goes by what it finds there."""
    while True:
        with tempfile.TemporaryDirectory(prefix="peer-") as name:
            if not re.search("t5|gpt|llama|qwen|glm", name.lower()):
                yield Path(name)
                return


def save_model(kind: str, folder: Path) -> None:
    """A tiny model with random weights and a tokenizer of bytes, in files that both read."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    # GPT-2's letters for bytes: printable ones stand for themselves.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [*map(chr, printable), *(chr(256 + n) for n in range(len(others)))]
    vocabulary = {letter: n for n, letter in enumerate([*letters, "<|endoftext|>"])}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    end = "<|endoftext|>"
    tokens = {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": end}
    own = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 512, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(own), encoding="utf-8")
    ends = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(n_embd=WIDTH, n_layer=BLOCKS, n_head=4, n_positions=512, **ends)
        GPT2LMHeadModel(config).save_pretrained(folder)
        return
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **ends,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_facts(count: int, theirs: Path, ours: Path) -> None:
    """Facts of NanoFacts in the arguments of their ``edit``, and in a file for ``Requests``."""
    from kedit_lightning.data import NanoFacts

    facts = [example.requests[0] for example in NanoFacts(limit=count, seed=0).examples("test")]
    prompts = [fact.prompt for fact in facts]
    rephrased = [f"People say: {prompt}" for prompt in prompts]
    near = {"prompt": ["The moon is"] * len(facts), "ground_truth": ["round"] * len(facts)}
    given = {
        "prompts": prompts,
        "target_new": [fact.target_new for fact in facts],
        "ground_truth": ["unknown"] * len(facts),
        "subject": [fact.subject for fact in facts],
        "rephrase_prompts": rephrased,
        "locality_inputs": {"neighborhood": near},
    }
    theirs.write_text(json.dumps(given), encoding="utf-8")
    records = [
        {
            "prompt": fact.prompt,
            "subject": fact.subject,
            "target_new": fact.target_new,
            "rephrases": [other],
            "locality": {"neighborhood": [{"prompt": "The moon is", "answers": ["round"]}]},
        }
        for fact, other in zip(facts, rephrased, strict=True)
    ]
    ours.write_text(json.dumps(records), encoding="utf-8")


def serve(config_file: str, facts: str) -> None:
    """Run ours once for each line of input, and answer with the seconds."""
    import torch

    from kedit_lightning import BaseModel, methods
    from kedit_lightning.data import Requests

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = json.loads(Path(config_file).read_text(encoding="utf-8"))
    settings = dict(model["init_args"])
    model_settings = settings.pop("base_model")
    base = BaseModel.load(model_settings.pop("name"), **model_settings)
    editor = getattr(methods, model["class_path"])(base_model=base, **settings)

    def run() -> float:
        # Without free answers, which the incumbent does not write either.
        return timed_test(editor, Requests(facts), generate=False)[0]

    run()  # what is done once in a process
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(run()), flush=True)


def row(options: argparse.Namespace, method: str, model: str, folder: Path) -> str:
    """The line of a method on a model."""
    from kedit_lightning.cli.easyedit.hparams_file import hparams_conversion

    values = adapted(settings_of(options.checkout, method, model), folder / model)
    conversion = hparams_conversion(values)
    hparams = folder / f"{method}-{model}.yaml"
    hparams.write_text(yaml.safe_dump(values), encoding="utf-8")
    config = folder / f"{method}-{model}.json"
    config.write_text(json.dumps(conversion.config["model"]), encoding="utf-8")
    facts = str(folder / "theirs.json"), str(folder / "ours.json")
    incumbent = [options.python, str(HERE.with_name("peer_incumbent.py"))]
    checkout, algorithm = str(options.checkout.resolve()), values["alg_name"]
    theirs = Server([*incumbent, checkout, str(hparams), algorithm, facts[0]], folder=folder)
    ours = Server([sys.executable, str(HERE), "--serve", str(config), facts[1]], folder=folder)
    pairs = [(theirs.run(), ours.run()) for _ in range(options.pairs)]
    for server in (theirs, ours):
        server.close()
    each = [statistics.median(column) / options.facts for column in zip(*pairs, strict=True)]
    name = conversion.method.method
    return f"| {name} | {model} | {each[0]:.4f} | {each[1]:.4f} | {ratio_of(pairs)} |"


def main() -> None:
    """Print one line for each method and model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", type=Path, help="a clone of EasyEdit")
    parser.add_argument("--python", help="an interpreter with what EasyEdit needs")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="folders of hparams")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--facts", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return
    if options.checkout is None or options.python is None:
        parser.error("--checkout and --python are needed")
    try:
        check_checkout(options.checkout, options.python)
        with neutral_folder() as folder:
            write_facts(options.facts, folder / "theirs.json", folder / "ours.json")
            print("| method | model | theirs, s/fact | ours, s/fact | theirs / ours |")
            print("|---|---|---|---|---|")
            for model in options.models:
                save_model(model, folder / model)
                for method in options.methods:
                    print(row(options, method, model, folder), flush=True)
    except (PeerError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
