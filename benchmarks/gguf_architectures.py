r"""Adapters of every architecture written here, tensor by tensor beside llama.cpp's own converter.

    pip install gguf
    git clone https://github.com/ggml-org/llama.cpp
    python benchmarks/gguf_architectures.py --llama-cpp llama.cpp

For each ``model_type`` of ``edits/gguf_adapter.py`` a tiny random model gets an edit of all its
projections.  It is written by ``save_gguf_adapter``, and by ``save_adapter`` followed by
``convert_lora_to_gguf.py``; both files are read by the package ``gguf`` and compared.  GPT-2 is
left out: that converter transposes factors that peft stores untransposed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kedit_lightning import BaseModel
from kedit_lightning.edits import LowRankEdit, save_adapter, save_gguf_adapter
from kedit_lightning.edits.gguf_adapter import ARCHITECTURES
from kedit_lightning.edits.projections import find_module, projection_shape

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "pad_token_id": 0,
}


def tiny_model(kind: str) -> Any:
    """A random model of a type."""
    config = AutoConfig.for_model(kind)
    known = {name: value for name, value in SMALL.items() if hasattr(config, name)}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **known)).eval()


def random_edit(base: BaseModel) -> LowRankEdit:
    """Rank-three factors of all projections of the blocks, but for those that are refused."""
    torch.manual_seed(0)
    factors = {}
    for name, module in base.model.named_modules():
        taken = isinstance(module, torch.nn.Linear) and "lm_head" not in name
        if taken and not name.endswith(("query_key_value", "embed_out")):
            d_in, d_out = projection_shape(find_module(base.model, name))
            factors[name] = (torch.randn(3, d_in), torch.randn(d_out, 3))
    return LowRankEdit(base, factors)


def tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, by name."""
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-cpp", type=Path, required=True, help="a checkout of llama.cpp")
    script = parser.parse_args().llama_cpp / "convert_lora_to_gguf.py"
    tokenizer = BaseModel.load("nano").tokenizer
    print("| model type | tensors | equal to the converter's |\n|---|---|---|")
    for kind in sorted(set(ARCHITECTURES) - {"gpt2"}):
        with tempfile.TemporaryDirectory() as root:
            base = BaseModel(tiny_model(kind), tokenizer)
            edit = random_edit(base)
            own = tensors(save_gguf_adapter(base, [edit], Path(root, "own.gguf")))
            save_adapter(base, [edit], Path(root, "adapter"))
            config: Any = base.model.config
            config.architectures = [type(base.model).__name__]
            config.save_pretrained(Path(root, "base"))
            words = [script, Path(root, "adapter"), "--base", Path(root, "base")]
            words += ["--outfile", Path(root, "other.gguf"), "--outtype", "f32"]
            command = [sys.executable, *map(str, words)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"| {kind} | {len(own)} | {done.stderr.strip().splitlines()[-1][:80]} |")
                continue
            other = tensors(Path(root, "other.gguf"))
            equal = sum(n in other and np.array_equal(own[n], other[n]) for n in own)
            same = "" if own.keys() == other.keys() else " (other names)"
            print(f"| {kind} | {len(own)} | {equal}{same} |", flush=True)


if __name__ == "__main__":
    main()
