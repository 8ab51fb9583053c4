"""How do the processes of a run that Lightning started end together? When the one that started them does, all do.

Nothing here imports torch.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress

FIRST = "DIFFUSION_FIRST_RANK"  # in the environment: the process that starts the other ranks of this machine
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with_first_rank() -> None:
    """Let a rank that Lightning started end when the process that started it does, even by SIGKILL.

    Otherwise it would wait for it, for half an hour, with the memory of its device.
    """
    parent = os.environ.get(FIRST)
    if "RANK" in os.environ or os.environ.get("LOCAL_RANK", "0") == "0":  # torchrun's, or the one that starts others
        os.environ[FIRST] = str(os.getpid())
        return
    if parent is None:
        return
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(int(parent),), daemon=True).start()
    if os.getppid() != int(parent):  # it ended before this was said
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
