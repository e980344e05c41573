#!/usr/bin/env python
"""Draws docs/figures/grouped_aggregation.png:  python docs/figures/grouped_aggregation.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BLUE, SAND, GREEN, GREY = "#4878a8", "#e0a458", "#6a9a5b", "#8a8a8a"


def box(axis: Axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02", fc=colour, ec="none", alpha=0.9))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8, color="white")


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=GREY, lw=1))


def main() -> None:
    figure, axis = plt.subplots(figsize=(10.5, 4.6), layout="constrained")
    axis.set_axis_off()
    axis.set_xlim(-0.35, 11.2)
    axis.set_ylim(-0.9, 4.6)
    heads = ("pass 1: k forwards, features only", "one gather, one loss", "pass 2: k backwards", "once a step")
    for x, head in zip((1.6, 5.0, 7.85, 10.2), heads):
        axis.text(x, 4.35, head, ha="center", fontsize=9, weight="bold")
    for group in range(2):
        low = 2.2 - 2.2 * group
        axis.add_patch(
            FancyBboxPatch((0.0, low - 0.1), 9.25, 1.95, boxstyle="round,pad=0.05", fc="none", ec=SAND, lw=1.2, ls="--")
        )
        axis.text(-0.12, low + 0.85, f"group {group}", rotation=90, ha="center", va="center", fontsize=8, color=SAND)
        for rank in range(2):
            y = low + 1.0 - rank * 0.95
            for micro in range(3):
                kept = micro == 2
                box(axis, 0.15 + micro * 1.02, y, 0.9, 0.7, f"b pairs\n{'graph kept' if kept else 'no graph'}", BLUE)
                order = 0 if kept else micro + 1
                text = "backward" if kept else "forward,\nbackward"
                box(axis, 6.3 + order * 1.0, y, 0.88, 0.7, text, GREEN)
            arrow(axis, (3.15, y + 0.35), (3.6, y + 0.35))
            arrow(axis, (5.75, y + 0.35), (6.25, y + 0.35))
        box(
            axis,
            3.65,
            low + 0.05,
            2.05,
            1.65,
            "features of g k b pairs,\nlog-sum-exps,\ngradients of own rows:\nexact, in tiles",
            SAND,
        )
    box(axis, 9.75, 0.2, 0.95, 3.6, "average\nparameter\ngradients\nover all\nranks;\nupdate", GREY)
    for y in (0.85, 3.05):
        arrow(axis, (9.3, y), (9.7, y))
    axis.text(
        5.0, -0.65, "4 ranks, groups of g = 2, k = 3 micro-batches of b pairs: contrastive batch g k b, "
        "optimizer batch 4 k b. Nothing is sent between groups but parameter gradients.", ha="center", fontsize=8,
    )  # fmt: skip
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
