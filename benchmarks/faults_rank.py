"""What benchmarks/faults.py plants in a rank, and a small run to plant it in."""

import ctypes
import os
import random
import signal
import sys
import threading
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

PICTURES, BROKEN_EVERY = 96, 9
HANG_S, SILENCE_S = 15, 8
JOIN_S = 60  # the first rank may be killed before it has a store: for so long others wait for it
HANGS = ("step", "data", "lock", "collective")
WORDS = {"red": "红色", "green": "绿色", "blue": "蓝色", "purple": "紫色", "grey": "灰色", "brown": "棕色"}


@dataclass(frozen=True)
class Fault:
    """``kind``: see benchmarks/faults.py. It strikes on ``rank`` when ``steps`` more steps are done and ``delay``
    seconds passed (``steps`` None: after the start). ``number`` chooses a file of a checkpoint, a place, the room left.
    """

    kind: str
    rank: int
    steps: int | None
    delay: float
    number: int

    @property
    def limit_s(self) -> float:
        """In which the job is to find it."""
        if self.kind == "hang" and HANGS[self.number % len(HANGS)] != "lock":
            return HANG_S
        if self.steps is None and self.kind == "kill":
            return JOIN_S
        return SILENCE_S


def make_data(folder: Path) -> tuple[Path, Path]:
    """A data set of drawn pictures, every ninth of them cut short, and a tokenizer of its captions."""
    from m2_ds.data.shards import Caption, Record, ShardWriter
    from m2_ds.data.text_train import train

    data, lines = folder / "shapes", []
    with ShardWriter(data, "shapes", group_rows=16) as writer:
        for number in range(PICTURES):
            colour = list(WORDS)[number % len(WORDS)]
            image = Image.new("RGB", (40, 40), (255, 255, 255))
            ImageDraw.Draw(image).ellipse((4, 4, 20 + number % 16, 20 + number % 11), colour)
            content = BytesIO()
            image.save(content, "PNG")
            picture = content.getvalue()[:60] if number % BROKEN_EVERY == 0 else content.getvalue()
            texts = [(f"a {colour} circle, number {number}", "en"), (f"第{number}个{WORDS[colour]}的圆形", "zh")]
            lines += [text for text, _ in texts]
            captions = [Caption(text, language, 1.0, "short") for text, language in texts]
            record = {"group": str(number), "category": "", "source": "drawn", "license": "CC0-1.0"}
            writer.add("train", Record(f"train-{number}", picture, captions, **record, width=40, height=40))
    text = folder / "lines.txt"
    text.write_text("\n".join(lines), encoding="utf-8")
    train(folder / "tokenizer", corpus=(), text=(text,), vocab_size=330, coverage=1.0, max_length=32)
    return data, folder / "tokenizer"


def write_recipe(path: Path, folder: Path, data: Path, tokenizer: Path, steps: int, every: int) -> None:
    recipe = {
        "folder": str(folder),
        "steps": steps,
        "global_batch": 16,
        "seed": 3,
        "tokenizer": str(tokenizer),
        "model": {"preset": "test", "drop_path": 0.2, "patch_drop": 0.3},
        "data": {"sources": [{"path": str(data), "split": "train"}], "augment": {"crop_scale": [0.8, 1.0]}},
        "optim": {"lr": 2e-3, "schedule": {"warmup_steps": 2}},
        "engine": {"threads": 1, "hang_seconds": HANG_S, "silence_seconds": SILENCE_S},
        "checkpoint": {"every": every, "keep": 3},
        "log": {"every": 1},
    }
    path.write_text(yaml.safe_dump(recipe))


def rank_process(rank: int, recipe: Path, environment: dict[str, str], output: Path, fault: Fault | None) -> None:
    """What a forked rank does: become one, with its fault, and end with its exit code. Does not return."""
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from m2_ds import train
    from m2_ds.engine import suspects

    if node := environment.get("M2_FAULTS_NODE"):
        enter_network(node)
        suspects._machine = lambda: node  # a namespace stands for a machine: its processes are not looked up
    if fault is not None and fault.rank == rank:
        plant(fault)
    code = 1
    try:
        train.main(["--config", str(recipe)])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(code)


def enter_network(namespace: str) -> None:
    """Put this process into a named network namespace."""
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000):  # CLONE_NEWNET
            raise OSError(ctypes.get_errno(), "setns")


def struck() -> None:
    """Note when; before the deed, which may be the last."""
    with open(os.environ["M2_FAULTS_STRUCK"], "w") as file:
        file.write(str(time.monotonic()))


def plant(fault: Fault) -> None:
    if fault.kind == "kill in a checkpoint":
        _kill_at_file(fault.number)
    elif fault.kind == "hang":
        _hang(fault)


def _kill_at_file(number: int) -> None:
    """At one of the times that Python opens, renames or removes something of a checkpoint that is being written."""
    seen, of_interest = 0, ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in of_interest and "/.step-" in str(arguments[:2]):
            seen += 1
            if seen == number:
                struck()
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _hang(fault: Fault) -> None:
    """In the work of a step, in waiting for data, with Python's lock held, or before a collective that others enter."""
    from m2_ds.engine import batches, step
    from m2_ds.loss import exchange

    place = HANGS[fault.number % len(HANGS)]
    holder, name = {
        "data": (batches.StepBatches, "__next__"),
        "collective": (exchange.Exchange, "receive"),
    }.get(place, (step.ContrastiveStep, "__call__"))
    call, done = getattr(holder, name), 0

    def hanging(*arguments: Any, **named: Any) -> Any:
        nonlocal done
        done += 1
        if done > (fault.steps or 0):
            struck()
            if place == "lock":
                ctypes.PyDLL(None).sleep(1000)
            threading.Event().wait()
        return call(*arguments, **named)

    setattr(holder, name, hanging)


def damage(checkpoint: Path, kind: str, chance: random.Random) -> str:
    """Cut a file of a checkpoint short, or turn over one bit of it; which file."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size > 1)
    path = chance.choice(files)
    size = path.stat().st_size
    if kind == "truncated file":
        os.truncate(path, chance.randrange(size))
    else:
        with path.open("r+b") as file:
            place = chance.randrange(size)
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << chance.randrange(8)]))
    return str(path.relative_to(checkpoint))
