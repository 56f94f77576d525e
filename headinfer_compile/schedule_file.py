"""Reads a site schedule that was dumped to ``debug_dir``, perhaps edited, so that it can run."""

from __future__ import annotations

import os
import time
from pathlib import Path

from headinfer_compile.config import HeadInferConfig
from headinfer_compile.passes.pipeline import finish_schedule
from headinfer_compile.passes.schedule import PlanContext, Schedule
from headinfer_compile.passes.schedule_text import parse_schedule


def load_schedule(path: str | os.PathLike[str]) -> Schedule:
    """Read, prove and compile a dumped schedule; ``HeadInferCache.use_schedule`` installs it.

    The file is parsed and never executed. It stands in for exactly one plan key, the one of its
    ``# key:`` line: wherever that key comes up, its ops run in its order, and nowhere else.

    Args:
        path: An ``NNN_schedule.py`` of ``debug_dir``, as it is or edited.

    Raises:
        ScheduleError: The text is no schedule, or one that breaks a rule of ``passes/verify.py``;
            it names the line or the op.
        OSError: The file cannot be read.
    """
    start = time.perf_counter()
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    graph_module, key = parse_schedule(text, os.fspath(path))
    return finish_schedule(graph_module, PlanContext(key, HeadInferConfig()), start)
