"""Formats of weights and tokenizers that are not read here: what they are called, and what to do with them."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path


@dataclass(frozen=True, slots=True)
class OtherFormat:
    """Files of one format."""

    pattern: str
    """Of their names."""
    what: str
    way_out: str


_HUB_FORM = "take the repository of this model that has config.json with model.safetensors"
_MAKERS = f"{_HUB_FORM}, or convert it with the convert_*_weights_to_hf.py of transformers"
_ONE_PIECE = (
    "convert it once with transformers and sentencepiece installed: "
    "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes tokenizer.json"
)
_OTHER_REPOSITORY = "take tokenizer.json from a repository of this model that has it"

_ADAPTER = (
    "an adapter, the changes to another model",
    "merge the two once with peft (PeftModel.merge_and_unload, then save_pretrained) and give the merged directory",
)
_UNQUANTISED = "give the repository that they were made from, with --weight-dtype int8 if memory is short"

MARKS = (
    OtherFormat("adapter_config.json", *_ADAPTER),
    OtherFormat("quantize_config.json", "weights quantised by GPTQ", _UNQUANTISED),
    OtherFormat("quant_config.json", "weights quantised by AWQ", _UNQUANTISED),
)
"""Files that say of the weights beside them that they are no plain model's."""
WEIGHTS = (
    OtherFormat("adapter_model.*", *_ADAPTER),
    OtherFormat("consolidated*.safetensors", "the form of the model's maker", _MAKERS),
    OtherFormat("consolidated*.pth", "the form of the model's maker", _MAKERS),
    OtherFormat("openvino_model.bin", "OpenVINO's form", _HUB_FORM),
    OtherFormat("*.onnx", "ONNX", _HUB_FORM),
    OtherFormat("tf_model*.h5", "TensorFlow's form", _HUB_FORM),
    OtherFormat("flax_model*.msgpack", "Flax's form", _HUB_FORM),
    OtherFormat("*.ot", "the form of rust-bert", _HUB_FORM),
    OtherFormat("ggml-*.bin", "GGML, which GGUF has replaced", "take a .gguf file of this model"),
    OtherFormat("*.nemo", "NeMo's form", _HUB_FORM),
)
TOKENIZERS = (
    OtherFormat("tokenizer.model", "SentencePiece", _ONE_PIECE),
    OtherFormat("spiece.model", "SentencePiece", _ONE_PIECE),
    OtherFormat("sentencepiece*.model", "SentencePiece", _ONE_PIECE),
    OtherFormat("tekken.json", "Mistral's own form", _OTHER_REPOSITORY),
    OtherFormat("*.tiktoken", "tiktoken's form", _OTHER_REPOSITORY),
    OtherFormat("vocab.txt", "WordPiece, which models that write text do not use", _OTHER_REPOSITORY),
)


def is_other(name: str, formats: tuple[OtherFormat, ...]) -> bool:
    """Whether a file of this name is of one of the formats."""
    return any(fnmatch(name, other.pattern) for other in formats)


def found_format(directory: Path, formats: tuple[OtherFormat, ...]) -> str | None:
    """`FILE (what it is), which is not read here; what to do`, of the first format that a directory has files of."""
    names = sorted(path.name for path in directory.iterdir())
    for other in formats:
        for name in names:
            if fnmatch(name, other.pattern):
                return f"{name} ({other.what}), which is not read here; {other.way_out}"
    return None
