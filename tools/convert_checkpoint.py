"""Convert checkpoints: released files, canonical and run folders, DeepSpeed's folders (docs/checkpoints.md)."""

from m2_ds.cli import run
from m2_ds.convert.command import convert

if __name__ == "__main__":
    run(convert, "convert_checkpoint")
