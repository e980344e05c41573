"""Draws docs/figures/parallelism.png: eight ranks, their groups, and what each collective carries.

python docs/figures/parallelism.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

TENSOR, PIPELINE, DATA, CONTRAST = "#c0392b", "#1f6fb2", "#2e7d32", "#8e44ad"
COLUMNS, ROWS, WIDTH, HEIGHT = (1.3, 2.9, 5.3, 6.9), (4.0, 1.0), 1.2, 1.3
LEGEND = (
    (TENSOR, "tensor: all-reduce, or gather and scatter",
     "tokens x D, two a layer forward and two backward;\ntwo numbers a token for each sub-LayerNorm"),
    (PIPELINE, "pipeline: send and receive",
     "tokens x D down, their gradients up,\nonce a micro-batch and pass"),
    (DATA, "data: ZeRO's reduce and gather",
     "gradients and weights of the rank's own piece,\nonce a step"),
    (CONTRAST, "contrast group: all-gather on the last stage",
     "features and log-sum-exps, once a step;\neach tensor rank has a share of the rows"),
)  # fmt: skip


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float, style: str) -> None:
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            color=colour,
            arrowstyle=style,
            mutation_scale=12,
            linewidth=1.8,
            connectionstyle=f"arc3,rad={bend}",
        )  # fmt: skip
    )


def main() -> None:
    figure, ax = plt.subplots(figsize=(11.5, 5.4))
    for stage, (y, what) in enumerate(
        zip(ROWS, ("embeddings,\nfirst layers of\nboth towers", "last layers,\nvl stack, heads,\nloss"))
    ):
        ax.text(0.55, y + HEIGHT / 2, f"stage {stage}", ha="center", va="bottom", weight="bold", fontsize=11)
        ax.text(0.55, y + HEIGHT / 2 - 0.05, what, ha="center", va="top", color="#555555", fontsize=8)
        for place, x in enumerate(COLUMNS):
            box = FancyBboxPatch((x, y), WIDTH, HEIGHT, "round,pad=0.02", facecolor="#f3f5f7", edgecolor="#555555")
            ax.add_patch(box)
            middle = x + WIDTH / 2
            ax.text(middle, y + 0.95, f"rank {4 * stage + place}", ha="center", weight="bold")
            ax.text(middle, y + 0.62, f"tensor {place % 2}", ha="center", fontsize=8, color="#555555")
            ax.text(middle, y + 0.38, f"data {place // 2}", ha="center", fontsize=8, color="#555555")
            ax.text(middle, y + 0.10, "half of each layer", ha="center", fontsize=7, color="#777777")
        for left, right in ((0, 1), (2, 3)):
            height = y + HEIGHT / 2
            arrow(ax, (COLUMNS[left] + WIDTH, height), (COLUMNS[right], height), TENSOR, 0, "<|-|>")
        for left, right in ((0, 2), (1, 3)):
            ends = [(COLUMNS[p] + WIDTH / 2, y + HEIGHT + 0.03) for p in (left, right)]
            arrow(ax, ends[0], ends[1], DATA, -0.22, "<|-|>")
    for x in COLUMNS:
        for shift, (start, end) in ((-0.12, (ROWS[0], ROWS[1] + HEIGHT)), (0.12, (ROWS[1] + HEIGHT, ROWS[0]))):
            middle = x + WIDTH / 2 + shift
            arrow(ax, (middle, start), (middle, end), PIPELINE, 0, "-|>")
    around = FancyBboxPatch(
        (COLUMNS[0] - 0.15, ROWS[1] - 0.2), COLUMNS[-1] + WIDTH - COLUMNS[0] + 0.3, HEIGHT + 0.4, "round,pad=0.05",
        facecolor="none", edgecolor=CONTRAST, linestyle="--", linewidth=1.8,
    )  # fmt: skip
    ax.add_patch(around)
    for number, (colour, title, text) in enumerate(LEGEND):
        y = 5.6 - 1.25 * number
        ax.add_patch(FancyBboxPatch((8.6, y - 0.02), 0.18, 0.18, "round,pad=0.02", facecolor=colour, edgecolor=colour))
        ax.text(8.95, y, title, weight="bold", fontsize=9.5)
        ax.text(8.95, y - 0.13, text, va="top", fontsize=8.5, color="#444444")
    ax.set_xlim(0, 13)
    ax.set_ylim(0.5, 6.4)
    ax.axis("off")
    figure.tight_layout(pad=0.4)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
