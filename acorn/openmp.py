"""LLVM's OpenMP runtime in place of the GNU one that torch's Linux wheels bring.

Threads of the GNU runtime spin while they wait for one another, and do not see that other programs need the cores: two
runs side by side then take up to ten times as long each. LLVM's runtime yields when the cores are oversubscribed, and
is as fast alone. Both execute the same loop schedule, so results are the same to the bit.
"""

import ctypes
import os
import sys
from pathlib import Path

# a user who set one of these has chosen how threads wait
USER_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY", "LD_PRELOAD")
SPIN_MILLISECONDS = 1  # covers the gap between two operations of an update; after that a thread sleeps


def load() -> bool:
    """Load LLVM's OpenMP runtime; return whether it is in use.

    It must come before torch: symbols that are global already take precedence when torch's libraries are linked. A
    no-op outside Linux, where torch has another runtime, where the package is not installed, where torch is loaded
    already, and where the user's environment says how threads wait.
    """
    if sys.platform != "linux" or "torch" in sys.modules or any(name in os.environ for name in USER_SETTINGS):
        return False
    libraries = (Path(folder) / "cmeel.prefix/lib/libomp.so" for folder in sys.path if folder)
    path = next((library for library in libraries if library.is_file()), None)
    if path is None:
        return False
    try:
        openmp = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        openmp.kmp_set_blocktime(SPIN_MILLISECONDS)
    except (OSError, AttributeError):  # built for another system
        return False
    return True
