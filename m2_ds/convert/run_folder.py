"""Reading a run folder's checkpoints: which there are, whether they are whole, which to take.

checkpoints/step-00001000/
  model/        canonical weights (fp32) with config.json and the tokenizer: what `m2_ds.load` reads
  optimizer/    the optimizer's state (fp32), a folder for each kind of it, under the names of the weights
  adapter/      of a LoRA run: its adapters (fp32) as peft has them; model/ has them merged into the weights
  config.yaml   the run's resolved configuration
  state.json    step, samples seen, the layout that wrote it
  checksums.json   SHA-256 of every file above; written last

Nothing in it depends on the layout: any other one reads its slices of the same files.
"""

import json
import logging
import re
from pathlib import Path

from m2_ds.files import sha256

log = logging.getLogger(__name__)

CHECKPOINTS, MODEL, OPTIMIZER, ADAPTER = "checkpoints", "model", "optimizer", "adapter"
SETTINGS, STATE, CHECKSUMS = "config.yaml", "state.json", "checksums.json"

_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in ``folder``, in no order; anything else that lies there is not looked at."""
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return [int(match[1]) for match, path in found if match and path.is_dir()]


def verify(checkpoint: Path, part: str = "", holds: str = STATE) -> None:
    """Compare the files of a checkpoint with their checksums; with ``part`` only those whose path in it begins so.

    ``holds``: the beginning of a file's path that the list of checksums has to have. Raises ValueError that names the
    first missing, changed or unreadable file.
    """
    for name, digest in _checksums(checkpoint, holds).items():
        path = checkpoint / name
        if not name.startswith(part):
            continue
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        try:
            found = sha256(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        if found != digest:
            raise ValueError(f"{path} is damaged: its checksum differs from the one in {CHECKSUMS}")


def _checksums(checkpoint: Path, holds: str) -> dict[str, str]:
    path = checkpoint / CHECKSUMS
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict) or not any(name.startswith(holds) for name in content):
        raise ValueError(f"{path} is damaged: it is no list of the checkpoint's files")
    return content


def newest_good(folder: Path, part: str = "") -> Path | None:
    """The newest checkpoint that verifies; damaged ones are passed over, with the reason in the log."""
    for step in sorted(checkpoint_steps(folder), reverse=True):
        path = folder / checkpoint_name(step)
        try:
            verify(path, part)
        except ValueError as error:
            log.warning("checkpoint %s passed over: %s", path.name, error)
            continue
        return path
    return None
