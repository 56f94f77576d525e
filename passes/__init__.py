"""Graph passes: graph in, graph out; no CUDA. See ``pipeline.py`` for their order and reasons."""

if __name__ != "headinfer_compile.passes":
    raise ImportError(
        f"imported as {__name__!r}: use 'headinfer_compile.passes' (a second copy would hold "
        "other types and register the operators twice)"
    )
