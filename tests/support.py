"""Tiny models and tokenizers, built from configurations: nothing is downloaded."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from kedit_lightning import BaseModel, EditRequest

TEXT = [
    "The Eiffel Tower is in the city of Paris. Rome is the capital of Italy.",
    "The mother tongue of Marie Curie is Polish. She was born in Warsaw.",
    "What country is Lyon in? It is in France. Question: New Fact: Prompt:",
    "Amber Falls lies in Norway. The company Bolt was founded in Berlin by Anna Weiss.",
]
WIDTH = 32
SHARED = {"vocab_size": 384, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA_LIKE = {
    **SHARED,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {**SHARED, "n_embd": WIDTH, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "llama": LLAMA_LIKE,
    "gpt_neox": LLAMA_LIKE,
    "opt": {  # its MLPs run on rows that are flattened
        **SHARED,
        "hidden_size": WIDTH,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": WIDTH,
    },
    "mamba": {**SHARED, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 4},
    "t5": {
        **SHARED,
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 3,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    },
}
#: Absolute positions and no BOS, rotary positions and BOS, a parallel block with biases.
FAMILIES = ("gpt2", "llama", "gpt_neox")


@cache
def tiny_tokenizer(bos: bool) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of 384 entries, with or without a beginning-of-sequence token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


#: A chat template with a beginning-of-sequence token.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer(bos: bool) -> Any:
    """A copy of the tiny tokenizer that has a chat template."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tiny_tokenizer(bos).backend_tokenizer.to_str()),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(kind: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A model of a family with random weights, the same at every call."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, **{**SETTINGS.get(kind, LLAMA_LIKE), **settings}
    )
    loader = (
        transformers.AutoModelForSeq2SeqLM
        if config.is_encoder_decoder
        else transformers.AutoModelForCausalLM
    )
    model = loader.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # larger than the usual start, so that answers differ
                parameter.mul_(4.0)
    return model.to(dtype).eval()


def tiny_base(kind: str, dtype: torch.dtype = torch.float64, **settings: Any) -> BaseModel:
    """A base model of a family with random weights."""
    return BaseModel(tiny_model(kind, dtype, **settings), tiny_tokenizer(kind != "gpt2"), name=kind)


#: Descriptions of the tasks of ``REQUESTS``.
TASKS = {
    "city": ["Tell the city.", "Name a city.", "Say in which city it is."],
    "birth": ["Tell the birthplace.", "Name where she was born.", "Say where she was born."],
    "country": ["Tell the country.", "Name a country.", "Say what country it is in."],
}
#: Facts whose prompts differ in length, with the subject first, in the middle and last.
REQUESTS = [
    EditRequest(
        "The Eiffel Tower is in the city of", "Rome", "Eiffel Tower", "Paris", "tower", "city"
    ),
    EditRequest("Marie Curie was born in", "Berlin", "Marie Curie", "Warsaw", "curie", "birth"),
    EditRequest("What country is Lyon in? It is in", "Norway", "Lyon", "France", "lyon", "country"),
    EditRequest("Amber Falls lies in", "Italy", "Amber Falls", "Norway", "falls", "country"),
]
