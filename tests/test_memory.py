"""Freed memory that is kept."""

import platform
import subprocess
import sys

import pytest

from helpers import ROOT

PAGE_FAULTS = """
import resource
import torch
from utils.parallel.memory import keep_freed_memory

def page_faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.zeros(2**26, dtype=torch.uint8)  # 64 MiB, 16384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

mapped_anew = page_faults(4)
keep_freed_memory()
page_faults(20)  # until the small objects of the process have found their places
print(mapped_anew, page_faults(4))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_large_tensors_take_the_memory_of_those_before():
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    mapped_anew, kept = map(int, done.stdout.split())
    assert mapped_anew > 10 * kept + 100
