"""A method of your own: LoRA, trained with peft, then detached and returned as an edit."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer

from kedit_lightning import BaseModel, EditRequest
from kedit_lightning.edits import AdapterEdit
from kedit_lightning.edits.projections import is_transposed
from kedit_lightning.methods import Capabilities, EditMethod, MethodSettings
from kedit_lightning.methods.finetune.shared.fine_tuning import fine_tune
from kedit_lightning.methods.shared.losses import answer_nll


@dataclass(frozen=True)
class LoRASettings(MethodSettings):
    rank: int


class LoRA(EditMethod):
    """A low-rank adapter of every down projection (https://arxiv.org/abs/2106.09685)."""

    can = Capabilities(adapter=True, weights=True)
    settings_type = LoRASettings
    settings: LoRASettings

    def __init__(self, base_model: BaseModel | str = "nano", rank: int = 8, seed=None) -> None:
        super().__init__(base_model, seed)

    def compute_edit(self, requests: Sequence[EditRequest]) -> AdapterEdit:
        base, rank, generator = self.base, self.settings.rank, self.generator(requests)
        encoded = [base.encode(request.prompt, request.target_new) for request in requests]
        names = [block.down for block in base.layout.dense_blocks]
        transposed = is_transposed(base.module(names[0]))
        config = LoraConfig(r=rank, target_modules=names, fan_in_fan_out=transposed)
        with torch.random.fork_rng():  # peft draws A from the global generator
            torch.manual_seed(generator.initial_seed())
            adapter = LoraModel(base.model, config, "default")
        layers = {n: m for n, m in base.model.named_modules() if isinstance(m, LoraLayer)}
        a = {name: layer.lora_A["default"].weight for name, layer in layers.items()}
        b = {name: layer.lora_B["default"].weight for name, layer in layers.items()}

        def loss(batch: list[int]) -> torch.Tensor:
            rows = base.pad([encoded[index] for index in batch])
            return answer_nll(base.answer_logits(rows), rows.answer_ids, rows.answer_mask).mean()

        try:
            fine_tune([*a.values(), *b.values()], len(encoded), loss, generator, lr=1e-3, epochs=50)
        finally:
            adapter.unload()
        factors = {n: (a[n], b[n] * layers[n].scaling["default"]) for n in layers}
        return AdapterEdit(base, factors, self.origin(requests))


if __name__ == "__main__":
    with LoRA().edit([EditRequest("The capital of France is", "Lyon")]) as edit:
        print(edit.base.generate(["The capital of France is", "The capital of Italy is"]))
