"""Keeps Python's garbage collector from holding up a process that serves.

A full collection looks through every container there is. What modules, models and web frameworks leave behind is some
hundreds of thousands of them, which takes a fifth of a second, in which not a token moves; and none of it ever goes.
"""

from __future__ import annotations

import gc


def keep_what_is_loaded() -> None:
    """Collect once, and never look again through what is there now. Takes as long as one full collection."""
    gc.collect()
    gc.freeze()
