"""Use LLVM's OpenMP runtime instead of the GNU runtime in torch's Linux wheels.

GNU threads spin while they wait for each other, even when other programs need the cores. Two runs at the same time then
take up to ten times as long each. LLVM's runtime yields when the cores are oversubscribed, and a single run is as fast.
Both runtimes use the same loop schedule, so results are bit-identical.
"""

import ctypes
import os
import sys
from pathlib import Path

# if the user set any of these, their choice of how threads wait is kept
USER_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY", "LD_PRELOAD")
SPIN_MILLISECONDS = 1  # covers the gap between two operations of an update; then a waiting thread sleeps


def load() -> bool:
    """Load LLVM's OpenMP runtime, and return whether it is in use.

    This must run before torch is imported, because symbols that are already global take precedence when torch's
    libraries are linked. It is a no-op outside Linux, if the package is not installed, if torch is already imported,
    and if one of USER_SETTINGS is set.
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
    except (OSError, AttributeError):  # the library is built for another system
        return False
    return True
