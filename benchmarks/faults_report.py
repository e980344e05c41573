"""How the runs of benchmarks/faults.py ended, compared and told."""

import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults_rank import HANG_S, JOIN_S, SILENCE_S
from m2_ds.convert.canonical import read_weights

CONTENT = ("step", "samples", "loss", "lr", "grad_norm", "logit_scale", "skipped", "epochs")


def differs(one: Path, other: Path, steps: int) -> str:
    """What differs between the ends of two runs; empty: not one bit."""
    last = f"checkpoints/step-{steps:08}"
    for part in ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq"):
        mine, yours = read_weights(one / last / part), read_weights(other / last / part)
        if mine.keys() != yours.keys():
            return f"{part}: names"
        for name, value in mine.items():
            if not torch.equal(value, yours[name]):
                return f"{part}: {name}"
    states = [json.loads((folder / last / "state.json").read_text()) for folder in (one, other)]
    if states[0] != states[1]:
        return "state.json"
    logs = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (one, other)]
    said = [[{k: v for k, v in line.items() if k.split("/")[0] in CONTENT} for line in log] for log in logs]
    return "" if said[0] == said[1] else "log.jsonl"


def table(content: dict[str, Any]) -> str:
    """The results, for people."""
    about, episodes = content["machine"], content["episodes"]
    faults = [fault for episode in episodes for fault in episode["faults"]]
    different = [episode for episode in episodes if episode["difference"]]
    rows = []
    for kind in content["kinds"]:
        some = [fault for fault in faults if fault["kind"] == kind]
        if not some:
            continue
        seconds = [fault["seconds"] for fault in some if "seconds" in fault]
        lost = [fault["lost"] for fault in some]
        codes = sorted({fault["code"] for fault in some if "code" in fault})
        beyond = max((fault["seconds"] - fault["limit"] for fault in some if "seconds" in fault), default=0.0)
        ended = f"{statistics.median(seconds):.1f} | {max(seconds):.1f} | {max(beyond, 0):.1f}" if seconds else " |  | "
        rows.append(
            f"| {kind} | {len(some)} | {', '.join(map(str, codes))} | {ended} | "
            f"{statistics.mean(lost):.1f} | {max(lost)} |"
        )
    starts, again = sum(e["starts"] for e in episodes), sum(e["restarts"] for e in episodes)
    by_hand, outside = sum(e["by_hand"] for e in episodes), sum(e["killed_by_launcher"] for e in episodes)
    return f"""# Faults

{about["cpu"]}, {about["cores"]} cores that other jobs used, too; {about["date"]}; torch {about["torch"]}, \
deepspeed {about["deepspeed"]}. Seeds {", ".join(map(str, content["seeds"]))}; {content["minutes"]:.0f} minutes.

{len(faults)} faults in {len(episodes)} runs of {content["steps"]} steps on {content["ranks"]} ranks, with a \
checkpoint every {content["every"]} steps and limits of {HANG_S} s (hang), {SILENCE_S} s (silence) and {JOIN_S} s \
(before there are connections): {starts} starts, {again} of them by `--restarts`, {by_hand} by hand. \
{len(episodes) - len(different)} of {len(episodes)} runs ended with the weights, the optimizer's state, the position \
in the data and the log of the run that was left alone, bit for bit. {outside} ranks had to be killed from outside, \
90 s after another had ended.

| fault | times | exit code | seconds to the end, median | longest | most beyond the limit | steps lost, mean | most |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Left out here: {", ".join(content["left_out"]) or "nothing"}. Every ninth picture of the data was broken in all of these
runs: the counts of replaced pairs are among what was compared.
"""
