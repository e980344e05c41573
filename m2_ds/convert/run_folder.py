"""Reading a run folder's checkpoints: which there are, whether they are whole, which to take.

checkpoints/step-00001000/
  model/        canonical weights (fp32) with config.json and the tokenizer: what `m2_ds.load` reads
  engine/       DeepSpeed's own files: optimizer, schedule, sharded weights
  state.json    step, samples seen, layout
  checksums.json   SHA-256 of every file above; written last
"""

import json
import logging
from pathlib import Path

from m2_ds.files import sha256

log = logging.getLogger(__name__)

CHECKPOINTS, MODEL, ENGINE, STATE, CHECKSUMS = "checkpoints", "model", "engine", "state.json", "checksums.json"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in ``folder``, in no order."""
    return [int(p.name.removeprefix("step-")) for p in folder.glob("step-*") if p.is_dir()]


def verify(checkpoint: Path) -> None:
    """Raises ValueError that names the first missing or changed file."""
    try:
        checksums: dict[str, str] = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{checkpoint} has no readable {CHECKSUMS}: {error}") from None
    for name, digest in checksums.items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if sha256(path) != digest:
            raise ValueError(f"{path} is damaged: its checksum differs from the one in {CHECKSUMS}")


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are passed over, with the reason in the log."""
    for step in sorted(checkpoint_steps(folder), reverse=True):
        path = folder / f"step-{step:08}"
        try:
            verify(path)
        except ValueError as error:
            log.warning("checkpoint %s passed over: %s", path.name, error)
            continue
        return path
    return None
