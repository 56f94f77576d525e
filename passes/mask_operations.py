"""The operations that masks are made of, by name, as ``mask_reader`` reads them."""

from __future__ import annotations

BINARY = {
    "add": "add",
    "sub": "sub",
    "subtract": "sub",
    "mul": "mul",
    "multiply": "mul",
    "floordiv": "floordiv",
    "floor_divide": "floordiv",
    "mod": "mod",
    "remainder": "mod",
    "minimum": "min",
    "maximum": "max",
    "le": "le",
    "less_equal": "le",
    "lt": "lt",
    "less": "lt",
    "ge": "ge",
    "greater_equal": "ge",
    "gt": "gt",
    "greater": "gt",
    "eq": "eq",
    "ne": "ne",
    "not_equal": "ne",
}
LOGICAL = {
    **dict.fromkeys(("and_", "bitwise_and", "logical_and", "__and__"), "and"),
    **dict.fromkeys(("or_", "bitwise_or", "logical_or", "__or__"), "or"),
}
INVERT = ("invert", "inv", "bitwise_not", "logical_not")
UNARY = {"neg": "neg", "negative": "neg", "abs": "abs"}
SAME = (
    *("to", "bool", "int", "long", "float", "half", "double", "bfloat16", "type", "type_as"),
    *("contiguous", "clone", "detach", "cpu", "cuda"),
)
RESHAPES = ("view", "reshape", "unsqueeze", "squeeze")
EXPANDS = ("expand", "expand_as", "broadcast_to")
CONSTANTS = {"ones": 1, "zeros": 0, "ones_like": 1, "zeros_like": 0, "new_ones": 1, "new_zeros": 0}
FULLS = {"full": 1, "full_like": 1, "new_full": 2, "tensor": 0, "scalar_tensor": 0}

#: Operations of which one element reads the elements at the same index, and those that read none.
ELEMENTWISE = (*(*BINARY, *LOGICAL, *INVERT, *UNARY, *SAME, "where", "masked_fill"),)
FILLS = (*CONSTANTS, *FULLS)
