"""Long answers: how much of a passage of 150 tokens is said after it was written.

    python benchmarks/long_answers.py             a model of stock phrases, and nano
    python benchmarks/long_answers.py --models phrases --methods MEMIT AnyEdit:window=5

The tiny model is trained here in seconds, on passages made of stock phrases of five words;
a name decides which phrases follow. It is given a passage of thirty phrases in an order that it has
never seen. nano, which was trained on single sentences, is given a passage of counterfactual facts.
``recall`` and ``F`` are ROUGE-L on words of the free, greedy continuation, which may be half as
long again as the passage; ``p`` is the probability of the passage behind its prompt.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise

import torch
import transformers
import yaml
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from kedit_lightning import BaseModel, EditRequest, methods
from kedit_lightning.data import NanoFacts
from kedit_lightning.methods import EditMethod
from kedit_lightning.metrics.functional.passage_match import passage_rouge

#: Tokens of the passages.
LENGTH = 150
#: Words of a stock phrase, number of phrases, and names.
WORDS, PHRASES, NAMES = 5, 40, 10
#: Settings of the closed-form methods for the model of phrases.
PLACE = "layers=[0,1]:preserve=0.001:clamp=2"
#: Methods and their settings, by model.
METHODS = {
    "phrases": (
        f"MEMIT:{PLACE}",
        f"AnyEdit:window=5:{PLACE}",
        "UnKE:layer=1:lr=0.005:clamp=2",
        "UnKE:layer=1:lr=0.005:clamp=2:window=5",
    ),
    "nano": ("MEMIT", "AnyEdit:layers=[3,4]:preserve=1:clamp=4:window=1"),
}


def phrase_model(steps: int = 300) -> tuple[BaseModel, EditRequest]:
    """A tiny model of stock phrases, and a request for a passage of them in a new order."""
    rng = random.Random(0)
    words = [f"w{i}" for i in range(WORDS * PHRASES)]
    phrases = [words[i : i + WORDS] for i in range(0, len(words), WORDS)]
    names = [f"Name{i}" for i in range(NAMES)]
    ids = {word: i for i, word in enumerate(["<pad>", "</s>", "Tell", "of", *words, *names])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    shuffled = [i for _ in range(2) for i in rng.sample(range(PHRASES), PHRASES)]
    each = len(shuffled) // NAMES
    texts = {
        name: ["Tell", "of", name, *(w for p in part for w in phrases[p]), "</s>"]
        for name, part in zip(names, zip(*[iter(shuffled)] * each, strict=True), strict=True)
    }
    rows = torch.tensor([[ids[word] for word in text] for text in texts.values()])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(ids),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        schedule.step()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<pad>"
    )
    seen = {pair for text in texts.values() for pair in pairwise(text)}
    while True:  # no two phrases in a row as they were in training
        order = rng.sample(range(PHRASES), LENGTH // WORDS)
        if not any((phrases[a][-1], phrases[b][0]) in seen for a, b in pairwise(order)):
            break
    passage = " ".join(word for p in order for word in phrases[p])
    return BaseModel(model.eval(), fast), EditRequest(f"Tell of {names[0]}", passage, names[0])


def nano_passage() -> tuple[BaseModel, EditRequest]:
    """The packaged model, and a request for a passage of facts that it does not hold."""
    base, data = BaseModel.load("nano"), NanoFacts(limit=30)
    data.setup("test")
    prompt = "The history of Brenn is this:"
    facts = [example.requests[0] for example in data.examples("test")]
    text = " ".join(f"{fact.prompt} {fact.target_new}." for fact in facts[:18])
    ids = base.encode(prompt, text).answer[:LENGTH]
    return base, EditRequest(prompt, base.tokenizer.decode(ids), "Brenn")


def create(base: BaseModel, name: str) -> EditMethod:
    """A method by its name and settings, as ``NAME:setting=value:...``."""
    kind, *given = name.split(":")
    settings = {key: yaml.safe_load(value) for key, value in (g.split("=", 1) for g in given)}
    method: EditMethod = getattr(methods, kind)(base_model=base, **settings)
    return method


def said(base: BaseModel, request: EditRequest, method: EditMethod) -> tuple[float, float, float]:
    """ROUGE-L recall and F of the passage after it was written, and its probability."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edit = method.edit([request])
    with edit:
        (text,) = base.generate([request.prompt], max_new_tokens=LENGTH * 3 // 2)
    (probability,) = edit.origin.notes["target_probabilities"]
    recall, both = (
        passage_rouge(text, [request.target_new], "rougeL", part, "words")
        for part in ("recall", "fmeasure")
    )
    return recall, both, probability


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, a line as soon as it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--methods", nargs="+", help="NAME:setting=value:...")
    given = parser.parse_args(arguments)
    print("| model | method | recall | F | p | seconds |\n|---|---|---|---|---|---|")
    for model in given.models:
        base, request = phrase_model() if model == "phrases" else nano_passage()
        for name in given.methods or METHODS[model]:
            start = time.perf_counter()
            recall, both, probability = said(base, request, create(base, name))
            seconds = time.perf_counter() - start
            cells = f"{recall:.2f} | {both:.2f} | {probability:.2f} | {seconds:.0f}"
            print(f"| {model} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
