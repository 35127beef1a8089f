"""How the weights of a module are stored, and how to read them.

A weight may lie on another device or on disk between the calls of its module (accelerate), be
spread over processes, or be quantised in the way of one of several libraries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kedit_lightning.edits.projections import (
    base_layer,
    compute_dtype,
    find_module,
    oriented,
    projection_shape,
)
from kedit_lightning.errors import UnsupportedUseError

#: Libraries that quantise, by the package of the weight's class or of the module's.
_LIBRARIES = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "optimum": "quanto",
    "hqq": "HQQ",
    "gptqmodel": "GPTQ",
    "auto_gptq": "GPTQ",
    "awq": "AWQ",
    "compressed_tensors": "compressed-tensors",
}
#: What each kind of bitsandbytes' weights is called.
_BITS = {"Int8Params": "bitsandbytes, 8 bit", "Params4bit": "bitsandbytes, 4 bit"}


# ---- offloaded weights


@contextmanager
def loaded(module: nn.Module) -> Iterator[nn.Module]:
    """Inside, a module's own weights are where it computes, also if they are offloaded."""
    with align_module_device(module):
        yield module


def device_of(module: nn.Module) -> torch.device:
    """The device that a module computes on, or its first part that has tensors."""
    for part in module.modules():
        if has_offloaded_params(part):
            hook: Any = part._hf_hook
            return torch.device(hook.execution_device)
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            return tensor.device
    return torch.device("cpu")


