"""Buffers, streams and operators. Nothing here knows FX graphs."""

if __name__ != "headinfer_compile.runtime":
    raise ImportError(
        f"imported as {__name__!r}: use 'headinfer_compile.runtime' (a second copy would hold "
        "other state and register the operators twice)"
    )
