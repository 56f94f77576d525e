"""Bad input: each case of ``error_cases.py``, and that ``docs/errors.md`` says what comes of it.

``HEADINFER_ACCEPT=1`` writes the page anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from error_cases import CASES, run_all
from error_harness import PAGE, ErrorCase, Outcome, World, page


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> World:
    """A folder of its own."""
    return World(tmp_path_factory.mktemp("errors"), tiny_checkpoint)


@pytest.fixture(scope="module")
def outcomes(world: World) -> dict[str, Outcome]:
    """What each case gave, in the order of the table."""
    return {case.name: outcome for case, outcome in run_all(world)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_error_is_the_one_in_the_table(case: ErrorCase, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[case.name]
    if isinstance(case.error, type):
        assert isinstance(outcome.error, type) and issubclass(outcome.error, case.error), outcome
        assert case.foreign or outcome.error is case.error
    else:
        assert outcome.error == case.error, outcome
    assert case.says in outcome.message, outcome
    assert case.error is not None or bool(outcome.warnings) == (case.says != ""), outcome
    assert not outcome.traceback


def test_there_are_enough_cases_of_every_kind() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60
    groups = {case.group for case in CASES}
    assert groups == {
        "Options", "Making a cache", "Using a cache", "Prompts", "Schedules", "Model files",
        "Commands",
    }  # fmt: skip


def test_code_of_a_checkpoint_is_not_run(world: World, outcomes: dict[str, Outcome]) -> None:
    assert outcomes["Model files: a config that brings its own code"].error == 1
    made = list(world.folder.glob("*/mine.py"))
    assert len(made) == 1 and not list(world.folder.glob("*/was_run"))


def test_the_page_is_up_to_date(outcomes: dict[str, Outcome]) -> None:
    text = page([(case, outcomes[case.name]) for case in CASES])
    if os.environ.get("HEADINFER_ACCEPT"):
        PAGE.write_text(text, encoding="ascii")
    found = PAGE.read_text(encoding="ascii").splitlines()
    assert found == text.splitlines(), "HEADINFER_ACCEPT=1, or python tests/error_cases.py"
