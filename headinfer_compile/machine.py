"""The machine that a plan is for: memory and rates, measured, kept in a cache, or described."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headinfer_compile.config import parse_bytes
from headinfer_compile.errors import OptionError
from headinfer_compile.runtime.budget import default_host_budget, device_room

log = logging.getLogger(__name__)

_EXPIRY_SECONDS = 30 * 24 * 3600
_VERSION = 2
_OF_PEAK = 0.85
"""Share of a described ``tflops`` that large matrix products and attention reach."""


@dataclass(frozen=True)
class Rates:
    """How fast a machine is. Bytes and operations a second; the defaults are those of no machine in
    particular and stand in for what was neither measured nor described (``assumed``)."""

    h2d: tuple[tuple[int, float], ...] = ((1 << 20, 20e9), (32 << 20, 25e9))
    """Copy bytes and rate, ascending."""
    d2h: tuple[tuple[int, float], ...] = ((1 << 20, 20e9), (32 << 20, 25e9))
    duplex: float = 22e9
    """Each direction while both run."""
    hbm: float = 1000e9
    """Device memory, read."""
    dram: float = 100e9
    """Host memory, read."""
    dram_beside_link: float = 75e9
    """Host memory, read, while the link runs."""
    matmul: float = 140e12
    """Large matrix products."""
    attention: float = 140e12
    """Many queries over a KV block, by the fastest kernel."""
    causal: float = 110e12
    """A square causal block; its operations are those of the visible half."""
    attention_kernels: tuple[tuple[str, float], ...] = ()
    """Each usable kernel with its rate."""
    call_seconds: float = 4e-3
    """Host time of a compiled call, what its layers take left out."""
    layer_seconds: float = 350e-6
    """Host time of a layer in decode: its region and its site."""
    stream_seconds: float = 150e-6
    """Host time that a layer takes more once any of its blocks is streamed."""
    block_seconds: float = 200e-6
    """Host time of a streamed KV block: prefetch, wait, attend, release."""
    assumed: tuple[str, ...] = ()
    """Fields that hold a default."""

    def link(self, nbytes: float) -> float:
        """H2D rate of copies of ``nbytes`` bytes."""
        return _interpolate(self.h2d, nbytes)


@dataclass(frozen=True)
class Machine:
    """What a plan may use."""

    name: str
    gpu_memory: int
    """Bytes that the process may take on each device; 0: no device but the CPU."""
    host_memory: int
    """Bytes that KV pages may take."""
    rates: Rates
    gpus: int = 1
    source: str = "described"
    """Where the rates come from."""

    @property
    def is_known(self) -> bool:
        """Whether any rate was measured or described."""
        return set(self.rates.assumed) != set(assumed_rates().assumed)


@dataclass(frozen=True)
class MachineProfile:
    """What ``headinfer probe`` found, as it is kept."""

    device: str
    rates: Rates
    gpu_free: int
    gpu_total: int
    host_available: int
    measured_at: float
    """Seconds since 1970."""
    seconds: float
    """How long the probe took."""
    torch_version: str

    def to_json(self) -> dict[str, Any]:
        """Plain data that ``profile_from_json`` reads."""
        return {"version": _VERSION, **dataclasses.asdict(self)}


def profile_from_json(data: Any) -> MachineProfile:
    """The profile that ``to_json`` wrote.

    Raises:
        ValueError: It is none, or of another version.
    """
    try:
        if data["version"] != _VERSION:
            raise ValueError(f"version {data['version']}, expected {_VERSION}")
        rates: dict[str, Any] = {
            name: tuple(tuple(item) if isinstance(item, list) else item for item in value)
            if isinstance(value, list)
            else value
            for name, value in data["rates"].items()
        }
        fields = {f.name: data[f.name] for f in dataclasses.fields(MachineProfile)}
        return MachineProfile(**{**fields, "rates": Rates(**rates)})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a machine profile: {error}") from error


def assumed_rates() -> Rates:
    """The defaults, all of them marked as assumed."""
    return Rates(assumed=tuple(f.name for f in dataclasses.fields(Rates) if f.name != "assumed"))


def profile_path() -> Path:
    """Where the profile of this machine, device and torch is kept, in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    parts = [platform.node(), str(os.cpu_count()), torch.__version__, device_name()]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return folder / "headinfer" / f"profile-{digest}.json"


