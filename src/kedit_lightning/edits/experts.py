"""Experts of a mixture whose matrices lie in one parameter, as projections that edits can change.

A token's output of such a mixture is ``Σ_e g_e (W_e k_e + b_e)`` over the experts that its router
picks: ``g_e`` is the weight it gives to expert ``e``, and ``k_e`` the expert's inner activation,
the key of its down projection ``W_e``.  For single experts all of that is computed once more from
what the experts are called with, so that a change of ``W_e`` is added without touching weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

#: Relative difference up to which a recomputed output is the experts' own, by bytes of the dtype.
_SAME = {8: 1e-6, 4: 1e-3, 2: 5e-2}
#: Tokens that experts are tried with.
_TRIED = 4


@dataclass(frozen=True)
class Routing:
    """Which experts the tokens of a call go to.

    Args:
        states: What experts receive: ``[tokens, hidden]``, or ``[experts, tokens, hidden]`` where
            each receives copies of its own.
        gates: Weight of each expert's output, 0 where it is not picked. ``[tokens, experts]``.
    """

    states: Tensor
    gates: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens that go to an expert, ``[n]``, what it receives, ``[n, hidden]``, and weights."""
        gate = self.gates[:, expert]
        states = self.states if self.states.dim() == 2 else self.states[expert]
        if torch.compiler.is_compiling():
            # A graph holds no numbers that depend on data; tokens that go elsewhere have weight 0.
            token = torch.arange(len(gate), device=gate.device)
        else:
            token = gate.nonzero()[:, 0]
        return token, states[token], gate[token]


