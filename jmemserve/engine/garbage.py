"""The cyclic garbage collector of a process that serves.

What is there once all is loaded (modules, weights, compiled programs) stays until the end: it is taken out of what the
collector looks through. What requests leave is mostly freed by counting references, so looking for cycles among it may
be rarer than Python does it by default; a full look never happens in the middle of a step for long.
"""

import gc

YOUNG = 50_000  # objects more than were freed, before the youngest are looked through
OLDER = (20, 50)  # so many times, before older ones are


def settle() -> None:
    """To be called once, when what the process serves with is ready: collects, and freezes what is left."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, *OLDER)
