"""What a model is and whether it would run here, from its config or the header of its file: no weight is read."""

from __future__ import annotations

from alisa.config import format_bytes
from alisa.doctor.finding import Finding, Status
from alisa.errors import ModelError
from alisa.model.choose_linear import resolve_weight_dtype
from alisa.model.hub import resolve_model
from alisa.model.precision import resolve_device, resolve_dtype
from alisa.model.stored import open_model
from alisa.planner.footprint import weight_bytes

_TOPIC = "given model"


def examine(name: str) -> Finding:
    """One finding about a model given as a directory, a file or a hub id (which is downloaded)."""
    try:
        stored = open_model(resolve_model(name))
        tokenizer = stored.tokenizer()
        dtype_name = stored.dtype_name()
    except ModelError as error:
        return Finding(Status.PROBLEM, _TOPIC, str(error))
    spec = stored.spec
    device = resolve_device("auto")
    dtype = str(resolve_dtype("auto", dtype_name, device)).removeprefix("torch.")
    chosen = resolve_weight_dtype("auto", stored.weight_format, device)
    num_bytes = weight_bytes(spec, dtype, packs_tied=device.type == "cpu", weight_dtype=chosen)
    weights = f"{format_bytes(num_bytes)} of weights in {dtype if chosen == 'float' else chosen}"
    if chosen != "float":
        weights += f" as its file has them (--weight-dtype float: {dtype})"
    template = "a chat template" if tokenizer.has_chat_template else "no chat template"
    text = (
        f"{name}: {spec.family}, {spec.num_parameters / 1e6:.0f} million parameters, {weights}, "
        f"up to {spec.max_positions} tokens, {tokenizer.vocab_size} tokens known, {template}"
    )
    if chosen == "float" and stored.has_codes:
        text += "; its file has most of them in 4 bits, which --weight-dtype int4 runs as they are on a CPU"
    return Finding(Status.OK, _TOPIC, text)
