"""From what a user types after `--model` to a directory or a GGUF file on this machine.

What is there is taken as it is; `owner/name` is looked up on the Hugging Face hub, and only what this library reads is
downloaded: configs, tokenizer, and the weights in one format, not in every format the repository offers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from alisa.errors import ModelError

_TEXT_FILES = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.json")
_TEXT_FILES += ("merges.txt", "added_tokens.json", "chat_template.jinja")
_SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
_GGUF = ".gguf"
_TIMEOUT_S = 10.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_model(name: str) -> Path:
    """The directory or GGUF file of a model given as either or as a hub id, downloaded if need be.

    A directory (or repository) without other weights stands for the one GGUF file in it.

    Raises:
        ModelError: neither exists, or the hub cannot be reached and the model is not in its local cache.
    """
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():
        chosen = _only_gguf([entry.name for entry in path.iterdir()], name)
        return path if chosen is None else path / chosen
    if path.is_file():
        if path.suffix == _GGUF:
            return path
        raise ModelError(
            f"{name} is a file; give a .gguf file, or the directory that holds config.json, the weights and the "
            "tokenizer."
        )
    if _looks_like_path(name):
        raise ModelError(
            f"The model directory {name} does not exist; check the path, or give a hub id such as owner/name."
        )
    return _download(name)


def resolve_config(name: str) -> Path:
    """The directory that holds the config.json of a model, downloaded without its weights if need be; or its GGUF file.

    Raises:
        ModelError: neither a directory nor a hub id that can be reached or is in the local cache.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir() or path.is_file() or _looks_like_path(name):
        return resolve_model(name)
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(name, "config.json", etag_timeout=_TIMEOUT_S)).parent
    except Exception as error:
        raise ModelError(
            f"{name!r} is not a directory here, and its config cannot be downloaded from the Hugging Face hub "
            f"({_reason(error)}); give the directory of a downloaded model, or check the name and the connection."
        ) from error


def _looks_like_path(name: str) -> bool:
    """Whether no hub id can be meant: `./x`, `/x`, `~/x`, `a/b/c`, `x/`, a blank."""
    return _HUB_ID.fullmatch(name) is None


def _only_gguf(files: Sequence[str], place: str) -> str | None:
    """The GGUF file among the files of a model; None: it has weights in another format, or none.

    Raises:
        ModelError: there are several, and nobody can tell which one is meant.
    """
    if any(fnmatch(file, pattern) for file in files for pattern in ("*.safetensors", "*.bin")):
        return None
    # The part of a multimodal model that sees or hears has a file of its own.
    found = sorted(file for file in files if file.endswith(_GGUF) and not os.path.basename(file).startswith("mmproj"))
    if len(found) > 1:
        shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise ModelError(
            f"{place} holds {len(found)} GGUF files ({shown}); give the path of one, fetched with "
            "`hf download OWNER/NAME FILE` if it is on the hub."
        )
    return found[0] if found else None


def _download(hub_id: str) -> Path:
    # Here and not on top: the import costs a noticeable part of a second, and most models are directories.
    import huggingface_hub

    try:
        # One request without retries: an offline machine should learn so at once, not after half a minute.
        files = huggingface_hub.HfApi().model_info(hub_id, timeout=_TIMEOUT_S).siblings or []
        names = [file.rfilename for file in files]
        gguf = _only_gguf(names, hub_id)
        if gguf is not None:
            return Path(huggingface_hub.hf_hub_download(hub_id, gguf))
        has_safetensors = any(fnmatch(name, _SAFETENSORS[0]) for name in names)
        weights = _SAFETENSORS if has_safetensors else _PICKLES
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=[*_TEXT_FILES, *weights]))
    except ModelError:
        raise
    # Whatever goes wrong on the way (network, permission, proxy, disk) ends in the same question: is it in the cache?
    except Exception as error:
        cached = _from_cache(hub_id)
        if cached is not None:
            return cached
        raise ModelError(
            f"{hub_id!r} is not a directory here, and it cannot be downloaded from the Hugging Face hub "
            f"({_reason(error)}); give the directory of a downloaded model, or check the name and the connection."
        ) from error


def _from_cache(hub_id: str) -> Path | None:
    """The snapshot of an earlier download, when it holds weights."""
    import huggingface_hub

    try:
        path = Path(huggingface_hub.snapshot_download(hub_id, local_files_only=True))
    except Exception:
        return None  # the first error tells the user more than "not in the cache"
    has_weights = any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
    if has_weights:
        return path if (path / "config.json").is_file() else None
    gguf = _only_gguf([str(file.relative_to(path)) for file in path.rglob(f"*{_GGUF}")], hub_id)
    return None if gguf is None else path / gguf


def _reason(error: Exception) -> str:
    """An exception of the hub library in a few words."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "access must be granted on its page first, then log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, OSError) and error.errno is not None:
        return str(error)
    if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ConnectionError", "LocalEntryNotFoundError"):
        return "the hub cannot be reached"
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return first_line[:160]
