"""The architectures that GGUF files may have here: one data file each, named as `general.architecture` says.

To add one, write its file (`read_config` and the tensor names) and enter it in `ARCHITECTURES`; its family must be in
`alisa.model.families`.
"""

from __future__ import annotations

from alisa.errors import ModelError
from alisa.model.gguf.architectures import (
    gemma2,
    gemma3,
    gpt2,
    gptneox,
    granite,
    llama,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3moe,
    smollm3,
    stablelm,
    starcoder2,
)
from alisa.model.gguf.architectures.architecture import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    module.ARCHITECTURE.name: module.ARCHITECTURE
    for module in (
        gemma2,
        gemma3,
        gpt2,
        gptneox,
        granite,
        llama,
        olmo2,
        phi3,
        qwen2,
        qwen3,
        qwen3moe,
        smollm3,
        stablelm,
        starcoder2,
    )
}


def find_architecture(name: str, file_name: str) -> Architecture:
    """The architecture of a file.

    Raises:
        ModelError: it is not known; the message lists the known ones.
    """
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{file_name} holds a model of architecture {name!r}; GGUF files may have {', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[name]
