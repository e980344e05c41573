"""Embeddings of a data set's pictures and captions as Parquet (docs/evaluation.md)."""

from m2_ds.cli import run
from m2_ds.commands import embed

if __name__ == "__main__":
    run(embed, "embed")
