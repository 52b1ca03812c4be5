"""Importing this module lets the threads of OpenMP sleep while they wait for each other; it must precede PyTorch.

By default they spin. Next to other work they then take the core that the thread they wait for needs, and a training
step takes several times as long (benchmarks/NOTES.md). The bits of the results are the same. Settings that the
environment already has are kept.
"""

import os

if "GOMP_SPINCOUNT" not in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # which OpenMP reads once, when PyTorch is loaded
