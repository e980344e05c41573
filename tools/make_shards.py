"""Build, convert and check data sets of image-text pairs (see docs/data.md)."""

import sys
from pathlib import Path

import tyro

from m2_ds.data.sources import emoji, inspect, jsonl, scenes, tar

COMMANDS = {
    "emoji": emoji.build,
    "scenes": scenes.build,
    "tar": tar.convert,
    "jsonl": jsonl.convert,
    "inspect": inspect.inspect,
    "verify": inspect.verify,
}

if __name__ == "__main__":
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog=Path(__file__).name, description=__doc__)
    except ValueError as error:
        sys.exit(f"make_shards: {error}")
