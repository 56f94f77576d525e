"""The numbers of a cache as tables for a terminal."""

from __future__ import annotations

from rich.table import Table
from transformers import Cache

from headinfer_compile.cache import HeadInferCache
from headinfer_compile.config import format_bytes
from headinfer_compile.stats import CacheStats


def host_share(stats: CacheStats) -> float:
    """The share of the KV bytes whose only copy is in host pages, 0 to 1."""
    if stats.kv_bytes == 0:
        return 0.0
    return max(0.0, 1 - (stats.resident_bytes + stats.tail_bytes) / stats.kv_bytes)


def live_bytes(cache: Cache) -> str:
    """One line of where the bytes of a cache are now; empty for a cache of another kind."""
    if not isinstance(cache, HeadInferCache) or cache.session.geometry is None:
        return ""
    table, counters = cache.session.table, cache.session.counters
    parts = [
        f"device {format_bytes(table.bytes_on('gpu'))}",
        f"host {format_bytes(table.bytes_on('host'))}",
        f"moved {format_bytes(counters.h2d_bytes)} up and {format_bytes(counters.d2h_bytes)} down",
    ]
    return f"KV: {', '.join(parts)}"


def stats_table(stats: CacheStats) -> Table:
    """Where the bytes of a cache are and what moved, as a two-column table."""
    table = Table(title="KV cache", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    sections: list[list[tuple[str, str]]] = [
        [
            ("tokens", f"{stats.tokens:,}"),
            ("KV of these tokens", format_bytes(stats.kv_bytes)),
            ("in host pages only", f"{host_share(stats):.1%}"),
        ],
        [
            ("host: pages", format_bytes(stats.host_bytes)),
            ("host: largest slab", format_bytes(stats.slab_bytes)),
            ("device: resident blocks", format_bytes(stats.resident_bytes)),
            ("device: slots", format_bytes(stats.slot_bytes)),
            ("device: staging", format_bytes(stats.staging_bytes)),
            ("device: tail", format_bytes(stats.tail_bytes)),
            ("device: slots + staging + tail", format_bytes(stats.fixed_bytes)),
            ("device: attention workspace", format_bytes(stats.workspace_bytes)),
        ],
        [
            ("moved host to device", format_bytes(stats.h2d_bytes)),
            ("moved device to host", format_bytes(stats.d2h_bytes)),
            ("attended on the host", format_bytes(stats.cpu_bytes)),
        ],
        [
            ("attentions rewritten", str(stats.sites_rewritten)),
            ("eager updates", str(stats.eager_updates)),
            ("materialised layers", str(stats.materialised_layers)),
        ],
    ]
    if stats.link_utilisation is not None:
        sections[2].append(("link utilisation", f"{stats.link_utilisation:.0%}"))
    if stats.exposed_wait_us is not None:
        sections[2].append(("waited for the link", f"{stats.exposed_wait_us / 1e3:,.1f} ms"))
    for section in sections:
        for name, value in section:
            table.add_row(name, value)
        table.add_section()
    return table
