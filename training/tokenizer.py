"""Train the byte-level BPE tokenizer and cache the prose as token ids.

A small vocabulary keeps the embedding small and makes every token frequent enough to be learned
from a few tens of millions of tokens. Byte-level: any UTF-8 text survives encode and decode.
"""

import json
from pathlib import Path

import numpy as np
from common import BOOK_SEPARATOR, WORK, load_config, parser, read_heldout, read_prose
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<s>", "</s>"


def train(text: str, vocab_size: int) -> Tokenizer:
    """Learn the merges; ids 0 and 1 are bos and eos; encoding puts bos in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    paragraphs = text.split("\n\n")
    tokenizer.train_from_iterator(paragraphs, trainer, length=len(paragraphs))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS)), (EOS, tokenizer.token_to_id(EOS))],
    )
    return tokenizer


def write_tokenizer_config(path: Path, max_length: int) -> None:
    """What transformers needs beside tokenizer.json. A base model: no chat template."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    path.write_text(json.dumps(config, indent=2) + "\n")


def encode_books(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Books as one stream of ids, each between bos and eos."""
    books = [book for book in text.split(BOOK_SEPARATOR) if book.strip()]
    eos = tokenizer.token_to_id(EOS)
    parts = []
    for book in books:
        parts += [np.array([*tokenizer.encode(book).ids, eos], dtype=np.uint16)]
    return np.concatenate(parts)


def main() -> None:
    """Write work/tokenizer.json, work/tokenizer_config.json, work/prose.npy, work/heldout.npz."""
    args = parser(__doc__).parse_args()
    config = load_config()
    WORK.mkdir(exist_ok=True)
    tokenizer = train(
        read_prose(args.data, config["tokenizer"]["train_bytes"]),
        config["tokenizer"]["vocab_size"],
    )
    tokenizer.save(str(WORK / "tokenizer.json"))
    write_tokenizer_config(WORK / "tokenizer_config.json", config["model"]["max_position_embeddings"])
    heldout = read_heldout(args.data)
    np.savez(
        WORK / "heldout.npz",
        **{name: np.array(tokenizer.encode(t).ids, np.uint16) for name, t in heldout.items()},
    )
    ids = encode_books(tokenizer, read_prose(args.data, config["data"]["prose_bytes"]))
    np.save(WORK / "prose.npy", ids)
    print(f"{len(ids)} tokens of prose, {config['data']['prose_bytes'] / len(ids):.2f} bytes each")


if __name__ == "__main__":
    main()
