"""Tiny checkpoints on disk, as the tests of the engine have them."""

from tests.equivalence.conftest import tiny_model as tiny_model
