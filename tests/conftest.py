"""What every test shares."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from hypothesis import settings

# Triton decides when it is imported whether its kernels are compiled or interpreted, and libraries import it unasked:
# so this comes before any test module, in every process that runs tests. With a GPU the tests run on it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# GPU machines run the tests from the source tree, without the libraries that only the command line uses.
collect_ignore_glob = [] if find_spec("tyro") and find_spec("rich") else ["cli/*", "unit/test_cli_*"]

# Two shared cores stall now and then; a slow example says nothing about the code, and a hang meets pytest's timeout.
settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")