class RoutedExperts:
    """The experts of one block, with their matrices in few parameters.

    Args:
        module: The module whose output is their weighted sum.
    """

    #: Name of the parameter of down projections inside the module.
    parameter: ClassVar[str] = "down_proj"

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self._first = "up_proj" if hasattr(module, "up_proj") else "gate_up_proj"

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Whether a module has the parameters of such experts."""
        down, first = (getattr(module, n, None) for n in ("down_proj", "gate_up_proj"))
        first = getattr(module, "up_proj", None) if first is None else first
        # One that shards or quantises them holds another kind of tensor, or none.
        return all(isinstance(p, nn.Parameter) and p.dim() == 3 for p in (down, first))

    # ---- matrices

    @property
    def transposed(self) -> bool:
        """Whether matrices are stored as ``[d_in, d_out]``."""
        stated = getattr(self.module, "is_transposed", None)
        if stated is not None:
            return bool(stated)
        first, down = getattr(self.module, self._first), self.module.down_proj
        return bool(first.shape[2] != down.shape[1])

    @property
    def fused(self) -> Tensor:
        """The parameter of down projections."""
        # No `get_parameter`: peft makes it a property of the module while it trains the experts.
        return attrgetter(self.parameter)(self.module)  # type: ignore[no-any-return]

    def matrices(self, fused: Tensor) -> Tensor:
        """The parameter of down projections, or one like it, as ``[experts, d_out, d_in]``."""
        return fused.mT if self.transposed else fused

    @property
    def biases(self) -> tuple[str, Tensor] | None:
        """Parameter of the biases of down projections, ``[experts, d_out]``, if they have any."""
        bias = getattr(self.module, f"{self.parameter}_bias", None)
        return None if bias is None else (f"{self.parameter}_bias", bias)

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self.matrices(self.fused))

    @property
    def width_out(self) -> int:
        """Width of what they write."""
        return self.matrices(self.fused).shape[1]

    @property
    def is_gated(self) -> bool:
        """Whether inner activations are products with those of a gate."""
        return self._first != "up_proj"

    # ---- what happens in a call

    def routing(self, args: Sequence[Any]) -> Routing:
        """Where tokens go, from the arguments of the module's call."""
        states, index, weights = args[0].reshape(-1, args[0].shape[-1]), args[1], args[2]
        # Those beyond the last are no matrices: they pass tokens on, or are on another device.
        gates = weights.new_zeros(len(states), self.count + 1)
        gates = gates.scatter_add(1, index.clamp(max=self.count), weights)
        return Routing(states, gates[:, :-1])

    def keys(self, expert: int, states: Tensor) -> Tensor:
        """Inner activations of an expert, ``[n, d_in]``, from what it receives, ``[n, hidden]``."""
        module = self.module
        matrix, bias = getattr(module, self._first), getattr(module, f"{self._first}_bias", None)
        inner = states @ (matrix[expert] if self.transposed else matrix[expert].T)
        inner = inner if bias is None else inner + bias[expert]
        if not self.is_gated:
            return module.act_fn(inner)  # type: ignore[no-any-return]
        if hasattr(module, "_apply_gate"):
            return module._apply_gate(inner)  # type: ignore[no-any-return]
        gate, up = inner.chunk(2, dim=-1)
        return module.act_fn(gate) * up  # type: ignore[no-any-return]

    def gated_keys(self, routing: Routing, expert: int) -> Tensor:
        """``g_e k_e`` of all tokens, 0 where the expert is not picked. ``[tokens, d_in]``."""
        token, states, gate = routing.of(expert)
        keys = self.keys(expert, states) * gate[:, None]
        zeros = keys.new_zeros(len(routing.gates), keys.shape[1])
        return zeros.index_add(0, token, keys)

    # ---- whether it is so

    def _trial(self, states: Tensor) -> tuple[Any, ...]:
        """Arguments of a call with states of ``[tokens, hidden]``, which go to two experts each."""
        index = torch.tensor([0, self.count - 1], device=states.device).expand(len(states), 2)
        weights = torch.tensor([0.75, 0.5]).to(states).expand(len(states), 2)
        return states, index.contiguous(), weights.contiguous()

    def _rest(self, output: Tensor) -> Tensor:
        """A module's output without what it adds to the sum of experts."""
        return output

    @torch.no_grad()
    def is_understood(self) -> bool:
        """Whether keys, matrices and weights give the output of the module's own call."""
        fused = self.fused
        if fused.is_meta:  # offloaded, so that its type alone tells
            return True
        drawn = torch.randn(_TRIED, self._width, generator=torch.Generator().manual_seed(0))
        args = self._trial(drawn.to(fused.device, fused.dtype))
        output = self._rest(self.module.forward(*args).reshape(-1, self.matrices(fused).shape[1]))
        routing, total = self.routing(args), torch.zeros(_TRIED, output.shape[1]).to(output)
        for expert in range(self.count):
            token, states, gate = routing.of(expert)
            values = self.keys(expert, states) @ self.matrices(fused)[expert].T
            values = values if self.biases is None else values + self.biases[1][expert]
            total = total.index_add(0, token, (values * gate[:, None]).to(total))
        output = output.reshape(-1, *total.shape).sum(0)
        return bool((total - output).norm() <= _SAME[fused.dtype.itemsize] * output.norm())

    @property
    def _width(self) -> int:
        """Width of what experts receive."""
        shape: tuple[int, ...] = getattr(self.module, self._first).shape
        return shape[1 if self.transposed else 2]


class ScaledExperts(RoutedExperts):
    """Experts of Llama 4: each receives all tokens times its weight, 0 where it is not picked."""

    @classmethod
    def fits(cls, module: Any) -> bool:
        """See the base class; such experts are not told where tokens go."""
        return super().fits(module) and type(module).__name__.startswith("Llama4")

    def routing(self, args: Sequence[Any]) -> Routing:
        """Where tokens go: experts' copies of all tokens follow each other."""
        states = args[0].reshape(self.count, -1, args[0].shape[-1])
        return Routing(states, (states != 0).any(-1).T.to(states))

    def _trial(self, states: Tensor) -> tuple[Any, ...]:
        copies = states.repeat(self.count, 1, 1)
        copies[1:-1] = 0
        return (copies.reshape(-1, states.shape[1]),)


