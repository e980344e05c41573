"""Files that are whole or absent: written aside, synced to disk, renamed into place."""

import hashlib
import json
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Force a file's or folder's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(aside: Path, path: Path) -> None:
    """Rename a finished file or folder into place, so that it survives a crash of the machine from here on."""
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there as a whole or not at all."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_bytes(content)
    publish(aside, path)


def write_json(path: Path, content: object) -> None:
    """JSON for people to read, written atomically."""
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
