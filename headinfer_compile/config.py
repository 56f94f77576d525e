"""Compile options of the backend and the parsing of byte strings."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from headinfer_compile.errors import OptionError

_UNITS = {"B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS[f"{_prefix}B"] = 1000**_power
    _UNITS[f"{_prefix}iB"] = 1024**_power

#: Passes that may be switched off; the others are what makes the result correct.
OPTIONAL_PASSES = ("hoist_prefetch",)


def parse_bytes(value: int | str, name: str) -> int:
    """Return ``value`` in bytes.

    Args:
        value: An int (bytes) or a string such as ``"4GB"`` (10^9) or ``"1.5GiB"`` (2^30).
        name: The option's name, for the error.

    Raises:
        OptionError: ``value`` is negative, of another type, or has no known unit.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise OptionError(f"{name}={value!r}: expected bytes as an int or a string like '1.5GiB'")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        units = {unit.lower(): size for unit, size in _UNITS.items()}
        unit = (match[2] or "B").lower() if match else ""
        if match is None or unit not in units:
            raise OptionError(
                f"{name}={value!r}: not a byte count; write an int or a number with one of "
                f"{', '.join(_UNITS)}, such as '4GB' or '1.5GiB'"
            )
        value = int(float(match[1]) * units[unit])
    if value < 0:
        raise OptionError(f"{name}={value}: a byte count cannot be negative")
    return value


def parse_tokens(value: int | str, name: str) -> int:
    """Return a token count: an int, or a string such as ``"128K"`` (K = 1024, M = 1024^2).

    Raises:
        OptionError: It is no positive whole number of tokens.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KkMm]?)\s*", str(value))
    count = float(match[1]) * {"": 1, "K": 1024, "M": 1024**2}[match[2].upper()] if match else 0
    if isinstance(value, bool) or count < 1 or count != int(count):
        raise OptionError(
            f"{name}={value!r}: expected a number of tokens, as an int or like '128K' (K = 1024)"
        )
    return int(count)


def format_bytes(count: float) -> str:
    """Return ``count`` bytes as text in binary units, e.g. ``32.0 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


SlotTokens = int | Literal["auto"] | Mapping[str, int]


