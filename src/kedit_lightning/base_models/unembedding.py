"""The final norm, from the last hidden state to the input of the head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kedit_lightning.base_models.blocks import read_probe, removing
from kedit_lightning.edits.projections import first_tensor
from kedit_lightning.errors import ModuleNotLocatedError

#: Relative difference below which two hidden states count as the same up to a factor: rounding in
#: bfloat16 gives some 3e-3.
_SAME = 2e-2


def find_final_norm(model: nn.Module, block: str, head: str) -> str | None:
    """Name of the module that normalises the last block's output for the head.

    It is the innermost module whose input is the one and whose output is the input of the other, up
    to a factor that some models multiply by; ``None`` where the head reads the output of the block
    itself, as in post-norm models.

    Raises:
        ModuleNotLocatedError: No single module leads from the one to the other.
    """
    hidden: list[Tensor] = []
    through: dict[str, tuple[Any, Any]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if name == block:
                hidden[:] = [first_tensor(output)]
                through.clear()
            elif name not in through:
                through[name] = _first(args), _first(output)

        return hook

    names = [name for name, _ in model.named_modules() if not name.startswith(f"{block}.")]
    with removing([model.get_submodule(n).register_forward_hook(note(n)) for n in names]):
        read_probe(model)
    wanted, _ = through.pop(head)
    for name, (before, after) in through.items():
        # A dropout, which has no parameters, changes nothing.
        weighted = any(True for _ in model.get_submodule(name).parameters())
        changes = weighted or not _is_scaled(after, hidden[0])
        if changes and _is_scaled(before, hidden[0], exactly=True) and _is_scaled(after, wanted):
            return name
    if _is_scaled(wanted, hidden[0]):
        return None
    config: Any = model.config
    raise ModuleNotLocatedError(
        f"no single module of model type '{config.model_type}' leads from its last block "
        f"'{block}' to its head '{head}', so hidden states cannot be turned into logits; use a "
        "model whose head follows its final norm"
    )


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and value else value


def _is_scaled(states: Any, others: Any, exactly: bool = False) -> bool:
    """Whether hidden states are others times a number, or times one."""
    both = isinstance(states, Tensor) and isinstance(others, Tensor)
    if not both or states.shape != others.shape:
        return False
    states, others = states.double(), others.double().to(states.device)
    factor = 1.0 if exactly else (states * others).sum() / others.square().sum()
    return bool((states - factor * others).norm() <= _SAME * states.norm())
