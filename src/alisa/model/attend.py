"""The seam between the model and everything that knows a cache: one function, called once per layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]
"""layer, q `[B, T, H, D]`, k `[B, T, G, D]`, v `[B, T, G, D]`, hidden `[B, T, C]` -> out `[B, T, H, D]`.

hidden is what q, k and v were projected from: `project_kv` makes k and v from it again.

q and k are already rotated. k and v may be views into the joint K and V product: their last dimension is contiguous,
their token stride `2 * G * D`. The next layer may overwrite all four: whoever wants to keep them takes a copy.
"""
