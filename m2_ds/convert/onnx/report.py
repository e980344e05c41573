"""What an export found, as text for the terminal."""

from collections.abc import Mapping

from rich.filesize import decimal

from m2_ds.convert.onnx.export import Exported
from m2_ds.convert.onnx.folder import Precision, graph_name

_DIRECTIONS = {"image_to_text": "image -> text", "text_to_image": "text -> image"}
_KS = (1, 5, 10)


def summary(exported: Exported) -> str:
    """Differences, cosines and sizes."""
    lines = [
        f"{graph_name(tower, 'fp32')}: embeddings differ from torch's by at most {difference:.1e}"
        for tower, difference in exported.difference.items()
    ]
    lines += [
        f"{graph_name(tower, 'int8')}: cosine to fp32 on built-in inputs {mean:.5f} on average, {least:.5f} at least"
        for tower, (mean, least) in exported.cosine.items()
    ]
    lines.append(", ".join(f"{name} {decimal(size)}" for name, size in exported.sizes.items()))
    return "\n".join(lines)


def differences(fp32: Mapping[str, float], int8: Mapping[str, float]) -> dict[str, float]:
    """int8 - fp32 of every metric, in points."""
    return {name: int8[name] - value for name, value in fp32.items()}


def recall_table(by_precision: Mapping[Precision, Mapping[str, float]]) -> str:
    """Recalls by split, language and direction, a column a precision (and, of two, their difference).

    ``by_precision``: flat percentages such as ``emoji/test/en/text_to_image/r1``.
    """
    columns: dict[str, Mapping[str, float]] = {str(precision): metrics for precision, metrics in by_precision.items()}
    if len(columns) == 2:
        columns["difference"] = differences(*by_precision.values())
    rows = [("split", "language", "R@1/5/10", *columns)]
    places = dict.fromkeys(name.rsplit("/", 2)[0] for name in next(iter(columns.values())) if name.endswith("/r1"))
    for place in places:
        split, language = place.rsplit("/", 1)
        for direction, words in _DIRECTIONS.items():
            cells = []
            for column, metrics in columns.items():
                form = "+6.2f" if column == "difference" else "6.2f"
                cells.append(" / ".join(format(metrics[f"{place}/{direction}/r{k}"], form) for k in _KS))
            rows.append((split, language, words, *cells))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
