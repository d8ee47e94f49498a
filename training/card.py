"""Write the model card: the text below, with every figure from results.json, log.jsonl and config.

python card.py
"""

import json
from string import Template

from common import EMBEDDED, HERE, load_config
from recall import make_vocabulary
from tokenizers import Tokenizer

TASK_TITLES = {
    "needle": "Look-up, facts scattered through prose (`needle`)",
    "facts": "Look-up, many facts in a block, then prose (`facts`)",
    "list": "Copying random words (`list`)",
    "quote": "Copying a passage of an unseen book (`quote`)",
}


def book_table(prose: dict[str, dict]) -> str:
    """Held-out loss per book."""
    lines = [
        "| book | tokens | loss per token (nats) | perplexity per token | bits per byte | perplexity per byte |"
        " top-1 accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {r['tokens']} | {r['loss_per_token']:.3f} | {r['perplexity_per_token']:.1f}"
        f" | {r['bits_per_byte']:.3f} | {r['perplexity_per_byte']:.3f} | {r['top1_accuracy']:.1%} |"
        for name, r in prose.items()
    ]
    return "\n".join(lines)


def quarter_table(prose: dict[str, dict]) -> str:
    """Held-out loss by place in the context."""
    lines = [
        "| book | first quarter of the context | second | third | fourth |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | " + " | ".join(f"{loss:.3f}" for loss in r["loss_by_quarter_of_context"]) + " |"
        for name, r in prose.items()
    ]
    return "\n".join(lines)


def distance_table(results: dict) -> str:
    """Accuracy of all four tasks by distance."""
    parts = []
    for task, title in TASK_TITLES.items():
        parts += [f"**{title}**", "", "| distance in tokens | targets | accuracy | chance |", "|---|---|---|---|"]
        parts += [
            f"| {row['distance'][0]} to {row['distance'][1]} | {row['targets']} | {row['accuracy']:.1%}"
            f" | {row['chance']:.1%} |"
            for row in results[task]
        ]
        parts.append("")
    return "\n".join(parts).rstrip()


def quoted(text: str) -> str:
    """A sample on one line, in a code span."""
    return "`" + text.replace("\n", "\\n").replace("`", "'") + "`"


def sample_list(samples: list[dict[str, str]]) -> str:
    """Prompt and continuations."""
    lines = []
    for sample in samples:
        lines += [
            f"- Prompt: {quoted(sample['prompt'])}",
            f"  - greedy: {quoted(sample['greedy'])}",
            f"  - sampled, temperature 0.8: {quoted(sample['sampled_at_0.8'])}",
        ]
    return "\n".join(lines)


def main() -> None:
    """Fill card.md.in and write it beside the weights."""
    config = load_config()
    results = json.loads((HERE / "results.json").read_text())
    last = json.loads((HERE / "log.jsonl").read_text().splitlines()[-1])
    tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    vocabulary = make_vocabulary(tokenizer)
    model = config["model"]
    values = {
        **{name: str(value) for name, value in model.items()},
        "vocab_size": config["tokenizer"]["vocab_size"],
        "parameters": f"{results['parameters'] / 1e6:.2f}M",
        "megabytes": f"{(EMBEDDED / 'model.safetensors').stat().st_size / 1e6:.1f}",
        "prose_megabytes": config["data"]["prose_bytes"] // 1_000_000,
        "tokens": f"{last['tokens'] / 1e6:.1f}M",
        "steps": last["step"],
        "minutes": round(last["elapsed_s"] / 60),
        "mix": ", ".join(f"{task} {share:.0%}" for task, share in config["train"]["mix"].items()),
        "lengths": ", ".join(f"{n} ({share:.0%} of steps)" for n, share in config["train"]["lengths"].items()),
        "num_keys": len(vocabulary.keys),
        "num_values": len(vocabulary.values),
        "keys": tokenizer.decode([int(i) for i in vocabulary.keys]).strip(),
        "values": tokenizer.decode([int(i) for i in vocabulary.values]).strip(),
        "books": book_table(results["prose"]),
        "quarters": quarter_table(results["prose"]),
        "distances": distance_table(results),
        "samples": sample_list(results["samples"]),
    }
    text = Template((HERE / "card.md.in").read_text()).substitute(values)
    (EMBEDDED / "README.md").write_text(text)


if __name__ == "__main__":
    main()
