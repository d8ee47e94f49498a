"""What every test shares."""

from __future__ import annotations

from importlib.util import find_spec

from hypothesis import settings

# GPU machines run the tests from the source tree, without the libraries that only the command line uses.
collect_ignore_glob = [] if find_spec("tyro") and find_spec("rich") else ["cli/*", "unit/test_cli_*"]

# Two shared cores stall now and then; a slow example says nothing about the code, and a hang meets pytest's timeout.
settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")
