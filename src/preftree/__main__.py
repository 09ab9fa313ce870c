"""The command `preftree` as a process; also `python -m preftree`, for launchers that want a module."""

from __future__ import annotations

import atexit
import os
import sys

from preftree.cli import main


def start() -> None:
    """Run `preftree.cli.main` and end the process by its status.

    One of several that a launcher started leaves before the interpreter is taken apart. PyTorch keeps the threads of a gloo
    group alive behind its end (a model that DDP wrapped holds it), and one that lets go of its last exchange when there is no
    interpreter any more aborts the process; the launcher would then call a run failed that is done.
    """
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit.register(_leave, code)
    sys.exit(code)


def _leave(code: int) -> None:
    """All that an exit does up to the end of the interpreter: threads are joined by now, other exit functions follow."""
    atexit.unregister(_leave)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    start()
