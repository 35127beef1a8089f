"""A language model that says what a test tells it to."""

from itertools import pairwise

import torch
import transformers
from support import tiny_tokenizer


def scripted_model(replies):
    """A model and its tokenizer; a text that ends in a key is continued by the reply, which ends.

    Each token follows from the one before it alone, so no token may have two successors.
    """
    tokenizer = tiny_tokenizer(False)
    size = len(tokenizer)
    config = transformers.GPT2Config(
        vocab_size=size, n_positions=64, n_embd=size, n_layer=1, n_head=1,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    after: dict[int, int] = {}
    for given, reply in replies.items():
        chain = [tokenizer(given)["input_ids"][-1], *tokenizer(reply)["input_ids"], 2]
        for token, successor in pairwise(chain):
            assert after.setdefault(token, successor) == successor, tokenizer.decode([token])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ln_" not in name:
                weight.zero_()
        model.transformer.wte.weight.copy_(torch.eye(size))
        model.lm_head.weight[[*after.values()], [*after]] = 1.0
    return model, tokenizer
