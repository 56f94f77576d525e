"""``python -m headinfer_compile``: the ``headinfer`` command without the console script."""

from __future__ import annotations

import sys

from headinfer_compile.cli import main

if __name__ == "__main__":
    sys.exit(main())
