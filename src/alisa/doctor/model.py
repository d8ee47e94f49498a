"""What a model is and whether it would run here, from its config or the header of its file: no weight is read."""

from __future__ import annotations

from alisa.config import format_bytes
from alisa.doctor.finding import Finding, Status
from alisa.errors import ModelError
from alisa.model.hub import resolve_model
from alisa.model.names import weight_bytes
from alisa.model.precision import resolve_device, resolve_dtype
from alisa.model.stored import open_model
from alisa.spec import DTYPE_BYTES

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
    dtype = str(resolve_dtype("auto", dtype_name, resolve_device("auto"))).removeprefix("torch.")
    weights = format_bytes(weight_bytes(spec, DTYPE_BYTES[dtype]))
    template = "a chat template" if tokenizer.has_chat_template else "no chat template"
    text = (
        f"{name}: {spec.family}, {spec.num_parameters / 1e6:.0f} million parameters, {weights} of weights in {dtype}, "
        f"up to {spec.max_positions} tokens, {tokenizer.vocab_size} tokens known, {template}"
    )
    if stored.has_codes:
        text += "; its file has them in 4 bits, which --weight-dtype int4 runs as they are on a CPU"
    return Finding(Status.OK, _TOPIC, text)
