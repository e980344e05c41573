"""A whole preparation, step by step: plan, evaluation sets, examine, compare, score, balance, write, publish.

Every step is tasks over units; what a task has finished is not done again when the same command is called after a kill.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from m2_ds.data.progress import track
from m2_ds.files import write_atomically, write_json
from m2_ds.prepare import balance, captions, duplicates, evaluation_sets, exchange, output, score
from m2_ds.prepare.card import write_card
from m2_ds.prepare.config import PrepareConfig
from m2_ds.prepare.engine import Engine, Task, start
from m2_ds.prepare.examine import STEP as EXAMINE
from m2_ds.prepare.examine import examine
from m2_ds.prepare.pairs import Ledger
from m2_ds.prepare.samples import Samples
from m2_ds.prepare.scorers import find_function
from m2_ds.prepare.survivors import Plan
from m2_ds.prepare.units import list_files, plan, stamp
from m2_ds.prepare.work import COUNTS, UNITS, Job, Unit, begin, differences, refuse_changes

FORMAT = 1  # of the work folder and of what the rules mean: raised when either changes
TIMING, DONE = "timing.json", "done.json"


def run(config: PrepareConfig, home: Path | None = None, *, restart: bool = False) -> Ledger:
    """Prepare a data set in `config.out`, going on where an earlier call was cut off; the counts of all rules.

    Args:
        home: folder in which users' functions are looked up; by default the current one.
        restart: take away what lies in `config.out` and begin anew.

    Raises:
        ValueError: input, settings or functions that can't be used; says which.
    """
    home = (home or Path.cwd()).resolve()
    functions = [block.function for block in config.scores] + ([config.rewrite.function] if config.rewrite else [])
    for function in functions:
        find_function(function, home)
    for path in config.evaluation_sets.paths:
        evaluation_sets.check(path)
    settings = {"format": FORMAT, **config.decides()}
    folder = begin(config, settings, restart=restart)
    if (folder / DONE).exists():
        _units(config, folder)  # refuses input that changed
        print(f"{config.out} is finished; nothing to do", file=sys.stderr)
        return Ledger.from_json(json.loads((config.out / COUNTS).read_text())["ledger"])
    units = _units(config, folder)
    digest = hashlib.sha256(json.dumps([settings, [asdict(unit) for unit in units]]).encode()).hexdigest()
    job = Job(folder, digest, len(units), config, home)
    engine = start(config.work)
    try:
        return _Run(job, engine, units).all()
    finally:
        engine.close()


def _units(config: PrepareConfig, folder: Path) -> list[Unit]:
    """The units of work: planned at the first start, compared with the input at every other.

    A file that is gone is told when its unit's turn comes; one whose units are finished is not needed any more.
    """
    path = folder / UNITS
    if not path.exists():
        units, stamps = plan(config)
        lines = [json.dumps(stamps, ensure_ascii=False)] + [json.dumps(asdict(unit)) for unit in units]
        write_atomically(path, "\n".join(lines).encode())
        return units
    first, *rest = path.read_text().splitlines()
    before: dict[str, Any] = json.loads(first)
    there = {file for entry in config.inputs for file in list_files(entry, skip_missing=True)[0]}
    now = {file: stamp(file) for file in before} | {file: stamp(file) for file in sorted(there - before.keys())}
    now = {file: before[file] if found is None and file in before else found for file, found in now.items()}
    refuse_changes(config, differences(before, now))
    return [Unit(**json.loads(line)) for line in rest]


class _Run:
    def __init__(self, job: Job, engine: Engine, units: list[Unit]) -> None:
        self.job, self.engine, self.units, self.config = job, engine, units, job.config
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    def all(self) -> Ledger:
        config = self.config
        sets = [(number, str(path)) for number, path in enumerate(config.evaluation_sets.paths)]
        self._each("evaluation sets", evaluation_sets.sign, sets, [number for number, _ in sets], evaluation_sets.STEP)
        self._each("examine", examine, self.units, [unit.number for unit in self.units], EXAMINE)
        examined = [self._finished(EXAMINE, unit.number, ("rows", "bytes")) for unit in self.units]
        layout = exchange.layout([rows for rows, _ in examined], config.exchange_rows)
        rules = duplicates.picture_rules(config, layout)
        rules += captions.caption_rules(config, layout, tuple(rule.name for rule in rules))
        for rule in rules:
            self._compare(rule, layout)
        known = Plan(layout, [rule.name for rule in rules if rule.name != captions.LIKE])
        both = [(unit, known) for unit in self.units]
        numbers = [unit.number for unit in self.units]
        if score.needed(config):
            gpus = int(config.similarity is not None and config.similarity.device.startswith("cuda"))
            self._each("score", score.score, both, numbers, score.STEP, gpus)
        limits, share = self._limits(both)
        sizes = [int(size * share) for size in self._left(known, examined)]
        parts = output.parts_of(config, self.units, sizes)
        items = [(part, known, limits) for part in parts]
        self._each("write", output.write_part, items, [part.number for part in parts], output.STEP)
        return self._publish(parts)

    def _publish(self, parts: Sequence[output.Part]) -> Ledger:
        job, config = self.job, self.config
        ledger, samples = Ledger(), Samples(config.output.samples)
        steps = [(EXAMINE, len(self.units)), (output.STEP, len(parts))]
        steps += [(score.STEP, len(self.units))] * score.needed(config)
        for step, count in steps:
            for number in range(count):
                content = job.finished(step, number)
                assert content is not None
                ledger.add(Ledger.from_json(content["ledger"]))
                samples.add(content.get("samples", {}))
        assert ledger.balanced(), "records or captions were lost between the steps"
        seconds, ledger.seconds = dict(ledger.seconds), type(ledger.seconds)()
        write_card(config, ledger, samples)
        write_json(config.out / COUNTS, {"format": FORMAT, "ledger": ledger.to_json()})
        write_json(config.out / TIMING, {"wall": self.wall, "cpu": self.cpu, "stages": seconds})
        if not ledger.read.total():
            told = "; ".join(f"{file}: {what}" for file, what in ledger.broken[:5])
            raise ValueError(f"not one record could be read: {told or 'the files are empty'}")
        output.publish_dataset(job, parts)
        write_json(job.folder / DONE, {"format": FORMAT})
        for path in job.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
        return ledger

    def _each(
        self, what: str, task: Task, items: Sequence[Any], numbers: Sequence[int], step: str, gpus: int = 0
    ) -> None:
        """One step over the items that are not finished."""
        left = [item for item, number in zip(items, numbers) if not self.job.path(step, number, "json").exists()]
        self._tasks(what, task, left, gpus)

    def _tasks(self, what: str, task: Task, items: Sequence[Any], gpus: int = 0, part: str = "") -> None:
        if not items:
            return
        begun = time.monotonic()
        results: Iterator[dict[str, Any]] = self.engine.map(task, self.job, items, gpus=gpus)
        if self.config.work.progress:
            results = track(results, what + part, total=len(items))
        for result in results:
            self.cpu[what] = self.cpu.get(what, 0.0) + result["cpu"]
        self.wall[what] = self.wall.get(what, 0.0) + time.monotonic() - begun

    def _finished(self, step: str, number: int, names: tuple[str, str]) -> tuple[int, int]:
        content = self.job.finished(step, number)
        assert content is not None
        return content[names[0]], content[names[1]]

    def _compare(self, rule: exchange.Rule, layout: exchange.Layout) -> None:
        done = self.job.folder / rule.name / "done"
        if done.exists():
            return
        groups, buckets = range(len(layout.groups)), range(layout.buckets(rule.copies))
        name = f"compare: {rule.name}"
        self._tasks(name, exchange.spread, [(rule, layout, group) for group in groups], part=", 1 of 3")
        self._tasks(name, exchange.meet, [(rule, layout, bucket) for bucket in buckets], part=", 2 of 3")
        self._tasks(name, exchange.settle, [(rule, layout, group) for group in groups], part=", 3 of 3")
        done.parent.mkdir(exist_ok=True)
        write_atomically(done, b"")
        for step in ("spread", "meet"):
            shutil.rmtree(self.job.folder / f"{rule.name}.{step}", ignore_errors=True)

    def _limits(self, items: Sequence[Any]) -> tuple[dict[balance.Class, int] | None, float]:
        """(limits of down-sampling, share of records that stays)."""
        if not balance.wanted(self.config.balance):
            return None, 1.0
        path = self.job.folder / "limits.json"
        if not path.exists():
            self._each("balance", balance.classify, items, [unit.number for unit in self.units], balance.STEP)
            there: dict[balance.Class, int] = {}
            for unit in self.units:
                content = self.job.finished(balance.STEP, unit.number)
                assert content is not None
                for source, languages, count in content["classes"]:
                    there[source, languages] = there.get((source, languages), 0) + count
            quota = balance.quotas(there, self.config.balance)
            limits = balance.limits(self.job, self.units, quota)
            share = sum(quota.values()) / max(1, sum(there.values()))
            rows = [[*name, limit] for name, limit in limits.items()]
            write_json(path, {"limits": rows, "share": share})
        content = json.loads(path.read_text())
        return {(source, languages): limit for source, languages, limit in content["limits"]}, content["share"]

    def _left(self, known: Plan, examined: Sequence[tuple[int, int]]) -> list[float]:
        """About how many bytes of each unit's pictures are left."""
        gone = np.zeros(len(self.units))
        for group in range(len(known.layout.groups)):
            for name in known.rules:
                table = exchange.read_part(self.job.folder / name / f"{group:06d}.arrow", 0)
                places = table["place"].to_numpy()[table["caption"].to_numpy() == exchange.RECORD]
                gone += np.bincount(places >> exchange.SHIFT, minlength=len(gone))
        if score.needed(self.config):
            gone += [self._finished(score.STEP, unit.number, ("dropped", "dropped"))[0] for unit in self.units]
        return [size * max(0.0, 1 - lost / max(1, rows)) for lost, (rows, size) in zip(gone, examined)]
