"""Retrieval, zero-shot classification and probes of a model (docs/evaluation.md)."""

from m2_ds.cli import run
from m2_ds.commands import evaluate

if __name__ == "__main__":
    run(evaluate, "evaluate")