@dataclass(frozen=True)
class HeadInferConfig:
    """Options of ``torch.compile(model, backend="headinfer", options={...})``."""

    head_group: int | Literal["auto"] | Mapping[str, int] = "auto"
    """KV heads moved and attended together; an int for both phases or a dict with ``prefill`` and
    ``decode``. ``"auto"``: all in decode; in prefill what is fastest for each chunk by the rates
    of ``headinfer probe``, and 1 on a machine that was not probed. A group that does not divide
    the number of KV heads leaves a smaller last group."""
    slot_tokens: SlotTokens = "auto"
    """Tokens of one KV block, that is of one slot. ``"auto"``: as many whole pages as fill the
    bytes of one page of all heads. An int is rounded down to whole pages."""
    num_slots: int | Literal["auto"] = "auto"
    """Device buffers that transfers fill in turn; 2 is ping-pong. ``"auto"``: 3, or 2 on a probed
    machine where that keeps more KV on the device and is faster."""
    prefetch_distance: int | Literal["auto"] = "auto"
    """Transfers started ahead of their use, 1 to ``num_slots - 1``; ``"auto"`` is the largest."""
    workspace_bytes: int | str = "256MiB"
    """Bound of attention accumulators and kernel workspace on the device; queries are split, and
    KV is streamed again, rather than exceed it."""
    cuda_graphs: bool = False
    """Capture whole decode steps whose KV is resident."""
    cpu_attention: float | Literal["auto", "off"] = "off"
    """Share, 0 to 1, of the host blocks that the CPU attends in decode, where they lie, while the
    others are transferred. ``"auto"``: moved from step to step until both finish together.
    ``"off"``: none. Needs a C++ compiler, once, unless the wheel carries the kernel."""
    verify: bool = True
    """Prove every new schedule before it runs; costs some 10 us per node, once per plan key."""
    strict: bool = False
    """Raise where a pass declines an attention instead of materialising exact K and V."""
    debug_dir: str | None = None
    """Folder for ``NNN_<pass>.py`` dumps of every pass; created private to the user."""
    disable_passes: tuple[str, ...] = ()
    """Optional passes to leave out: ``hoist_prefetch``."""
    nvtx: bool = False
    """Put NVTX ranges around sites and ops, named by layer, group and block."""
    lowering: Literal["inductor", "eager"] = "inductor"
    """What compiles the regions between attentions; ``"eager"`` is for debugging and tests."""
    inductor: Mapping[str, Any] = field(default_factory=dict)
    """Inductor config patches for the regions."""

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "workspace_bytes", parse_bytes(self.workspace_bytes, "workspace_bytes")
        )
        self._check_kinds()
        object.__setattr__(self, "disable_passes", tuple(self.disable_passes))
        if self.num_slots != "auto":
            self._check_count("num_slots", self.num_slots, low=2)
        if self.prefetch_distance != "auto":
            self._check_count("prefetch_distance", self.prefetch_distance, low=1)
            if self.prefetch_distance > self.slots - 1:
                raise OptionError(
                    f"prefetch_distance={self.prefetch_distance} with num_slots={self.num_slots}: "
                    f"a slot in use cannot be filled, so the largest is {self.slots - 1}"
                )
        for name in ("head_group", "slot_tokens"):
            self._check_per_phase(name, getattr(self, name))
        for name in ("cuda_graphs", "verify", "strict", "nvtx"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r}: expected True or False")
        if self.lowering not in ("inductor", "eager"):
            raise OptionError(f"lowering={self.lowering!r}: expected 'inductor' or 'eager'")
        self._check_share("cpu_attention", self.cpu_attention)
        unknown = set(self.disable_passes) - set(OPTIONAL_PASSES)
        if unknown:
            raise OptionError(
                f"disable_passes={sorted(unknown)}: only {', '.join(OPTIONAL_PASSES)} may be "
                "disabled; the result needs the others"
            )

    def _check_kinds(self) -> None:
        if isinstance(self.disable_passes, str) or not isinstance(self.disable_passes, Iterable):
            raise OptionError(
                f"disable_passes={self.disable_passes!r}: expected a list of names, such as "
                "['hoist_prefetch']"
            )
        if self.debug_dir is not None and not isinstance(self.debug_dir, (str, os.PathLike)):
            raise OptionError(f"debug_dir={self.debug_dir!r}: expected the path of a folder")
        if not isinstance(self.inductor, Mapping):
            raise OptionError(f"inductor={self.inductor!r}: expected a dict of Inductor's options")

    @staticmethod
    def _check_count(name: str, value: Any, low: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise OptionError(f"{name}={value!r}: expected an int of at least {low}")

    @staticmethod
    def _check_share(name: str, value: Any) -> None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value not in ("auto", "off") if not number else not 0 <= value <= 1:
            raise OptionError(f"{name}={value!r}: expected 'auto', 'off' or a share from 0 to 1")

    def _check_per_phase(self, name: str, value: Any) -> None:
        if value == "auto":
            return
        if isinstance(value, Mapping):
            if set(value) != {"prefill", "decode"}:
                raise OptionError(
                    f"{name}={dict(value)!r}: expected the keys 'prefill' and 'decode'"
                )
            for phase, count in value.items():
                self._check_count(f"{name}[{phase!r}]", count, low=1)
            return
        self._check_count(name, value, low=1)

    def per_phase(self, name: Literal["head_group", "slot_tokens"], phase: str) -> int | None:
        """Return the option for ``"prefill"`` or ``"decode"``; None means ``"auto"``."""
        value = getattr(self, name)
        if value == "auto":
            return None
        return int(value[phase]) if isinstance(value, Mapping) else int(value)

    @property
    def slots(self) -> int:
        """``num_slots`` as a number; 3 where it is left open."""
        return 3 if self.num_slots == "auto" else self.num_slots

    @property
    def distance(self) -> int:
        """Transfers in flight ahead of the one being attended."""
        return self.slots - 1 if self.prefetch_distance == "auto" else self.prefetch_distance

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> HeadInferConfig:
        """Build a config from the ``options`` dict of ``torch.compile``.

        Raises:
            OptionError: A key is unknown (the nearest valid one is named) or a value is invalid.
        """
        if options is not None and not isinstance(options, Mapping):
            raise OptionError(f"options={options!r}: expected a dict of option names and values")
        options = dict(options or {})
        names = [f.name for f in dataclasses.fields(cls)]
        for key in options:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
                raise OptionError(
                    f"unknown option {key!r}: did you mean {near[0]!r}? Valid: {', '.join(names)}"
                )
        return cls(**options)

    def cache_key(self) -> str:
        """A digest over every field; equal configs have equal keys."""

        def ordered(value: Any) -> Any:
            return sorted(value.items(), key=repr) if isinstance(value, Mapping) else value

        values = [ordered(getattr(self, f.name)) for f in dataclasses.fields(self)]
        return hashlib.sha256(repr(values).encode()).hexdigest()[:16]
