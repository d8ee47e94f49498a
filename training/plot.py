"""Draw log.jsonl as loss_curve.svg: losses and recall accuracy over tokens, without a plot library.

python plot.py
"""

import json

from common import HERE

WIDTH, HEIGHT, LEFT, TOP, GAP = 860, 300, 60, 40, 60
SMOOTHING = 0.9
Series = list[tuple[float, float]]


def read_series(name: str, smooth: bool) -> Series:
    """(millions of tokens, value) of one field of the log; training losses are smoothed."""
    points, running = [], None
    for line in (HERE / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        if name in record:
            value = record[name]
            if smooth and running is not None:
                value = SMOOTHING * running + (1 - SMOOTHING) * value
            running = value
            points.append((record["tokens"] / 1e6, value))
    return points


def panel(top: int, title: str, series: dict[str, tuple[str, Series]], high: float) -> list[str]:
    """One set of axes from 0 to `high` with its lines and a legend."""
    right = max(x for _, points in series.values() for x, _ in points)

    def place(x: float, y: float) -> str:
        return f"{LEFT + x / right * WIDTH:.1f},{top + HEIGHT * (1 - min(y, high) / high):.1f}"

    parts = [
        f'<text x="{LEFT}" y="{top - 12}" font-weight="bold">{title}</text>',
        f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>',
    ]
    for tick in range(6):
        y = top + HEIGHT * (1 - tick / 5)
        x = LEFT + WIDTH * tick / 5
        parts += [
            f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y}" y2="{y}" stroke="#eee"/>',
            f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{high * tick / 5:.1f}</text>',
            f'<text x="{x}" y="{top + HEIGHT + 18}" text-anchor="middle">{right * tick / 5:.1f}</text>',
        ]
    for index, (name, (colour, points)) in enumerate(series.items()):
        line = " ".join(place(x, y) for x, y in points)
        y = top + 20 + 18 * index
        parts += [
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
            f'<text x="{LEFT + WIDTH - 10}" y="{y}" fill="{colour}" text-anchor="end">{name}</text>',
        ]
    return parts


def main() -> None:
    """Write loss_curve.svg."""
    losses = {
        "prose (train)": ("#1f77b4", read_series("train_prose", True)),
        "prose (held out)": ("#d62728", read_series("heldout_prose", False)),
        "copied tokens (train)": ("#9467bd", read_series("train_copy", True)),
        "look-up answers (train)": ("#2ca02c", read_series("train_answer", True)),
    }
    accuracy = {
        "answers, under 256 tokens": ("#98df8a", read_series("answer_near", False)),
        "answers, 256 to 1024": ("#2ca02c", read_series("answer_far", False)),
        "copying, under 256": ("#c5b0d5", read_series("copy_near", False)),
        "copying, 256 to 1024": ("#9467bd", read_series("copy_far", False)),
    }
    second = TOP + HEIGHT + GAP + 20
    parts = panel(TOP, "loss (nats per token) over millions of tokens", losses, 8.0)
    parts += panel(second, "held-out accuracy (length 1024) over millions of tokens", accuracy, 1.0)
    width, height = LEFT + WIDTH + 30, second + HEIGHT + 40
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
    )
    (HERE / "loss_curve.svg").write_text(svg + "\n".join(parts) + "\n</svg>\n")


if __name__ == "__main__":
    main()
