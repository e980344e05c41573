"""Run folders as a job writes them, without a job."""

import json
from pathlib import Path
from typing import Any

import yaml


def line(step: int, **changes: Any) -> dict[str, Any]:
    """A log line: 32 pairs a step, half a second each, written at 1000 s + that."""
    return {
        "step": step,
        "samples": 32 * step,
        "time": 1000.0 + step / 2,
        "loss": 8.0 - step / 100,
        "loss/unimodal": 3.5 - step / 100,
        "loss/vl": 4.5,
        "loss/en": 3.9,
        "loss/zh": 4.1,
        "lr": 1e-3,
        "grad_norm": 2.5,
        "samples_per_s": 64.0,
        "step_s": 0.5,
        "data_wait_share": 0.01,
        "tflops": 0.2,
        "mfu": 0.31,
        "memory_gb": 1.5,
        "communication_share": 0.02,
        "skipped": {},
        "other_language": 0,
        "epochs/shapes": step / 10,
        **changes,
    }


class Folder:
    """Writes what a job would."""

    def __init__(self, path: Path, **config: Any) -> None:
        self.path = path
        path.mkdir(parents=True)
        self.configure(**{"steps": 100, "optim": {"lr": 1e-3}, **config})

    def configure(self, **config: Any) -> None:
        (self.path / "config.yaml").write_text(yaml.safe_dump({"folder": str(self.path), **config}))

    def log(self, *lines: dict[str, Any] | str) -> "Folder":
        """Append lines; a text as it is."""
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as handle:
            handle.writelines(each if isinstance(each, str) else json.dumps(each) + "\n" for each in lines)
        return self

    def evaluate(self, step: int, **recalls: float) -> "Folder":
        metrics = {f"shapes/val/{language}/mean_recall": value for language, value in recalls.items()}
        self.write(f"evaluation/step-{step:08}.json", {"step": step, "metrics": metrics})
        return self

    def write(self, name: str, content: Any) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path