def stored_tensors(
    model: nn.Module, state: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model by name, in the order of the names, each read when it is its turn.

    They are those of its ``state_dict``, or of a part of it, with names as without adapters.

    Those that are offloaded are loaded one module at a time, and of weights that are made of
    several tensors each is given by itself: ``down.weight.scale``.  Sharded tensors stay sharded.
    """
    for name, tensor in sorted((model.state_dict() if state is None else state).items()):
        if not isinstance(tensor, Tensor):
            continue
        if not tensor.is_meta:
            yield from _parts(name, tensor)
            continue
        owner, _, own = name.rpartition(".")
        with loaded(find_module(model, owner)) as module:
            yield from _parts(name, getattr(module, own).detach())


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if hasattr(tensor, "full_tensor") or not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    inner, _ = tensor.__tensor_flatten__()
    for part in sorted(inner):
        yield from _parts(f"{name}.{part}", getattr(tensor, part))


def write_weight(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a tensor of a module, where it is stored; an offloaded one then lies in memory."""
    if not has_offloaded_params(module):
        module.get_parameter(name).data.copy_(value)
        return
    hook: Any = module._hf_hook
    weights = hook.weights_map
    store = getattr(weights.dataset, "state_dict", weights.dataset)
    store[f"{weights.prefix}{name}"] = value.detach().cpu()


# ---- quantised weights


def quantisation(module: nn.Module) -> str | None:
    """How a projection's weight is quantised, such as ``"bitsandbytes, 4 bit"``, if it is."""
    weight: Any = getattr(module, "weight", None)
    inner = weight.data if isinstance(weight, nn.Parameter) else weight
    for held in (inner, weight, module):
        kind = type(held)
        library = _LIBRARIES.get(kind.__module__.partition(".")[0])
        if library == "GPTQ" and "awq" in kind.__name__.lower():
            return "AWQ"  # the package has modules of both
        if library == "bitsandbytes":
            return _BITS.get(type(weight).__name__)  # its other modules hold plain weights
        if library is not None:
            return library
    if hasattr(module, "quantization_scheme"):
        return "compressed-tensors"
    if hasattr(module, "qweight"):
        return "packed integers"
    # A number type of one byte needs a scale beside it.
    small = isinstance(weight, Tensor) and weight.dtype.itemsize == 1
    return str(weight.dtype).removeprefix("torch.") if small else None


def quantisation_of(model: nn.Module) -> str | None:
    """How the weights of a model are quantised, if they are: as those of the first projection."""
    known = next(filter(None, map(quantisation, model.modules())), None)
    if known is None and getattr(model, "is_quantized", False):
        method = getattr(model, "quantization_method", "in an unknown way")
        return str(getattr(method, "value", method))
    return known


def must_stay(model: nn.Module) -> bool:
    """Whether weights of a model are quantised, spread by a device map, or offloaded."""
    if getattr(model, "hf_device_map", None) or quantisation_of(model) is not None:
        return True
    return any(has_offloaded_params(part) for part in model.modules())


@torch.no_grad()
def matrix_of(module: nn.Module) -> Tensor:
    """The matrix of a projection, dequantised, in at least float32. Shape ``[d_out, d_in]``.

    Raises:
        UnsupportedUseError: It is quantised in a way that cannot be read.
    """
    module = base_layer(module)
    d_in, d_out = projection_shape(module)
    kind = quantisation(module)
    with loaded(module):
        weight: Any = getattr(module, "weight", None)
        if kind is None:
            return oriented(weight.detach().to(compute_dtype(weight.dtype), copy=True), module)
        try:
            matrix = _dequantised(module, kind)
        except Exception as error:  # libraries fail in their own ways
            raise _unreadable(module, kind, repr(error)[:200]) from error
    if tuple(matrix.shape) not in {(d_out, d_in), (d_in, d_out)} or matrix.dtype.itemsize == 1:
        raise _unreadable(module, kind, f"it reads as {tuple(matrix.shape)}, {matrix.dtype}")
    matrix = matrix if tuple(matrix.shape) == (d_out, d_in) else matrix.T
    # Weights that are unpacked already are handed out as they are.
    return matrix.detach().to(compute_dtype(matrix.dtype), copy=True)


def rows_of(module: nn.Module, index: Tensor) -> Tensor:
    """Some rows of the matrix of a projection or of an embedding, in at least float32.

    Shape ``[n, d]`` for an index of shape ``[n]``, on the module's device.
    """
    if quantisation(module) is not None:
        return matrix_of(module)[index.to(device_of(module))]
    with loaded(module):
        weight: Any = module.weight
        rows: Tensor = weight.detach()[index.to(weight.device)]
        return rows.to(compute_dtype(rows.dtype))


def _dequantised(module: Any, kind: str) -> Tensor:
    """A quantised weight as its library reads it."""
    for name in ("dequantize_weight", "dequantize"):  # of GPTQ, of HQQ
        if hasattr(module, name):
            return getattr(module, name)()  # type: ignore[no-any-return]
    if kind not in {*_BITS.values(), *_LIBRARIES.values()}:
        raise ValueError("nothing tells its scales")
    if kind not in _BITS.values():
        return module.weight.dequantize()  # type: ignore[no-any-return]
    import bitsandbytes.functional as bits

    weight = module.weight
    matrix: Tensor
    if weight.dtype == torch.int8:
        # They move to the state in the first pass.
        scales = module.state.SCB if weight.SCB is None else weight.SCB
        matrix = bits.int8_vectorwise_dequant(weight.data, scales)
    else:
        matrix = bits.dequantize_4bit(weight.data, weight.quant_state)
    return matrix


def _unreadable(module: nn.Module, kind: str, reason: str) -> UnsupportedUseError:
    return UnsupportedUseError(
        f"the weight of a {type(module).__name__} is quantised ({kind}) and cannot be read as a "
        f"matrix ({reason}); load the base model without quantization"
    )


def dense_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A projection of the plain type that the architecture has, with the matrix of a quantised one.

    Raises:
        UnsupportedUseError: The weight cannot be read.
    """
    d_in, d_out = projection_shape(module)
    matrix = matrix_of(module).to(dtype)
    bias = getattr(module, "bias", None)
    source = getattr(module, "source_cls", None)  # what bitsandbytes' module stands for
    if source is not None and source.__name__ == "Conv1D":
        plain: Any = source(d_out, d_in)
        plain.weight = nn.Parameter(matrix.T.contiguous(), requires_grad=False)
    else:
        plain = nn.Linear(d_in, d_out, bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(matrix, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
    plain.train(module.training)
    copied: nn.Module = plain
    return copied


def settle_weights(model: nn.Module) -> None:
    """Bring weights into the form that passes leave them in, so that reading them changes nothing.

    RWKV rescales its own in the first pass of a mode.  On some processors bitsandbytes packs
    4-bit weights for the host in the first pass without gradients; that rounds their scales, and no
    gradient passes through them afterwards, so they are kept from it.
    """
    for module in model.modules():
        rescale = getattr(module, "_rescale_layers", None)
        if callable(rescale):
            rescale()
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", 0):
                module.state_dict()  # unpacks them
