"""Measure the exported model: held-out prose, recall and copying by distance, samples.

    python evaluate.py --data DIR          (writes results.json)

Recall is judged around held-out prose, with seeds never used in training. An answer is a single
token, so the share of right arg-max predictions is the accuracy of greedy decoding.
"""

import itertools
import json
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from common import EMBEDDED, HERE, load_config, parser, read_heldout
from model import Llama, ModelConfig
from recall import ANSWER, COPY, STATEMENT, TASKS, Prose, Sample, Vocabulary, make_vocabulary
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

BUCKETS = (0, 64, 128, 256, 512, 1024, 1536, 2048)
SEED = 20_000_003
PROMPTS = (
    "It was a dark night, and the wind",
    '"My dear sir," said the old gentleman,',
    "The captain came on deck in the morning and",
    "The word for fire is silver. The word for hand is money. The word for door is sister. "
    "The word for letter is sun. What is the word for hand? money. What is the word for letter?",
)


def load_exported(config: dict) -> Llama:
    """The shipped weights in the training model."""
    model = Llama(ModelConfig(vocab_size=config["tokenizer"]["vocab_size"], **config["model"]))
    weights = load_file(EMBEDDED / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): w for name, w in weights.items()})
    return model.eval()


@torch.no_grad()
def predict(model: Llama, ids: np.ndarray) -> tuple[Tensor, Tensor]:
    """Loss of every target and whether the arg-max is right, each [B, T - 1]."""
    batch = torch.from_numpy(ids.astype(np.int64))
    logits = model(batch[:, :-1])
    losses = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
    return losses, logits.argmax(-1) == batch[:, 1:]


def book_loss(model: Llama, ids: np.ndarray, num_bytes: int, bos: int, context: int) -> dict:
    """The whole book in windows of the full context, each behind bos; every token counts once."""
    body, step = ids[1:], context - 1  # without the tokenizer's bos
    total, right, by_place, counts = 0.0, 0, np.zeros(4), np.zeros(4)
    places = np.minimum(np.arange(context) * 4 // context, 3)
    for start in range(0, len(body), step):
        window = body[start : start + step]
        losses, hits = predict(model, np.concatenate([[bos], window])[None])
        losses = losses[0].double().numpy()
        total, right = total + losses.sum(), right + int(hits.sum())
        by_place += np.bincount(places[: len(losses)], losses, 4)
        counts += np.bincount(places[: len(losses)], minlength=4)
    return {
        "tokens": len(body),
        "bytes": num_bytes,
        "loss_per_token": total / len(body),
        "perplexity_per_token": math.exp(total / len(body)),
        "bits_per_byte": total / num_bytes / math.log(2),
        "perplexity_per_byte": math.exp(total / num_bytes),
        "top1_accuracy": right / len(body),
        "loss_by_quarter_of_context": (by_place / counts).tolist(),
    }


def num_stated(sample: Sample, vocabulary: Vocabulary) -> int:
    """How many different values the sequence states: chance is one in this."""
    link = vocabulary.statement[1][-1]
    stated = (sample.kind[1:] == STATEMENT) & (sample.ids[:-1] == link)
    return len(np.intersect1d(sample.ids[1:][stated], vocabulary.values))


def recall_by_distance(
    model: Llama, vocabulary: Vocabulary, prose: Prose, task: str, lengths: dict[int, int], guess: float | None = None
) -> list[dict]:
    """Accuracy per bucket of distance over `lengths[n]` sequences of each length n.

    `guess` is what is right without recall; None: one in the values the sequence states.
    """
    rng = np.random.default_rng([SEED, list(TASKS).index(task)])
    right, distances, chances = [], [], []
    for length, count in lengths.items():
        for _ in range(count):
            sample = TASKS[task](vocabulary, prose, rng, length)
            target = np.isin(sample.kind[1:], (ANSWER, COPY))
            hits = predict(model, sample.ids[None])[1][0].numpy()
            right += hits[target].tolist()
            distances += sample.distance[1:][target].tolist()
            chance = 1.0 / max(1, num_stated(sample, vocabulary)) if guess is None else guess
            chances += [chance] * int(target.sum())
    right, distances, chances = np.array(right), np.array(distances), np.array(chances)
    rows = []
    for low, high in itertools.pairwise(BUCKETS):
        chosen = (distances >= low) & (distances < high)
        if chosen.any():
            rows.append(
                {
                    "distance": [low, high],
                    "targets": int(chosen.sum()),
                    "accuracy": float(right[chosen].mean()),
                    "chance": float(chances[chosen].mean()),
                }
            )
    return rows


@torch.no_grad()
def continue_text(model: Llama, tokenizer: Tokenizer, prompt: str, count: int, temperature: float) -> str:
    """Greedy (temperature 0) or sampled continuation."""
    generator = torch.Generator().manual_seed(SEED)
    ids = tokenizer.encode(prompt).ids
    start = len(ids)
    for _ in range(count):
        logits = model(torch.tensor([ids]))[0, -1]
        if temperature == 0.0:
            ids.append(int(logits.argmax()))
        else:
            chances = torch.softmax(logits / temperature, dim=-1)
            ids.append(int(torch.multinomial(chances, 1, generator=generator)))
    return tokenizer.decode(ids[start:])


def main() -> None:
    """Everything the model card states, into results.json."""
    arguments = parser(__doc__)
    arguments.add_argument("--sequences", type=int, default=60, help="per task and length")
    arguments.add_argument("--threads", type=int, default=2)
    args = arguments.parse_args()
    torch.set_flush_denormal(True)
    torch.set_num_threads(args.threads)
    begun = time.time()
    config = load_config()
    context = config["model"]["max_position_embeddings"]
    model = load_exported(config)
    tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    vocabulary = make_vocabulary(tokenizer)
    books = read_heldout(args.data)
    encoded = {name: np.array(tokenizer.encode(text).ids, np.uint16) for name, text in books.items()}
    results: dict = {"parameters": sum(p.numel() for p in model.parameters()), "context": context}
    results["prose"] = {
        name: book_loss(model, ids, len(books[name].encode()), vocabulary.bos, context) for name, ids in encoded.items()
    }
    prose = Prose(np.concatenate(list(encoded.values())), vocabulary)
    lengths = {256: args.sequences, 1024: args.sequences, context: args.sequences}
    num_tokens = sum(book["tokens"] for book in results["prose"].values())
    num_right = sum(book["tokens"] * book["top1_accuracy"] for book in results["prose"].values())
    guesses = {"list": 1.0 / len(vocabulary.words), "quote": num_right / num_tokens}
    for task in ("needle", "facts", "list", "quote"):
        results[task] = recall_by_distance(model, vocabulary, prose, task, lengths, guesses.get(task))
    results["samples"] = [
        {
            "prompt": prompt,
            "greedy": continue_text(model, tokenizer, prompt, 60, 0.0),
            "sampled_at_0.8": continue_text(model, tokenizer, prompt, 60, 0.8),
        }
        for prompt in PROMPTS
    ]
    results["evaluation_s"] = round(time.time() - begun, 1)
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
