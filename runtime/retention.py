"""Layers with a window: which pages a session gives up, and what can be cropped after that.

Which layers may do so is a hint of the model's config. That they may is what the masks of a call
prove: all sites of the layer have a window, and no query of the call sees a key before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headinfer_compile.errors import CacheError
from headinfer_compile.runtime.block_plan import KEPT_TOKENS, first_kept

if TYPE_CHECKING:
    from headinfer_compile.runtime.pages import BlockTable
    from headinfer_compile.runtime.session import Session


def give_up_pages(session: Session, past: int, stored: int, after: int) -> None:
    """Give up the pages that no call sees any more, if the running call proves it.

    Args:
        session: In a call, before its pages are made.
        past: Tokens held.
        stored: Tokens in pages.
        after: Tokens in pages once the call is done.
    """
    table = session.table
    if past == 0 and table.lacks_resident:
        # The budget may not hold what later blocks took the room of: blocks are placed anew.
        session.wait_idle()
        table.place_anew()
    found = table.surplus(stored, after)
    for window, layers in table.classes.items():
        end = 0 if window is None else _end(session, layers, past)
        found += [
            (block, window)
            for block in table.blocks
            if block.start + block.tokens <= end and block.can_give_up(window)
        ]
    if found:
        session.wait_idle()
        for block, window in found:
            table.give_up(block, window)


def _end(session: Session, layers: list[int], past: int) -> int:
    """End of the tokens that none of ``layers`` needs any more."""
    forms = [form for layer in layers for form in session.forms.get(layer, (None,))]
    windows = [None if form is None else form.window for form in forms]
    if None in windows:
        return 0
    return first_kept(past, max(window for window in windows if window is not None))


def given_up_tokens(table: BlockTable, stored: int) -> dict[int, tuple[int, int]]:
    """By layer with a window: of ``stored`` tokens in pages, the count given up and their end."""
    found = {}
    for window, layers in table.classes.items():
        lost = [
            block
            for block in table.blocks
            if window is not None and block.start < stored and block.lacks(window)
        ]
        if lost:
            end = max(block.start + block.tokens for block in lost)
            found.update(dict.fromkeys(layers, (sum(block.tokens for block in lost), end)))
    return found


def check_crop(session: Session, length: int) -> None:
    """Refuse to go back to where a window saw tokens that have been given up.

    Raises:
        CacheError: It would; nothing is changed.
    """
    if session.geometry is None or length == 0:
        return
    table = session.table
    for layer, (_, end) in given_up_tokens(table, session.length - session.tail_rows).items():
        shortest = end + table.windows[layer] - 1
        if length < shortest:
            raise CacheError(
                f"crop to {length} tokens: the layers with a window keep what it sees and "
                f"{KEPT_TOKENS} tokens more, so {session.length} tokens can go back to "
                f"{shortest} or to 0. Nothing was dropped"
            )
