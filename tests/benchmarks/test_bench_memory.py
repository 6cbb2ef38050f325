"""Timing on the CPU: what is freed is used again, so that no step pays for memory that another returned."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import sys

import torch

from benchmarks.harness import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()


def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(48 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


# glibc's memalign cuts a fragment off each block; until seven of a size lie in its thread cache, the freed
# block may be too short for the next.
for _ in range(16):
    faults()
print(max(faults() for _ in range(8)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again():
    faults = {}
    for mode in ("keep", "return"):
        argv = [sys.executable, "-c", FAULTS, mode]
        faults[mode] = int(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    assert faults["keep"] < 100
    assert faults["return"] > 10_000
