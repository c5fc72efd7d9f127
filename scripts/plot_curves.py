"""Accuracy and entropy of several runs per group, as one SVG: python scripts/plot_curves.py out.svg
embedded=runs/a,runs/b sglang=runs/c,runs/d. Thin lines are runs, thick ones the mean of a group (its size in brackets);
each point is a mean over ten steps."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

PANELS = (("reward/accuracy", "training accuracy"), ("entropy/mean", "entropy, nats"))
COLORS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7a5195", "#b8860b", "#444444")
WIDTH, HEIGHT, MARGIN, WINDOW = 380, 260, 48, 10


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    groups = dict(argument.split("=", 1) for argument in sys.argv[2:])
    write(
        Path(sys.argv[1]), {name: [Path(folder) for folder in folders.split(",")] for name, folders in groups.items()}
    )


def write(path: Path, groups: dict[str, list[Path]]) -> None:
    """`groups`: name -> run folders."""
    runs = {name: [read(folder) for folder in folders] for name, folders in groups.items()}
    spacing = (2 * WIDTH - MARGIN) // len(runs)
    parts = [panel(index, key, title, runs) for index, (key, title) in enumerate(PANELS)]
    legend = [
        f'<text x="{MARGIN + spacing * i}" y="16" fill="{COLORS[i]}">{name} ({len(of_group)})</text>'
        for i, (name, of_group) in enumerate(runs.items())
    ]
    size = f'width="{2 * WIDTH}" height="{HEIGHT + 24}"'
    style = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    path.write_text("\n".join([f"<svg {size} {style}>", background, *legend, *parts, "</svg>\n"]))


def read(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def smooth(values: list[float]) -> list[float]:
    return [statistics.mean(values[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(values))]


def panel(index: int, key: str, title: str, runs: dict[str, list[list[dict[str, float]]]]) -> str:
    lines = {name: [smooth([row[key] for row in run]) for run in of_group] for name, of_group in runs.items()}
    flat = [value for of_group in lines.values() for line in of_group for value in line]
    low, high, steps = min(flat), max(flat), max(len(line) for of_group in lines.values() for line in of_group)
    left, top, width, height = index * WIDTH + MARGIN, 40, WIDTH - MARGIN - 12, HEIGHT - 56

    def path(line: list[float]) -> str:
        points = [
            f"{left + width * i / max(1, steps - 1):.1f},{top + height * (1 - (v - low) / (high - low)):.1f}"
            for i, v in enumerate(line)
        ]
        return " ".join(points)

    drawn = [f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>']
    drawn.append(f'<text x="{left}" y="{top - 6}">{title}, over steps 1 to {steps}</text>')
    for value, y in ((high, top + 10), (low, top + height)):
        drawn.append(f'<text x="{left - 6}" y="{y}" text-anchor="end">{value:.2f}</text>')
    for color, of_group in zip(COLORS, lines.values(), strict=False):
        style = f'fill="none" stroke="{color}"'
        drawn += [f'<polyline {style} stroke-width="0.7" opacity="0.6" points="{path(line)}"/>' for line in of_group]
        means = [statistics.mean(values) for values in zip(*of_group, strict=False)]
        drawn.append(f'<polyline {style} stroke-width="2.4" points="{path(means)}"/>')
    return "\n".join(drawn)


if __name__ == "__main__":
    main()
