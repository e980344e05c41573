"""What benchmarks share: on which machine numbers were taken, and where they go."""

import json
import os
import platform
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def cpu() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text()) if path.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores that may be used, today's date, versions of ``packages``."""
    return {
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "date": time.strftime("%Y-%m-%d"),
        **{package: version(package) for package in packages},
    }


def publish(out: Path, content: Any, text: str) -> None:
    """Write numbers to ``out`` (JSON) and ``text`` beside it, ending in .md; print it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    out.with_suffix(".md").write_text(text)
    print(text)