class FlatExperts(RoutedExperts):
    """Experts of DBRX: the matrices of all experts in one, ``[experts · d_in, d_out]``."""

    parameter = "mlp.w2"
    transposed = True

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Whether a module has the parameters of such experts."""
        inner = getattr(module, "mlp", None)
        named = [getattr(inner, name, None) for name in ("w1", "v1", "w2")]
        return hasattr(module, "num_experts") and all(
            isinstance(p, nn.Parameter) and p.dim() == 2 for p in named
        )

    @property
    def biases(self) -> None:
        """There are none."""

    def matrices(self, fused: Tensor) -> Tensor:
        """See the base class."""
        return fused.view(self.module.num_experts, -1, fused.shape[1]).mT

    def keys(self, expert: int, states: Tensor) -> Tensor:
        """See the base class."""
        inner, count = self.module.mlp, self.module.num_experts
        gate, up = (states @ w.view(count, -1, w.shape[1])[expert].T for w in (inner.w1, inner.v1))
        return inner.activation_fn(gate) * up  # type: ignore[no-any-return]

    @property
    def _width(self) -> int:
        return int(self.fused.shape[1])


class SortedExperts(RoutedExperts):
    """Experts of JetMoE: the block sorts tokens by expert for two modules of matrices."""

    parameter = "output_linear.weight"

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Whether a module is such a block; one of attention has no activation."""
        named = [getattr(module, name, None) for name in ("input_linear", "output_linear")]
        fused = [getattr(linear, "weight", None) for linear in named]
        matrices = all(isinstance(p, nn.Parameter) and p.dim() == 3 for p in fused)
        return matrices and hasattr(module, "router") and hasattr(module, "activation")

    @property
    def transposed(self) -> bool:
        """They are not."""
        return False

    @property
    def biases(self) -> None:
        """There are none: the block adds one after the sum."""

    def routing(self, args: Sequence[Any]) -> Routing:
        """Where tokens go; the router is asked once more."""
        states = args[0].reshape(-1, args[0].shape[-1])
        _, token, weights, sizes, _ = self.module.router(states)
        experts = torch.arange(self.count, device=token.device)
        expert = experts.repeat_interleave(torch.tensor(sizes, device=token.device))
        gates = weights.new_zeros(len(states), self.count)
        return Routing(states, gates.index_put((token, expert), weights))

    def keys(self, expert: int, states: Tensor) -> Tensor:
        """See the base class."""
        gate, up = (states @ self.module.input_linear.weight[expert].T).chunk(2, dim=-1)
        return self.module.activation(gate) * up  # type: ignore[no-any-return]

    def _trial(self, states: Tensor) -> tuple[Any, ...]:
        return (states[None],)

    def _rest(self, output: Tensor) -> Tensor:
        return output - self.module.bias  # type: ignore[no-any-return]

    @property
    def _width(self) -> int:
        return int(self.module.input_linear.weight.shape[2])


#: Ways to hold experts; the first that fits is taken.
FORMS = (ScaledExperts, RoutedExperts, FlatExperts, SortedExperts)
#: Experts of modules that have been tried; ``None`` for those that compute something else.
_KNOWN: WeakKeyDictionary[nn.Module, type[RoutedExperts] | None] = WeakKeyDictionary()


def routed_experts(module: nn.Module) -> RoutedExperts | None:
    """The experts that a module holds, if it does and computes what they should."""
    if module not in _KNOWN:
        _KNOWN[module] = None
        form = next((form for form in FORMS if form.fits(module)), None)
        with suppress(TypeError):  # it is called with something else than states, places, weights
            _KNOWN[module] = form if form is not None and form(module).is_understood() else None
    form = _KNOWN[module]
    return None if form is None else form(module)
