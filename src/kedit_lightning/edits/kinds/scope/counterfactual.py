"""A language model as counterfactual model, with its own tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypedDict

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

from kedit_lightning.decoding_settings import neutral_options
from kedit_lightning.edits.state_schema import check_names, check_value
from kedit_lightning.errors import EditFileError, UnsupportedUseError, article_list

#: Longest answer, in the model's own tokens.
_LONGEST = 64
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def describe(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Configuration and tokenizer of a language model as plain values, without its weights."""
    named = {name: getattr(tokenizer, name, None) for name in _SPECIAL}
    return {
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special": {name: str(token) for name, token in named.items() if token is not None},
    }


class _Description(TypedDict):
    config: dict[str, Any]
    tokenizer: str
    special: dict[str, Any]


#: Settings that make a configuration or a model repeat something.
_COUNT = re.compile(r"^num_|(layers?|heads?|experts|blocks|labels|depth)$")
_MOST = 512


def check_description(made_of: Mapping[str, Any], tensors: int) -> None:
    """Refuse a description, read from a file, that repeats parts without end or names other code.

    Args:
        made_of: What :func:`describe` gave.
        tensors: How many tensors the model has.

    Raises:
        EditFileError: The message names the setting.
    """
    check_value("the counterfactual model", made_of, _Description)
    check_names("special tokens", made_of["special"], (), _SPECIAL)
    check_value("its special tokens", list(made_of["special"].values()), list[str])
    wrong, pending = [], [made_of["config"]]
    while pending:
        for name, value in pending.pop().items():
            pending += [value] if isinstance(value, dict) else []
            count = isinstance(value, int) and bool(_COUNT.search(str(name)))
            code = name == "auto_map" or str(name).endswith("implementation")  # of attention
            if (count and value > max(_MOST, tensors)) or (code and "/" in str(value)):
                wrong.append(str(name))
    if wrong:
        raise EditFileError(f"the counterfactual model cannot have such {article_list(wrong, 4)}")


class LanguageModel(nn.Module):
    """A decoder of ``transformers`` with its tokenizer, rebuilt from :func:`describe`."""

    def __init__(self, made_of: Mapping[str, Any], dtype: torch.dtype) -> None:
        super().__init__()
        config = AutoConfig.for_model(**made_of["config"])
        self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(made_of["tokenizer"]), **made_of["special"]
        )
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: with dropout, resumed training would not repeat its steps."""
        return super().train(False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[batch, tokens, vocab]`` of rows that are padded on the right.

        Raises:
            UnsupportedUseError: A row is longer than the model takes.
        """
        self._check_length(ids.shape[1])
        # Attention is causal, so padding on the right needs no mask.
        mask = torch.ones_like(ids)
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits

    @property
    def longest(self) -> int | None:
        """Longest row it takes, in its own tokens; ``None`` where there is no bound."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def _check_length(self, width: int) -> int:
        """How many tokens an answer to ``width`` tokens can have."""
        most = self.longest
        room = _LONGEST if most is None else most - width
        if room < 0:
            raise UnsupportedUseError(
                f"a fact and a question take {width} tokens together, and the counterfactual model "
                f"takes at most {most}; shorten them, or name another model in `counterfactual`"
            )
        return room

    @torch.no_grad()
    def answers(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Continue prompts, given as token ids, greedily up to the end-of-sequence token.

        Raises:
            UnsupportedUseError: A prompt is longer than the model takes.
        """
        end = self.tokenizer.eos_token_id
        width, device = max(map(len, prompts)), self.model.device
        room = self._check_length(width + 1) + 1  # for one token at least
        ids = torch.tensor([[end or 0] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        options = neutral_options(self.model.generation_config.to_dict())
        options |= {"max_new_tokens": min(_LONGEST, room), "eos_token_id": end}
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        output = self.model.generate(**inputs, pad_token_id=end or 0, **options)
        texts = self.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return [text.strip() for text in texts]
