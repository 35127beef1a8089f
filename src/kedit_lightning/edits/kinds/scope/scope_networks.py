"""The two networks of SERAC: scope classifier and counterfactual model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig

from kedit_lightning.edits.kinds.scope.counterfactual import LanguageModel, check_description
from kedit_lightning.edits.state_schema import check_names, check_tensor
from kedit_lightning.errors import EditFileError, UnsupportedUseError

#: Tables that a language model keeps beside its weights, such as masks, may take this much.
_BUFFER_BYTES = 1 << 26


@dataclass(frozen=True)
class ScopePlan:
    """Shape of the networks.

    Args:
        module: Block of the base model whose output the scope classifier reads.
        hidden_width: Width of that output.
        scope_width: Width of the embeddings of questions and edits.
        token_width: Width of the base model's token embeddings, and of the counterfactual model.
        blocks: Blocks of the counterfactual model.
        embedding_scale: Factor that gives the base model's token embeddings unit variance.
        counterfactual: Name of the language model that answers instead; empty for none.
        made_of: Result of ``counterfactual.describe`` for that model.
        own_tokens: Whether its tokenizer is another than the base model's.
    """

    module: str
    hidden_width: int
    scope_width: int
    token_width: int
    blocks: int
    embedding_scale: float
    counterfactual: str = ""
    made_of: dict[str, Any] | None = None
    own_tokens: bool = False


def heads_of(width: int) -> int:
    """Number of attention heads: 64 wide if possible, and of even width for rotary positions.

    >>> heads_of(256), heads_of(1600), heads_of(32), heads_of(100)
    (4, 25, 1, 1)
    """
    fits = (h for h in range(width // 64, 1, -1) if width % h == 0 and width // h % 2 == 0)
    return next(fits, 1)


def _small_decoder(plan: ScopePlan, dtype: torch.dtype) -> nn.Module:
    """A decoder without token embeddings: it reads those of the base model."""
    config = LlamaConfig(
        vocab_size=1,
        hidden_size=plan.token_width,
        intermediate_size=2 * plan.token_width,
        num_hidden_layers=plan.blocks,
        num_attention_heads=heads_of(plan.token_width),
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    decoder: nn.Module = AutoModel.from_config(config, dtype=dtype)
    decoder.set_input_embeddings(nn.Identity())  # type: ignore[operator]
    return decoder


class ScopeNetworks(nn.Module):
    """Scope classifier and counterfactual model of Mitchell et al. 2022, section 3.

    The classifier reads hidden states of the base model.  The counterfactual model reads its token
    embeddings, which are not copied, or is a language model with a tokenizer of its own.  Weights
    are at least float32.
    """

    def __init__(self, plan: ScopePlan, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.plan = plan
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # With an explicit dtype, as precision plugins change the default.
            self.norm = nn.LayerNorm(plan.hidden_width, dtype=dtype)
            self.projection = nn.Linear(plan.hidden_width, plan.scope_width, dtype=dtype)
            model = plan.made_of
            self.decoder = LanguageModel(model, dtype) if model else _small_decoder(plan, dtype)

    @classmethod
    def restored(
        cls, plan: ScopePlan, weights: Mapping[str, Tensor], dtype: torch.dtype
    ) -> ScopeNetworks:
        """Networks with these weights.

        Raises:
            EditFileError: The weights are not those of the plan, which is found out before memory
                is taken for networks of that size.
        """
        largest = max((size for tensor in weights.values() for size in tensor.shape), default=0)
        sizes = [plan.hidden_width, plan.scope_width]
        sizes += [] if plan.made_of else [plan.token_width]
        if any(not 0 < size <= largest for size in sizes) or not 0 <= plan.blocks <= len(weights):
            raise EditFileError(
                f"the plan names widths {sizes} and {plan.blocks} blocks, and the file has "
                f"{len(weights)} network tensors that are at most {largest} wide"
            )
        if plan.own_tokens and not plan.made_of:
            raise EditFileError("the plan says own_tokens without a counterfactual model")
        if plan.made_of:
            check_description(plan.made_of, len(weights))
        with torch.device("meta"):  # shapes alone
            empty = cls(plan, dtype=dtype)
        needed = empty.state_dict()
        check_names("the set of networks", weights, needed)
        for name, tensor in needed.items():
            check_tensor(name, weights[name], tensor.shape, [tensor.dtype])
        payload = sum(tensor.nbytes for tensor in weights.values())
        if sum(buffer.nbytes for buffer in empty.buffers()) > max(payload, _BUFFER_BYTES):
            raise EditFileError("the networks would need far more memory than the file has")
        networks = cls(plan, dtype=dtype)
        networks.load_state_dict(dict(weights))
        return networks

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.projection.weight.dtype

    def embed(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Embed questions: mean hidden state, normalised and projected.

        Shape ``[batch, scope_width]`` from hidden states of the base model, ``[batch, tokens,
        hidden_width]``, and a mask that is True on tokens of the question, ``[batch, tokens]``.
        """
        if hidden.shape[-1] != self.plan.hidden_width:
            raise UnsupportedUseError(
                f"a scope classifier of width {self.plan.hidden_width} does not fit module "
                f"'{self.plan.module}', whose output is {hidden.shape[-1]} wide"
            )
        kept = mask.to(hidden.device).bool()[..., None]
        # Selected, not multiplied, since hidden states of padding may be NaN.
        total = torch.where(kept, hidden.to(self.dtype), 0.0).sum(1)
        with torch.autocast(hidden.device.type, enabled=False):  # distances decide by digits
            embedded: Tensor = self.projection(self.norm(total / kept.sum(1)))
        return embedded

    def distances(self, questions: Tensor, keys: Tensor) -> Tensor:
        """``‖e(x) - e(x')‖²``. Shape ``[batch, n]`` from ``[batch, d]`` and ``[n, d]``.

        The similarity of the paper is ``exp`` of minus this, with its κ = 1.
        """
        return (questions[:, None] - keys[None]).square().sum(-1)

    def answer_states(self, ids: Tensor, embedding: Tensor) -> Tensor:
        """Last hidden states of the counterfactual model. Shape ``[batch, tokens, token_width]``.

        Args:
            ids: Statement, separator, question and answer, padded on the right, which needs no mask
                under causal attention. Shape ``[batch, tokens]``.
            embedding: Token embeddings of the base model. Shape ``[vocab, token_width]``.
        """
        # Tokens that stand for pictures may have no embedding; any one will do.
        known = ids.clamp(max=len(embedding) - 1)
        x = embedding[known].to(self.dtype) * self.plan.embedding_scale
        states: Tensor = self.decoder(inputs_embeds=x, use_cache=False).last_hidden_state
        return states

    def logits(self, states: Tensor, embedding: Tensor) -> Tensor:
        """Shape ``[..., vocab]`` from ``[..., token_width]``, over the base model's vocabulary."""
        scale = self.plan.embedding_scale / self.plan.token_width**0.5
        logits: Tensor = (states * scale) @ embedding.to(states.dtype).T
        return logits

    def answer_logits(self, ids: Tensor, places: tuple[Tensor, ...], embedding: Tensor) -> Tensor:
        """Logits ``[n, vocab]`` at some places, over the counterfactual model's vocabulary.

        Args:
            ids: As of :meth:`answer_states`.
            places: Rows and columns, or a mask ``[batch, tokens]`` alone.
            embedding: Token embeddings of the base model. Shape ``[vocab, token_width]``.
        """
        if isinstance(self.decoder, LanguageModel):
            logits: Tensor = self.decoder(ids)[places]
            return logits
        return self.logits(self.answer_states(ids, embedding)[places], embedding)

    def digest(self) -> str:
        """Short hash of shape and weights; edits with equal hashes share a memory."""
        digest = hashlib.sha256(json.dumps(asdict(self.plan), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]
