"""Preparation of raw pairs: clean, filter, deduplicate, score and balance them into shards (docs/preparation.md)."""

from m2_ds.cli import run
from m2_ds.prepare.command import prepare

if __name__ == "__main__":
    run(prepare, "filter_pairs")
