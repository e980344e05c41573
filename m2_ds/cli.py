"""The console entry ``m2``: one sub-command a capability, each a typed function that tyro turns into options.

A sub-command's room is imported only when it is called, so that ``m2 --help`` answers at once.
"""

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

# Words of the command, where its function lives, what it does.
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("m2_ds.quickstart:quickstart", "build a data set, train, evaluate and write the page, in minutes"),
    "train": ("m2_ds.commands:train", "train a recipe on this machine through the deepspeed launcher"),
    "replay": ("m2_ds.engine.replay:replay", "a step of a run once more, without its update: which samples were off"),
    "config": ("m2_ds.commands:config", "check a recipe and print it with every field"),
    "doctor": ("m2_ds.doctor.command:doctor", "machine, disk, recipe, data and network looked at before a run"),
    "launch slurm": ("m2_ds.cluster.command:slurm", "a batch script that trains a recipe on a Slurm cluster"),
    "launch kubernetes": ("m2_ds.cluster.command:kubernetes", "a manifest that trains a recipe on Kubernetes"),
    "launch hostfile": ("m2_ds.cluster.command:hostfile", "machines for the deepspeed launcher, from their names"),
    "evaluate": ("m2_ds.commands:evaluate", "retrieval, zero-shot and probes of a model, as JSON and a page"),
    "embed": ("m2_ds.commands:embed", "write embeddings of a data set's pictures and captions to Parquet"),
    "convert": (
        "m2_ds.convert.command:convert",
        "any checkpoint to the canonical folder or the release's file",
    ),
    "export hugging-face": (
        "m2_ds.commands:export_hugging_face",
        "a folder that transformers loads anywhere, with code and a model card",
    ),
    "export onnx": ("m2_ds.export:onnx", "both towers as ONNX graphs for servers, checked against torch; also in int8"),
    "plan": ("m2_ds.plan.command:plan", "layouts of a model on a cluster: memory, traffic, time, and a recipe"),
    "watch": ("m2_ds.watch.command:watch", "runs while they go on: on the terminal, as a page, for Prometheus"),
    "profile": ("m2_ds.watch.command:profile", "ask a running job for a trace of its next steps"),
    "report": ("m2_ds.commands:report", "write a run folder's page again"),
    "data emoji": ("m2_ds.data.sources.emoji:build", "fetch and build the emoji set: seven styles, two languages"),
    "data scenes": ("m2_ds.data.sources.scenes:build", "generate scenes with exact hard negatives"),
    "data tar": ("m2_ds.data.sources.tar:convert", "webdataset tars to shards"),
    "data jsonl": ("m2_ds.data.sources.jsonl:convert", "JSONL and a picture folder to shards"),
    "data inspect": ("m2_ds.data.sources.inspect:inspect", "what a data set holds"),
    "data verify": ("m2_ds.data.sources.inspect:verify", "read every shard and compare checksums"),
    "data upload": ("m2_ds.data.upload:upload", "a data set to an object store, resumable"),
    "prepare": ("m2_ds.prepare.command:prepare", "raw pairs to a clean, balanced data set, with a card"),
    "prepare list-dropped": ("m2_ds.prepare.command:list_dropped", "what a preparation left out, by rule"),
    "tokenizer train": ("m2_ds.data.text_train:train", "train a bilingual SentencePiece tokenizer"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = next((n for n in (" ".join(words[:2]), " ".join(words[:1])) if n in COMMANDS), None)
    if name is None:
        _help(words)
    run(load(name), f"m2 {name}", words[len(name.split()) :])


def load(name: str) -> Callable[..., Any]:
    """The function behind a sub-command."""
    module, _, function = COMMANDS[name][0].partition(":")
    return getattr(importlib.import_module(module), function)


def run(function: Callable[..., Any], prog: str, arguments: Sequence[str] | None = None) -> None:
    """Call a function with options from the command line; a wrong input ends with one line and exit code 2."""
    import tyro

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        result = tyro.cli(function, prog=prog, args=arguments)
    except ValueError as error:
        sys.exit(_complain(prog, error))
    if isinstance(result, int) and result:
        sys.exit(result)


def _complain(prog: str, error: ValueError) -> int:
    print(f"{prog}: {error}", file=sys.stderr)
    return 2


def _help(words: list[str]) -> NoReturn:
    asked = not words or words[0] in ("-h", "--help")
    group = words[0] if words and any(n.startswith(f"{words[0]} ") for n in COMMANDS) else None
    shown = {n: text for n, (_, text) in COMMANDS.items() if group is None or n.startswith(f"{group} ")}
    out = sys.stdout if asked or group else sys.stderr
    if not asked and group is None:
        print(f"m2: there is no command {' '.join(words)!r}", file=out)
    print("usage: m2 COMMAND [options]        m2 COMMAND --help tells all options\n", file=out)
    width = max(len(n) for n in shown)
    for name, text in shown.items():
        print(f"  m2 {name.ljust(width)}   {text}", file=out)
    raise SystemExit(0 if asked else 2)


if __name__ == "__main__":
    main()
