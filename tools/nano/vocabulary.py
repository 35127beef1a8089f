"""The byte-level BPE tokenizer of ``nano``."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]


def train_tokenizer(lines: Iterable[str], size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer that puts ``<s>`` in front of a text.

    Args:
        lines: the text to learn merges from.
        size: number of entries.
        max_length: longest row that the model takes.

    Returns:
        A fast tokenizer with offsets.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=SPECIAL,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.post_processor = processors.Sequence(
        [
            # Trimmed, so that a token's span leaves out the space before the word.
            processors.ByteLevel(trim_offsets=True, add_prefix_space=False),
            processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="right",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
