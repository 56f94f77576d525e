"""The form of an attention mask, and its evaluation for one query chunk and one KV block.

A mask is a function of four indices: ``b`` (batch row), ``h`` (query head), ``q`` (query, counted
from 0 within the new tokens) and ``kv`` (key, absolute, in ``[0, past + n)``), of the lengths
``past`` (tokens already in the cache) and ``n`` (new tokens), and of tensors that it reads.

Legend: B batch, Hq query heads, n new tokens, kv keys.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

#: Index variables, in the order of the dimensions of a mask.
AXES = ("b", "h", "q", "kv")

_INFIX: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "add": ("+", operator.add),
    "sub": ("-", operator.sub),
    "mul": ("*", operator.mul),
    "floordiv": ("//", operator.floordiv),
    "mod": ("%", operator.mod),
    "le": ("<=", operator.le),
    "lt": ("<", operator.lt),
    "ge": (">=", operator.ge),
    "gt": (">", operator.gt),
    "eq": ("==", operator.eq),
    "ne": ("!=", operator.ne),
    "and": ("and", operator.and_),
    "or": ("or", operator.or_),
}


@dataclass(frozen=True)
class Expr:
    """A node of a mask expression; built with :func:`make`, :func:`const` and :func:`load`.

    ``op`` is an axis, ``"past"``, ``"n"``, ``"true"``, ``"false"``, ``"const"`` (one number),
    ``"load"`` (input number, one index per dimension), ``"cast"`` (expression, dtype name),
    ``"not"``, ``"neg"``, ``"abs"``, ``"min"``, ``"max"``, ``"where"`` or a binary operator.
    """

    op: str
    args: tuple[Any, ...] = ()

    def __str__(self) -> str:
        if self.op == "const":
            return str(self.args[0])
        if self.op == "load":
            return f"m{self.args[0]}[{', '.join(map(str, self.args[1:]))}]"
        if self.op in _INFIX:
            left, right = (f"({arg})" if arg.op in _INFIX else str(arg) for arg in self.args)
            return f"{left} {_INFIX[self.op][0]} {right}"
        return f"{self.op}({', '.join(map(str, self.args))})" if self.args else self.op

    def walk(self) -> Iterator[Expr]:
        """Yield this expression and all it is made of."""
        yield self
        for arg in self.args:
            if isinstance(arg, Expr):
                yield from arg.walk()


TRUE = Expr("true")
FALSE = Expr("false")


def const(value: bool | int | float) -> Expr:
    """Return the expression of a number."""
    if isinstance(value, bool):
        return TRUE if value else FALSE
    return Expr("const", (value,))


def load(number: int, indices: Sequence[Expr]) -> Expr:
    """Return the element of mask input ``number`` at ``indices``, one per dimension."""
    return Expr("load", (number, *indices))


def make(op: str, *args: Expr) -> Expr:
    """Return ``op`` applied to ``args``; integer constants and neutral elements are folded."""
    if op == "not" and args[0] in (TRUE, FALSE):
        return const(args[0] == FALSE)
    if op == "not" and args[0].op == "not":
        inner: Expr = args[0].args[0]
        return inner
    if op in ("and", "or"):
        neutral, absorbing = (TRUE, FALSE) if op == "and" else (FALSE, TRUE)
        if absorbing in args:
            return absorbing
        rest = [arg for arg in args if arg != neutral]
        if len(rest) < 2:
            return rest[0] if rest else neutral
    zero = Expr("const", (0,))
    if op in ("add", "sub") and args[1] == zero:
        return args[0]
    if op == "add" and args[0] == zero:
        return args[1]
    integers = all(arg.op == "const" and isinstance(arg.args[0], int) for arg in args)
    if integers and op in _INFIX and (op not in ("floordiv", "mod") or args[1] != zero):
        return const(_INFIX[op][1](args[0].args[0], args[1].args[0]))
    return Expr(op, args)


@dataclass(frozen=True)
class MaskForm:
    """What a query may see; ``MaskForm()`` is "every query sees every key".

    The conjunction of ``causal``, ``window`` and ``padding`` is the whole mask if ``expr`` is None.
    Otherwise ``expr`` is the whole mask, ``padding`` is None, and ``causal`` and ``window`` are
    bounds that hold besides: what they hide, ``expr`` hides too.
    """

    causal: bool = False
    """``kv <= q + past``"""
    window: int | None = None
    """``kv > q + past - window``"""
    padding: int | None = None
    """Index in ``mask_inputs`` of a ``[B | 1, >= past + n]`` tensor: nonzero = visible."""
    expr: Expr | None = None
    """The whole mask, bool or additive float; evaluated per block."""
    formula: str = field(default="every key", compare=False)
    """The mask as text, for people."""

    @property
    def is_full(self) -> bool:
        """Every query sees every key."""
        return self == MaskForm()

    @property
    def sees_all_past(self) -> bool:
        """Every query sees every old token, apart from padding."""
        return self.window is None and self.expr is None

    @property
    def is_causal_square(self) -> bool:
        """Full over old tokens and a causal square over the new ones, apart from padding."""
        return self.causal and self.sees_all_past

    @property
    def reads_data(self) -> bool:
        """The mask depends on the values of ``mask_inputs``."""
        if self.expr is None:
            return self.padding is not None
        return any(part.op == "load" for part in self.expr.walk())

    def without_padding(self) -> MaskForm:
        """Return the form that holds when the padding tensor is known to hold no zero."""
        if self.padding is None:
            return self
        return replace(self, padding=None, formula=describe(self.causal, self.window, None))


def describe(causal: bool, window: int | None, padding: int | None) -> str:
    """Return the formula of a form without ``expr``."""
    parts = ["kv <= q + past"] if causal else []
    parts += [f"kv > q + past - {window}"] if window is not None else []
    parts += [f"m{padding}[b, kv]"] if padding is not None else []
    return " and ".join(parts) or "every key"


def visible_range(form: MaskForm, *, past: int, q_start: int, q_stop: int) -> tuple[int, int]:
    """Return the half-open range of keys that any of the queries can see, by arithmetic alone.

    Args:
        form: The mask.
        past: Tokens already in the cache.
        q_start: First query, counted within the new tokens.
        q_stop: End of the queries, more than ``q_start``.

    Returns:
        ``(start, stop)``. Without a causal bound ``stop`` is ``sys.maxsize``: clip it to the keys
        there are.
    """
    start = 0 if form.window is None else max(0, past + q_start - form.window + 1)
    return start, past + q_stop if form.causal else sys.maxsize


def block_mask(
    form: MaskForm,
    inputs: Sequence[Tensor],
    *,
    past: int,
    new: int,
    q_start: int,
    q_stop: int,
    k_start: int,
    k_stop: int,
    device: torch.device | str,
) -> Tensor | None:
    """Return the mask of queries ``[q_start, q_stop)`` and keys ``[k_start, k_stop)``.

    Args:
        form: The mask.
        inputs: The tensors that ``form`` refers to by number.
        past: Tokens already in the cache.
        new: New tokens, n.
        q_start: First query, counted within the new tokens.
        q_stop: End of the queries.
        k_start: First key, absolute.
        k_stop: End of the keys.
        device: Where the mask is needed.

    Returns:
        A tensor that broadcasts to ``[B, Hq, q_stop - q_start, k_stop - k_start]``: bool with
        True = visible, or an additive float; None when arithmetic alone says that the whole block
        is visible. No tensor that is made here is larger than the block.

    Raises:
        IndexError: A tensor of ``inputs`` has fewer rows or columns than the mask reads.
    """
    block = _Block(inputs, past, new, (q_start, q_stop), (k_start, k_stop), torch.device(device))
    if form.expr is not None:
        return block.tensor(form.expr)
    seen: Tensor | None = None
    if form.causal and k_stop - 1 > past + q_start:
        seen = block.axis("kv") <= block.axis("q") + past
    if form.window is not None and k_start <= past + q_stop - 1 - form.window:
        near = block.axis("kv") > block.axis("q") + (past - form.window)
        seen = near if seen is None else seen & near
    if form.padding is not None:
        rows = load(form.padding, (Expr("b"), Expr("kv")))
        valid = block.tensor(Expr("cast", (rows, "bool")))
        seen = valid if seen is None else seen & valid
    return seen


@dataclass
class _Block:
    """Evaluates expressions for one query chunk and one KV block."""

    inputs: Sequence[Tensor]
    past: int
    new: int
    q: tuple[int, int]
    kv: tuple[int, int]
    device: torch.device
    rows: dict[str, int] = field(default_factory=dict)

    def tensor(self, expr: Expr) -> Tensor:
        """Evaluate to a tensor of four dimensions."""
        for part in expr.walk():
            if part.op == "load":
                for dim, index in enumerate(part.args[1:]):
                    if index.op in ("b", "h"):
                        self.rows.setdefault(index.op, self.inputs[part.args[0]].shape[dim])
        value = torch.as_tensor(self.value(expr), device=self.device)
        return value.reshape((1,) * (4 - value.dim()) + tuple(value.shape))

    def axis(self, name: str) -> Tensor:
        """The values of an index variable, along its dimension of four."""
        ranges = {"q": self.q, "kv": self.kv}
        start, stop = ranges[name] if name in ranges else (0, self.rows[name])
        shape = [-1 if name == other else 1 for other in AXES]
        return torch.arange(start, stop, device=self.device).view(shape)

    def value(self, expr: Expr) -> Any:
        """Evaluate to a tensor, or to a Python number where nothing varies within the block."""
        if expr.op in AXES:
            return self.axis(expr.op)
        if expr.op in ("true", "false"):
            return expr.op == "true"
        if expr.op in ("past", "n"):
            return self.past if expr.op == "past" else self.new
        if expr.op == "const":
            return expr.args[0]
        if expr.op == "load":
            return self.element(self.inputs[expr.args[0]].to(self.device), expr.args[1:])
        if expr.op == "cast":
            value = torch.as_tensor(self.value(expr.args[0]), device=self.device)
            return value.to(getattr(torch, expr.args[1]))
        args = [self.value(arg) for arg in expr.args]
        if expr.op in _INFIX:
            return _INFIX[expr.op][1](*args)
        if expr.op in ("neg", "abs"):
            return operator.neg(args[0]) if expr.op == "neg" else abs(args[0])
        tensors = [torch.as_tensor(arg, device=self.device) for arg in args]
        if expr.op == "not":
            return torch.logical_not(*tensors)
        if expr.op in ("min", "max"):
            return (torch.minimum if expr.op == "min" else torch.maximum)(*tensors)
        assert expr.op == "where", expr.op
        return torch.where(*tensors)

    def element(self, tensor: Tensor, indices: Sequence[Expr]) -> Tensor:
        """The elements that a load reads, as a view where its indices are plain ranges."""
        axes: list[str] = []
        keys: list[int | slice] = []
        for size, index in zip(tensor.shape, indices, strict=True):
            axis, offset = self.affine(index) or ("", None)
            start, stop = {"q": self.q, "kv": self.kv}.get(axis, (0, size))
            if offset is None or axis in axes or (axis and start + offset < 0):
                # Torch's own indexing: gathers, and wraps negative indices as the model's did.
                return tensor[tuple(self.value(index) for index in indices)]
            if axis and stop + offset > size:
                raise IndexError(
                    f"the attention mask reads index {stop + offset - 1} of a dimension of "
                    f"{size} of a tensor of shape {list(tensor.shape)}"
                )
            keys.append(slice(start + offset, stop + offset) if axis else offset)
            axes += [axis] if axis else []
        order = sorted(range(len(axes)), key=lambda dim: AXES.index(axes[dim]))
        view = tensor[tuple(keys)].permute(order)
        return view[tuple(slice(None) if axis in axes else None for axis in AXES)]

    def affine(self, expr: Expr) -> tuple[str, int] | None:
        """Split an index into an axis ("" for none) and an integer offset, where that is all."""
        if expr.op in AXES:
            return expr.op, 0
        if expr.op in ("const", "past", "n"):
            return "", self.value(expr)
        if expr.op not in ("add", "sub"):
            return None
        left, right = self.affine(expr.args[0]), self.affine(expr.args[1])
        if left is None or right is None or (right[0] and (left[0] or expr.op == "sub")):
            return None
        return left[0] or right[0], _INFIX[expr.op][1](left[1], right[1])
