r"""Edits exported as adapters, as plain peft and llama.cpp apply them.

    pip install llama-cpp-python gguf sentencepiece
    git clone https://github.com/ggml-org/llama.cpp
    python benchmarks/gguf_adapters.py --llama-cpp llama.cpp

Each stack of edits on `nano` is saved with ``save_adapter``, loaded onto a fresh model with peft,
and converted with llama.cpp's own ``convert_lora_to_gguf.py`` for llama-cpp-python, which also
reads the file of ``save_gguf_adapter``.  All answer
the questions of the edited facts and their neighbours greedily, from the same token ids; the table
says how many answers are those of the edited model itself, token by token.

llama.cpp keeps keys and values in float16 unless told otherwise; here they are float32.  Its
converter of base models knows a tokenizer by its hash and refuses one that was trained anew: only
ids are fed here, so it is told a name of one it knows.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from llama_cpp import Llama
from peft import PeftModel
from transformers import AutoModelForCausalLM

from kedit_lightning import BaseModel, Edit
from kedit_lightning.data import NanoFacts
from kedit_lightning.edits import save_adapter, save_gguf_adapter
from kedit_lightning.methods import KN, MEMIT, MEND, ROME
from kedit_lightning.requests import EditExample

TOKENS = 12
#: Value types of llama.cpp.
FLOAT32 = 0
#: Runs a converter with a known name for the tokenizer.
CONVERT = """
import runpy, sys
script = sys.argv[1]
sys.path[:0] = [str(__import__("pathlib").Path(script).parent)]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


def stacks(base: BaseModel, examples: Sequence[EditExample]) -> dict[str, list[Edit]]:
    """Edits to be exported, by name; each list was computed as a stack."""
    requests = [example.requests[0] for example in examples]
    mend, kn = MEND(base_model=base), KN(base_model=base)
    with mend.edit(requests[:1]) as first:
        mixed = [first, MEMIT(base_model=base).edit(requests[1:8])]
        with mixed[1]:
            mixed.append(ROME(base_model=base).edit(requests[8:9]))
    return {
        "MEND": [first],
        # One that changes answers: many edits of KN change none.
        "KN": [kn.edit(requests[4:5])],
        "MEND, MEMIT, ROME": mixed,
    }


def convert(llama_cpp: Path, script: str, *words: str | Path) -> None:
    """Run a converter of llama.cpp."""
    command = [sys.executable, "-c", CONVERT, llama_cpp / script, *words, "--outtype", "f32"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script} ended with status {done.returncode}:\n{done.stderr[-2000:]}")


@torch.no_grad()
def of_model(model: torch.nn.Module, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Greedy tokens behind each prompt."""
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(TOKENS):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


def of_llama_cpp(model: Path, adapter: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Greedy tokens behind each prompt, by llama.cpp."""
    engine = Llama(
        str(model),
        lora_path=str(adapter),
        n_ctx=256,
        logits_all=True,
        type_k=FLOAT32,
        type_v=FLOAT32,
        verbose=False,
    )
    answers = []
    for prompt in prompts:
        engine.reset()
        engine.eval(list(prompt))
        found: list[int] = []
        while len(found) < TOKENS:
            found.append(int(engine.scores[engine.n_tokens - 1].argmax()))
            engine.eval(found[-1:])
        answers.append(found)
    return answers


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-cpp", type=Path, required=True, help="a checkout of llama.cpp")
    parser.add_argument("--questions", type=int, default=60, help="how many are asked")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    base = BaseModel.load("nano")
    examples = NanoFacts(limit=10, seed=0).examples("test")
    questions = [probe.prompt for example in examples for probe in example.probes]
    prompts = [base.encode(question).prompt for question in questions[: given.questions]]
    names = ", ".join(f"{n} {version(n)}" for n in ("torch", "peft", "llama-cpp-python", "gguf"))
    print(f"{len(prompts)} questions, {TOKENS} tokens each; {names}\n")
    print("| edits | changed answers | peft | llama.cpp, converted | llama.cpp, gguf-lora |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        folder, gguf = Path(root, "base"), Path(root, "base.gguf")
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        convert(given.llama_cpp, "convert_hf_to_gguf.py", folder, "--outfile", gguf)
        plain = of_model(base.model, prompts)
        for number, (name, edits) in enumerate(stacks(base, examples).items()):
            adapter, converted = Path(root, f"adapter{number}"), Path(root, f"{number}.gguf")
            save_adapter(base, edits, adapter)
            words = (adapter, "--base", folder, "--outfile", converted)
            convert(given.llama_cpp, "convert_lora_to_gguf.py", *words)
            own = save_gguf_adapter(base, edits, Path(root, f"own{number}.gguf"))
            for edit in edits:
                edit.apply()
            wanted = of_model(base.model, prompts)
            base.edits.clear()
            fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype)
            found = [
                of_model(PeftModel.from_pretrained(fresh, str(adapter)), prompts),
                of_llama_cpp(gguf, converted, prompts),
                of_llama_cpp(gguf, own, prompts),
            ]
            equal = [sum(a == b for a, b in zip(wanted, answers, strict=True)) for answers in found]
            changed = sum(a != b for a, b in zip(wanted, plain, strict=True))
            print(f"| {name} | {changed} | {' | '.join(map(str, equal))} |", flush=True)


if __name__ == "__main__":
    main()
