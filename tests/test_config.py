"""Options of the backend: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from headinfer_compile.config import HeadInferConfig, format_bytes, parse_bytes
from headinfer_compile.errors import OptionError

#: For each field, a valid value that is not its default.
OTHER: dict[str, Any] = {
    "head_group": 2,
    "slot_tokens": {"prefill": 4096, "decode": 512},
    "num_slots": 4,
    "prefetch_distance": 1,
    "workspace_bytes": "1GiB",
    "cuda_graphs": True,
    "cpu_attention": 0.5,
    "verify": False,
    "strict": True,
    "debug_dir": "dumps",
    "disable_passes": ("hoist_prefetch",),
    "nvtx": True,
    "lowering": "eager",
    "inductor": {"max_autotune": True},
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0, 0),
        ("0", 0),
        (17, 17),
        ("17", 17),
        ("17B", 17),
        ("4GB", 4 * 10**9),
        ("4 gb", 4 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("256MiB", 2**28),
        ("2kB", 2000),
        ("2KiB", 2048),
        ("1TiB", 2**40),
    ],
)
def test_byte_counts(text: int | str, expected: int) -> None:
    assert parse_bytes(text, "x") == expected


@pytest.mark.parametrize(
    "text", [-1, "-1", "-4GB", "", "GB", "4 G", "4GiBs", "4,5GB", "1e9", "nan"]
)
def test_bad_byte_counts_are_refused_by_name(text: int | str) -> None:
    with pytest.raises(OptionError, match="gpu_budget"):
        parse_bytes(text, "gpu_budget")


@pytest.mark.parametrize("value", [True, None, 1.5, [1], {"a": 1}])
def test_byte_counts_of_another_type_are_refused(value: Any) -> None:
    with pytest.raises(OptionError, match="bytes as an int or a string"):
        parse_bytes(value, "gpu_budget")


@pytest.mark.parametrize("seed", range(3))
def test_formatted_bytes_are_read_back(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        count = rng.randrange(2 ** rng.randrange(1, 50))
        back = parse_bytes(format_bytes(count), "x")
        assert abs(back - count) <= 0.051 * max(count, 1), f"seed {seed}: {count} became {back}"


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("num_slot", "num_slots"),
        ("head_groups", "head_group"),
        ("debugdir", "debug_dir"),
        ("prefetch_dist", "prefetch_distance"),
        ("loweringg", "lowering"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(OptionError, match=f"'{key}'.*did you mean '{nearest}'"):
        HeadInferConfig.from_options({key: 1})


def test_options_none_and_empty_are_the_defaults() -> None:
    assert HeadInferConfig.from_options(None) == HeadInferConfig.from_options({})
    assert HeadInferConfig.from_options({}) == HeadInferConfig()


@pytest.mark.parametrize(
    "options",
    [
        {"num_slots": 1},
        {"num_slots": 2.0},
        {"num_slots": "3"},
        {"num_slots": True},
        {"prefetch_distance": 0},
        {"prefetch_distance": 3},
        {"num_slots": 2, "prefetch_distance": 2},
        {"head_group": 0},
        {"head_group": -1},
        {"head_group": "all"},
        {"head_group": {"prefill": 1}},
        {"head_group": {"prefill": 1, "decode": 0}},
        {"head_group": {"prefill": 1, "decode": 1, "other": 1}},
        {"slot_tokens": 0},
        {"slot_tokens": {"prefill": "auto", "decode": 1}},
        {"workspace_bytes": "-1"},
        {"workspace_bytes": "lots"},
        {"strict": 1},
        {"verify": None},
        {"cuda_graphs": "yes"},
        {"nvtx": 0},
        {"lowering": "aot"},
        {"cpu_attention": 1.5},
        {"cpu_attention": -0.1},
        {"cpu_attention": True},
        {"cpu_attention": "on"},
        {"disable_passes": ("verify",)},
        {"disable_passes": ("hoist_prefetch", "find_attention")},
    ],
    ids=str,
)
def test_bad_values_are_refused_by_name(options: dict[str, Any]) -> None:
    name = list(options)[-1]
    with pytest.raises(OptionError, match=name):
        HeadInferConfig.from_options(options)


def test_option_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="num_slots"):
        HeadInferConfig(num_slots=0)


def test_per_phase_values() -> None:
    config = HeadInferConfig(head_group={"prefill": 1, "decode": 8}, slot_tokens=512)
    assert config.per_phase("head_group", "prefill") == 1
    assert config.per_phase("head_group", "decode") == 8
    assert config.per_phase("slot_tokens", "prefill") == 512
    assert config.per_phase("slot_tokens", "decode") == 512
    assert HeadInferConfig().per_phase("head_group", "prefill") is None


@pytest.mark.parametrize("num_slots", [2, 3, 5])
def test_prefetch_distance_leaves_one_slot_in_use(num_slots: int) -> None:
    assert HeadInferConfig(num_slots=num_slots).distance == num_slots - 1
    assert HeadInferConfig(num_slots=num_slots, prefetch_distance=1).distance == 1


def test_workspace_bytes_are_an_int_whatever_was_given() -> None:
    given = (HeadInferConfig(workspace_bytes=text) for text in ("1GiB", "1024MiB", 2**30))
    assert [config.workspace_bytes for config in given] == [2**30] * 3


def test_the_config_is_frozen() -> None:
    config = HeadInferConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_slots = 4  # type: ignore[misc]


def test_the_cache_key_covers_every_field() -> None:
    fields = {field.name for field in dataclasses.fields(HeadInferConfig)}
    assert set(OTHER) == fields
    keys = {"defaults": HeadInferConfig().cache_key()}
    for name, value in OTHER.items():
        config = HeadInferConfig.from_options({name: value})
        assert getattr(config, name) != getattr(HeadInferConfig(), name), name
        keys[name] = config.cache_key()
    assert len(set(keys.values())) == len(keys), keys


def test_equal_configs_have_equal_cache_keys() -> None:
    one = HeadInferConfig(workspace_bytes="1GiB", inductor={"a": 1, "b": 2})
    two = HeadInferConfig(workspace_bytes=2**30, inductor={"b": 2, "a": 1})
    assert one == two
    assert one.cache_key() == two.cache_key()
