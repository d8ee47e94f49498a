"""Export the checkpoint as a standard Hugging Face LLaMA folder, and prove that it is one.

    python export.py [--out DIR]

transformers must load the folder and give the same logits as the training model.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from common import EMBEDDED, WORK, load_config
from model import Llama, ModelConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 1e-4


def load_trained(config: dict) -> tuple[Llama, dict]:
    """The model of the newest checkpoint, and its progress."""
    state = torch.load(WORK / "checkpoint.pt", weights_only=False)
    model = Llama(ModelConfig(vocab_size=config["tokenizer"]["vocab_size"], **config["model"]))
    model.load_state_dict(state["model"])
    return model.eval(), state["progress"]


def hugging_face_config(config: dict, bos: int, eos: int) -> dict:
    """config.json: rope_theta is given both as the classic field and as rope_parameters."""
    shape = config["model"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config["tokenizer"]["vocab_size"],
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"],
        "num_hidden_layers": shape["num_layers"],
        "num_attention_heads": shape["num_heads"],
        "num_key_value_heads": shape["num_kv_heads"],
        "head_dim": shape["head_dim"],
        "hidden_act": "silu",
        "max_position_embeddings": shape["max_position_embeddings"],
        "rms_norm_eps": shape["rms_norm_eps"],
        "rope_theta": shape["rope_theta"],
        "rope_parameters": {"rope_type": "default", "rope_theta": shape["rope_theta"]},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def write_folder(model: Llama, config: dict, out: Path) -> None:
    """Weights under their transformers names, configs, tokenizer; the weights move in last."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(WORK / name, out / name)
    vocab = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    bos, eos = vocab["<s>"], vocab["</s>"]
    files = {
        "config.json": hugging_face_config(config, bos, eos),
        "generation_config.json": {"bos_token_id": bos, "eos_token_id": eos},
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    weights = {f"model.{n}": p.detach().contiguous() for n, p in model.named_parameters()}
    partial = out / "model.safetensors.tmp"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(out / "model.safetensors")


@torch.no_grad()
def largest_difference(model: Llama, out: Path) -> float:
    """Largest absolute difference of the logits from those of transformers."""
    reference = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "The word for river is garden. What is the word for river? \N{SNOWMAN} caf\u00e9\n"
    ids = tokenizer(text)["input_ids"]
    if ids[0] != tokenizer.bos_token_id or tokenizer.decode(ids[1:]) != text:
        raise SystemExit("the tokenizer does not add bos or does not round-trip")
    generator = torch.Generator().manual_seed(0)
    length = model.config.max_position_embeddings
    batch = torch.randint(0, model.config.vocab_size, (1, length), generator=generator)
    batch[0, : len(ids)] = torch.tensor(ids)
    return (model(batch) - reference(batch).logits).abs().max().item()


def main() -> None:
    """Export and check."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, default=EMBEDDED)
    out = arguments.parse_args().out
    config = load_config()
    model, progress = load_trained(config)
    write_folder(model, config, out)
    difference = largest_difference(model, out)
    print(f"step {progress['step']}: largest difference of logits {difference:.2e}")
    if not difference <= TOLERANCE:  # also catches nan
        raise SystemExit("the export does not compute what the training model computes")


if __name__ == "__main__":
    main()
