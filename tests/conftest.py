"""What every test shares."""

from __future__ import annotations

import os
from importlib.util import find_spec

# Several test processes share the cores, and threads that wait for a core that another process has wait long. So there
# is one thread where a test asks for no more, and where it does, threads that wait sleep: those that spin take the core
# from the one that they wait for. OpenMP reads both when torch loads it; programs that tests start inherit them. What
# is set already stays: `make test-isa`.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from hypothesis import settings

# Triton decides when it is imported whether its kernels are compiled or interpreted, and libraries import it unasked:
# so this comes before any test module, in every process that runs tests. With a GPU the tests run on it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# GPU machines run the tests from the source tree, without the libraries that only the command line uses.
collect_ignore_glob = [] if find_spec("tyro") and find_spec("rich") else ["cli/*", "unit/test_cli_*"]
# The server comes with an extra.
collect_ignore_glob += [] if find_spec("fastapi") and find_spec("prometheus_client") else ["server"]

# Two shared cores stall now and then; a slow example says nothing about the code, and a hang meets pytest's timeout.
settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")
