"""What a session counts while it runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from headinfer_compile.runtime.trace import Timings


@dataclass
class Counters:
    """What a session has done since it was made or reset."""

    h2d_bytes: int = 0
    d2h_bytes: int = 0
    cpu_bytes: int = 0
    eager_updates: int = 0
    materialised_layers: set[int] = field(default_factory=set)
    sites: set[int] = field(default_factory=set)
    op_calls: Counter[str] = field(default_factory=Counter)
    workspace_bytes: int = 0
    timings: Timings = field(default_factory=Timings)

    @property
    def moved_bytes(self) -> int:
        """Bytes that copies have moved and the CPU has attended."""
        return self.h2d_bytes + self.d2h_bytes + self.cpu_bytes
