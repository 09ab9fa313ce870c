"""Collections of Python's garbage that do not look at what compilers have made."""

from __future__ import annotations

import gc


class ObjectsKept:
    """While a run lasts: the objects that there are after its first step are left out of collections.

    A collection looks at every object, and compiling a model's layers makes some hundred thousand of them: half a second
    each time, in which the device has nothing to do. Where somebody else has objects frozen already, all stays as it is.

    Args:
        wanted: whether there is a device that would wait.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._frozen = False

    def __enter__(self) -> ObjectsKept:
        return self

    def after_step(self) -> None:
        """After a run's first step what is garbage already is collected, and the rest is kept."""
        # (Counting looks at each of them: once is enough.)
        if self._wanted and not self._frozen and not gc.get_freeze_count():
            gc.collect()
            gc.freeze()
            self._frozen = True

    def __exit__(self, *_: object) -> None:
        if self._frozen:
            gc.unfreeze()
        self._wanted = self._frozen = False