def device_name() -> str:
    """The device whose rates a profile holds."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"


def save_profile(profile: MachineProfile) -> Path:
    """Keep a profile, readable by the user alone; returns where."""
    path = profile_path()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(profile.to_json(), file)
    scratch.replace(path)
    return path


def load_profile(max_age_seconds: float = _EXPIRY_SECONDS) -> MachineProfile | None:
    """The kept profile of this machine; None where there is none that can be used."""
    path = profile_path()
    try:
        found = path.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            log.warning("%s is not this user's alone and is not used", path)
            return None
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.get("version", _VERSION) != _VERSION:
            log.info("%s is of another version of headinfer: `headinfer probe` renews it", path)
            return None
        profile = profile_from_json(data)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s cannot be used: %s", path, str(error))  # the error holds its frames
        return None
    age = time.time() - profile.measured_at
    return profile if 0 <= age <= max_age_seconds else None


def machine_with(profile: MachineProfile | None) -> Machine:
    """This machine with what is free of it now, and the rates of ``profile``, else assumed ones."""
    gpu_memory = 0
    if torch.cuda.is_available():
        gpu_memory = device_room(torch.device("cuda", torch.cuda.current_device()))
    if profile is None:
        rates, source = assumed_rates(), "assumed"
    else:
        rates, source = profile.rates, f"measured on {profile.device}"
    return Machine(device_name(), gpu_memory, default_host_budget(), rates, source=source)


def describe(
    here: Machine,
    *,
    gpu_memory: int | str | None = None,
    host_memory: int | str | None = None,
    link: float | str | None = None,
    tflops: float | None = None,
    gpus: int = 1,
) -> Machine:
    """``here`` with what the user describes otherwise.

    Args:
        here: The machine that fills in what is not described.
        gpu_memory: Bytes of one card, or like ``"24GiB"``.
        host_memory: Bytes that KV may take; no margin is taken from it.
        link: Bytes a second each way, or like ``"25GB/s"``.
        tflops: Peak of matrix products, 1e12 operations a second.
        gpus: Cards over which layers are spread.

    Raises:
        OptionError: One of them is malformed.
    """
    if isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 1:
        raise OptionError(f"gpus={gpus!r}: expected a count of at least 1")
    if None not in (gpu_memory, host_memory, link, tflops) or (gpu_memory and not here.gpu_memory):
        # Another machine, of which this one's device, if it has any, says nothing.
        here = dataclasses.replace(here, rates=assumed_rates(), source="assumed")
    rates, parts = here.rates, []
    assumed = set(rates.assumed)
    if link is not None:
        rate = parse_rate(link, "link")
        table = ((1, rate),)
        rates = dataclasses.replace(rates, h2d=table, d2h=table, duplex=rate)
        assumed -= {"h2d", "d2h", "duplex"}
        parts.append(f"link {rate / 1e9:g} GB/s")
    if tflops is not None:
        if isinstance(tflops, bool) or not isinstance(tflops, (int, float)) or tflops <= 0:
            raise OptionError(f"tflops={tflops!r}: expected a number above 0")
        peak = float(tflops) * 1e12
        # A square causal block leaves more of the machine idle at its edges.
        rates = dataclasses.replace(
            rates, matmul=_OF_PEAK * peak, attention=_OF_PEAK * peak, causal=0.7 * peak,
            attention_kernels=(),
        )  # fmt: skip
        assumed -= {"matmul", "attention", "causal"}
        parts.append(f"{tflops:g} TFLOP/s peak")
    if gpu_memory is not None:
        here = dataclasses.replace(here, gpu_memory=parse_bytes(gpu_memory, "gpu_memory"))
    if host_memory is not None:
        here = dataclasses.replace(here, host_memory=parse_bytes(host_memory, "host_memory"))
    described = parts or gpu_memory is not None or host_memory is not None or gpus > 1
    return dataclasses.replace(
        here,
        rates=dataclasses.replace(rates, assumed=tuple(sorted(assumed))),
        gpus=gpus,
        name="described machine" if described else here.name,
        source=", ".join([*parts, f"the rest {here.source}"]) if parts else here.source,
    )


def parse_rate(value: float | str, name: str) -> float:
    """Bytes a second: a number, or a string such as ``"25GB/s"`` (1e9) or ``"23GiB/s"``.

    Raises:
        OptionError: It is malformed or not above 0.
    """
    if isinstance(value, str):
        text = re.sub(r"\s*/\s*s(ec)?\s*$", "", value)
        number: float = parse_bytes(text, name)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise OptionError(f"{name}={value!r}: expected bytes a second or a string like '25GB/s'")
    else:
        number = float(value)
    if number <= 0:
        raise OptionError(f"{name}={value!r}: a rate must be above 0")
    return float(number)


def _interpolate(table: tuple[tuple[int, float], ...], nbytes: float) -> float:
    """The rate at a size between the measured ones: the time of a copy is linear in its bytes."""
    if nbytes <= table[0][0]:
        return table[0][1]
    for (low, slow), (high, fast) in itertools.pairwise(table):
        if nbytes <= high:
            share = (nbytes - low) / (high - low)
            seconds = (1 - share) * low / slow + share * high / fast
            return nbytes / seconds
    return table[-1][1]
