"""A method for tests that needs no training and whose edits follow from the requests alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from kedit_lightning import BaseModel, BaseModelSpec, Edit, EditRequest
from kedit_lightning.edits import LowRankEdit
from kedit_lightning.methods.method import Capabilities, EditMethod


class Toy(EditMethod):
    """Pushes the last block's MLP output at the last prompt token towards the answer's first token.

    Args:
        strength: Length of the push.
        noise: Share of random numbers in the update, drawn from the global generator.
        fail_on: Part of a prompt on which it fails.
        base_model: The model to edit.
        seed: Start of all random choices; that of the run when absent.
    """

    can: ClassVar[Capabilities] = Capabilities(adapter=True, weights=True)
    computed: ClassVar[list[list[str]]] = []

    def __init__(
        self,
        strength: float = 30.0,
        noise: float = 0.0,
        fail_on: str | None = None,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)
        self.save_hyperparameters(ignore=["base_model"])

    def compute_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One rank a request."""
        self.computed.append([request.prompt for request in requests])
        name, keys, values = self._place(), [], []
        for request in requests:
            if self.hparams["fail_on"] and self.hparams["fail_on"] in request.prompt:
                from kedit_lightning.errors import NonFiniteError

                raise NonFiniteError(f"the toy fails on purpose for {request.label}")
            key, value = self._pair(name, request)
            keys.append(key / key.dot(key))
            values.append(value)
        a, b = torch.stack(keys), torch.stack(values, dim=1)
        b = b + self.hparams["noise"] * torch.randn(b.shape, dtype=b.dtype)
        return LowRankEdit(self.base, {name: (a, b)}, self.origin(requests))

    def _place(self) -> str:
        names = [n for n, _ in self.base.model.named_modules()]
        ends = ("mlp.c_proj", "mlp.down_proj", "mlp.dense_4h_to_h")
        return [n for n in names if n.endswith(ends)][-1]

    @torch.no_grad()
    def _pair(self, name: str, request: EditRequest) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.base.rows([request.prompt], [request.target_new])
        seen: list[torch.Tensor] = []
        handle = self.base.module(name).register_forward_hook(
            lambda module, args, output: seen.append(args[0])
        )
        try:
            self.base.forward(rows)
        finally:
            handle.remove()
        key = seen[0][0, int(rows.prompt_end[0])]
        direction = self.base.model.get_output_embeddings().weight[rows.answer_ids[0, 0]]
        return key, self.hparams["strength"] * direction / direction.norm()


class Learner(Toy):
    """The same with something to learn, which its edits do not use."""

    learns: ClassVar[str] = "a linear layer"

    def build(self) -> None:
        """Create the layer."""
        self.net = torch.nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Make its weights small."""
        return self.net(torch.ones(1, 2, device=self.device)).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.net.parameters(), lr=0.1)
