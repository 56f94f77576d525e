"""The arithmetic behind ``recover_mask``: lengths, linear forms, and what they prove.

Legend: P and N are the past and new lengths of a graph, as sympy expressions of ``PAST`` and
``NEW``; both are constants where Dynamo specialised them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from headinfer_compile.runtime.masks import TRUE, Expr, MaskForm, const, describe, make

PAST = sympy.Symbol("past", integer=True, nonnegative=True)
NEW = sympy.Symbol("n", integer=True, positive=True)
_SYMBOLS = {
    "past": PAST,
    "n": NEW,
    **{name: sympy.Symbol(name, integer=True, nonnegative=True) for name in ("b", "h", "q", "kv")},
}
_LENGTHS = {PAST: Expr("past"), NEW: Expr("n")}
_NEGATED = {"le": "gt", "lt": "ge", "ge": "lt", "gt": "le", "eq": "ne", "ne": "eq"}


class UnreadableError(Exception):
    """A mask is not index arithmetic; the message is the reason for declining."""


@dataclass(frozen=True)
class Domain:
    """Where the index variables range: q in [0, N), kv in [0, P + N)."""

    past: sympy.Expr
    new: sympy.Expr
    substitution: tuple[tuple[sympy.Symbol, sympy.Expr], ...]
    """The symbols of the graph in terms of ``PAST`` and ``NEW``."""

    @staticmethod
    def of(past: sympy.Expr, new: sympy.Expr) -> Domain:
        """Express the two lengths of a graph, given in its own symbols, by ``PAST`` and ``NEW``."""
        solved: dict[sympy.Symbol, sympy.Expr] = {}
        pairs = sorted([(PAST, past), (NEW, new)], key=lambda pair: not pair[1].is_Symbol)
        for target, length in pairs:
            length = sympy.expand(length.xreplace(solved))
            terms = length.as_coefficients_dict()
            for symbol in sorted(length.free_symbols - {PAST, NEW}, key=str):
                sign = terms[symbol]
                rest = sympy.expand(length - sign * symbol)
                if abs(sign) == 1 and symbol not in rest.free_symbols:
                    value = sympy.expand((target - rest) * sign)
                    solved = {key: expr.xreplace({symbol: value}) for key, expr in solved.items()}
                    solved[symbol] = value
                    break
        ours = [sympy.expand(length.xreplace(solved)) for length in (past, new)]
        return Domain(ours[0], ours[1], tuple(solved.items()))

    @property
    def total(self) -> sympy.Expr:
        """P + N: the number of keys."""
        return sympy.expand(self.past + self.new)

    def scalar(self, value: sympy.Expr) -> sympy.Expr:
        """Rewrite a scalar of the graph in ``PAST`` and ``NEW``."""
        return sympy.expand(value.xreplace(dict(self.substitution)))

    def nonnegative(self, linear: sympy.Expr) -> bool:
        """Whether a linear form is >= 0 for all indices and lengths."""
        for symbol, last in ((_SYMBOLS["q"], self.new - 1), (_SYMBOLS["kv"], self.total - 1)):
            # A linear form is least at a corner of the box of the indices.
            slope = linear.coeff(symbol)
            linear = linear.subs(symbol, last if slope < 0 else 0)
        linear = sympy.expand(linear)
        for symbol, lowest in ((PAST, 0), (NEW, 1), (_SYMBOLS["b"], 0), (_SYMBOLS["h"], 0)):
            if linear.coeff(symbol) < 0:
                return False
            linear = linear.subs(symbol, lowest)
        return bool(linear.is_number and linear >= 0)


def to_expr(value: sympy.Expr) -> Expr:
    """Return a scalar in ``PAST`` and ``NEW`` as a mask expression.

    Raises:
        UnreadableError: It holds another symbol or function.
    """
    if value.is_Integer:
        return const(int(value))
    if value in _LENGTHS:
        return _LENGTHS[value]
    names = {sympy.Add: "add", sympy.Mul: "mul", FloorDiv: "floordiv", Mod: "mod", PythonMod: "mod"}
    if value.func not in names:
        raise UnreadableError(f"it depends on {value}, neither the past nor the new length")
    return functools.reduce(
        lambda left, right: make(names[value.func], left, right), map(to_expr, value.args)
    )


def uncast(expr: Expr) -> Expr:
    """``expr`` without the conversions around it."""
    while expr.op == "cast":
        expr = expr.args[0]
    return expr


def to_linear(expr: Expr) -> sympy.Expr | None:
    """Return an integer expression as a linear form of the indices and lengths, if it is one."""
    if expr.op in _SYMBOLS:
        return _SYMBOLS[expr.op]
    if expr.op == "const":
        return sympy.Integer(expr.args[0]) if isinstance(expr.args[0], int) else None
    if expr.op not in ("add", "sub", "mul", "neg"):
        return None
    terms = [term for arg in expr.args if (term := to_linear(arg)) is not None]
    if len(terms) < len(expr.args):
        return None
    left, right = terms[0], terms[-1]
    if expr.op == "mul" and not (left.is_number or right.is_number):
        return None
    results = {"neg": -left, "mul": left * right, "add": left + right, "sub": left - right}
    return sympy.expand(results[expr.op])


@dataclass(frozen=True)
class _Term:
    """One term of a conjunction: a linear form that is >= 0, or, without one, ``expr``."""

    expr: Expr
    linear: sympy.Expr | None = None

    def implies(self, other: _Term, domain: Domain) -> bool:
        if self.linear is None or other.linear is None:
            return self == other
        return domain.nonnegative(sympy.expand(other.linear - self.linear))


def prove(expr: Expr, domain: Domain, single_row: Sequence[bool]) -> MaskForm:
    """Decide the form of a boolean mask.

    Args:
        expr: The mask, True = visible.
        domain: The range of its indices.
        single_row: Per mask input, whether row 0 serves every batch row.

    Returns:
        The form; its ``expr`` is None if the mask is proved to be no more than a conjunction of
        causal, window and padding terms.
    """
    q = 0 if domain.new == 1 else _SYMBOLS["q"]
    # kv - (q + past): where a key stands relative to the query's own position.
    distance = sympy.expand(_SYMBOLS["kv"] - q - domain.past)
    causal, complete = False, True
    windows: list[int] = []
    paddings: set[int] = set()
    for term in _conjunction(expr, True, domain):
        if term.linear is None:
            padding = _padding(term.expr, single_row)
            complete = complete and padding is not None
            paddings |= set() if padding is None else {padding}
            chunk = _chunk(term.expr, distance)
            windows += [] if chunk is None else [chunk]
        elif sympy.expand(term.linear + distance) == 0:
            causal = True
        else:
            window = sympy.expand(term.linear - distance + 1)
            known = bool(window.is_Integer and window >= 1)
            causal = causal or domain.nonnegative(sympy.expand(-distance - term.linear))
            complete = complete and known
            windows += [int(window)] if known else []
    window_size = min(windows, default=None)
    if not complete or len(paddings) > 1:
        return MaskForm(causal, window_size, expr=expr, formula=str(expr))
    # With one query nothing comes after it: causal says the same and selects faster kernels.
    causal = causal or domain.new == 1
    number = min(paddings, default=None)
    return MaskForm(causal, window_size, number, formula=describe(causal, window_size, number))


def sees_itself(expr: Expr, domain: Domain, single_row: Sequence[bool]) -> bool:
    """Whether under a boolean mask every query sees its own key, unless that is padded."""
    if expr.op in ("and", "or"):
        results = [sees_itself(arg, domain, single_row) for arg in expr.args]
        return all(results) if expr.op == "and" else any(results)
    if _padding(expr, single_row) is not None:
        return True
    past = to_expr(domain.past)
    own = past if domain.new == 1 else make("add", Expr("q"), past)
    at_own = _replace(expr, Expr("kv"), own)
    same = at_own.op in ("eq", "le", "ge") and at_own.args[0] == at_own.args[1]
    return same or not _conjunction(at_own, True, domain)


def _replace(expr: Expr, old: Expr, new: Expr) -> Expr:
    if expr == old:
        return new
    args = (_replace(arg, old, new) if isinstance(arg, Expr) else arg for arg in expr.args)
    return Expr(expr.op, tuple(args))


def _conjunction(expr: Expr, positive: bool, domain: Domain) -> list[_Term]:
    """The terms whose conjunction is ``expr`` (or, not ``positive``, its negation)."""
    whole = expr if positive else make("not", expr)
    if whole == TRUE:
        return []
    if expr.op == "not":
        return _conjunction(expr.args[0], not positive, domain)
    if expr.op in ("and", "or"):
        branches = [_conjunction(arg, positive, domain) for arg in expr.args]
        if (expr.op == "and") == positive:
            return _prune([term for branch in branches for term in branch], domain)
        return _disjunction(branches, whole, domain)
    op = expr.op if positive else _NEGATED.get(expr.op, "")
    if op not in _NEGATED:
        return [_Term(whole)]
    whole = Expr(op, expr.args)
    left, right = to_linear(expr.args[0]), to_linear(expr.args[1])
    if left is None or right is None or op == "ne":
        return [_Term(whole)]
    gap = sympy.expand(right - left)
    bounds = {"le": [gap], "lt": [gap - 1], "ge": [-gap], "gt": [-gap - 1], "eq": [gap, -gap]}
    return [_Term(whole, bound) for bound in bounds[op] if not domain.nonnegative(bound)]


def _prune(terms: list[_Term], domain: Domain) -> list[_Term]:
    """Drop the terms that others imply."""
    kept: list[_Term] = []
    for term in terms:
        if not any(other.implies(term, domain) for other in kept):
            kept = [other for other in kept if not term.implies(other, domain)] + [term]
    return kept


def _disjunction(branches: list[list[_Term]], whole: Expr, domain: Domain) -> list[_Term]:
    """The terms of an ``or`` of conjunctions: the branch that all others imply, if there is one."""
    for weakest in branches:
        if all(
            any(term.implies(wanted, domain) for term in branch)
            for branch in branches
            for wanted in weakest
        ):
            return weakest
    return [_Term(whole)]


def _chunk(expr: Expr, distance: sympy.Expr) -> int | None:
    """C of a mask that says "query and key are in the same C tokens": a bound of their distance."""
    if expr.op != "eq" or any(arg.op != "floordiv" for arg in expr.args):
        return None
    (left, size), (right, other) = (arg.args for arg in expr.args)
    if size != other or size.op != "const" or size.args[0] < 1:
        return None
    gap = _difference(left, right)
    if gap is None or sympy.expand(gap - distance) * sympy.expand(gap + distance) != 0:
        return None
    return int(size.args[0])


def _difference(left: Expr, right: Expr) -> sympy.Expr | None:
    """``left - right`` as a linear form, after what both have in common is left out."""
    while left.op == right.op and left.op in ("add", "sub") and left.args[1] == right.args[1]:
        left, right = left.args[0], right.args[0]
    first, second = to_linear(left), to_linear(right)
    return None if first is None or second is None else sympy.expand(first - second)


def _padding(expr: Expr, single_row: Sequence[bool]) -> int | None:
    """The number of the mask input of which ``expr`` says "row b is nonzero at kv"."""
    nonzero = expr.op == "ne" and expr.args[1] == const(0)
    if nonzero or (expr.op == "cast" and expr.args[1] == "bool"):
        expr = expr.args[0]
    if expr.op != "load" or len(expr.args) != 3:
        return None
    number, row, column = expr.args
    rows_match = row == Expr("b") or (row == const(0) and single_row[number])
    return number if rows_match and to_linear(column) == _SYMBOLS["kv"] else None
