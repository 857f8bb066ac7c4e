"""acorn/openmp.py: the OpenMP runtime that torch uses."""

import os
import subprocess
import sys

import pytest
from helpers import REPO

from acorn import openmp

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux wheels of torch bring the GNU runtime")
CODE = """
import {first}, {second}, torch
loaded = any("cmeel.prefix/lib/libomp.so" in line for line in open("/proc/self/maps"))
torch.set_num_threads(2)
x = torch.arange(2**20, dtype=torch.float32)
print(loaded, (x * 2).sum().item() == 2.0**20 * (2**20 - 1))
"""


def run(first: str, second: str, **env: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in openmp.USER_SETTINGS}
    code = CODE.format(first=first, second=second)
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=clean | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@LINUX
def test_llvm_runtime_is_loaded_before_torch():
    assert run("acorn", "torch") == "True True"


@LINUX
def test_llvm_runtime_is_not_loaded_after_torch_or_with_user_settings():
    assert run("torch", "acorn") == "False True"
    assert run("acorn", "torch", OMP_WAIT_POLICY="passive") == "False True"
