"""The launcher's target:  deepspeed --module m2_ds.train --config ds_configs/recipes/emoji.yaml [field=value ...]

A batch comes from `data`, goes through `model`, meets its negatives in `loss`, and comes back as an update through
`engine`; `parallel` says who talks to whom.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m2_ds.config import RunConfig, load_config

if TYPE_CHECKING:
    from m2_ds.parallel.mesh import Mesh

REPEAT_AFTER_S = 10.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="m2_ds.train", description="Train a model; started by deepspeed or torchrun.")
    parser.add_argument("--config", type=Path, required=True, help="recipe (YAML), see ds_configs/recipes/")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. optim.lr=1e-3 data.workers=2")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost connection is told here, not in stack traces of C++
    try:
        code = train(load_config(options.config, options.overrides))
    except (ValueError, FloatingPointError) as error:
        _tell(str(error))
        raise SystemExit(2) from error
    sys.exit(code)


def train(config: RunConfig) -> int:
    """Join the job that the launcher started, carry out this rank's part of the run, leave. Returns the exit code."""
    from m2_ds.engine.interrupt import EXIT_CODE, Interrupted, told_at_start
    from m2_ds.engine.setup import quiet, set_threads
    from m2_ds.engine.watchdog import Limits, Watchdog
    from m2_ds.parallel.mesh import Mesh

    quiet()
    set_threads(config)
    mesh = Mesh.start(config.parallel, config.engine.timeout_minutes, config.engine.build_ops)
    engine = config.engine
    limits = Limits(engine.hang_seconds, engine.timeout_minutes * 60, engine.silence_seconds)
    watchdog = Watchdog(mesh, config.folder, limits)
    code, reason = 0, "done"
    try:
        with told_at_start():
            run(config, mesh)
    except Interrupted as told:
        code, reason = EXIT_CODE, str(told)
        if mesh.is_first:
            _tell(reason)
    except Exception as error:
        watchdog.end(error)
    watchdog.leave(code, reason)
    mesh.stop()
    return code


def run(config: RunConfig, mesh: "Mesh") -> None:
    """Resume, train, evaluate, write checkpoints."""
    from m2_ds.api import Processor
    from m2_ds.engine import preflight, resume
    from m2_ds.engine.checkpoint import sweep
    from m2_ds.engine.environment import claim, describe
    from m2_ds.engine.optim import freeze_unreached
    from m2_ds.engine.setup import build_engine, build_model, deepspeed_config, encoder_of, fit_stem, opened, zero_stage
    from m2_ds.engine.start import given_weights, hold_exactly
    from m2_ds.engine.trainer import Trainer
    from m2_ds.evaluation.run import run_evaluations
    from m2_ds.files import write_atomically, write_json
    from m2_ds.model.loading import fill_whole
    from m2_ds.model.weights import init_weights

    settings = deepspeed_config(config, mesh)
    tokenizer = preflight.check(config)
    with claim(config.folder, mesh):
        found = resume.find(config, mesh)
        start = samples = 0
        if found is not None:
            start = resume.check(found, config, tokenizer, resume.layout(mesh, zero_stage(settings)))
            samples = resume.samples(found)
        if mesh.is_first:
            sweep(config.folder / "checkpoints")
            write_atomically(config.folder / "config.yaml", config.to_yaml().encode())
            write_json(config.folder / "environment.json", describe(mesh))
        module, model = build_model(config, settings, mesh)
        freeze_unreached(model, config.loss)
        given = given_weights(config, model, found)
        if given is None:
            init_weights(model, config.model, config.seed, opened)
            fit_stem(model, config, tokenizer)
        else:
            fill_whole(model, given, opened)
        if config.lora is not None:
            from m2_ds.engine import adapters

            assert given is not None
            adapters.add(model, config, settings, mesh, given, found)
        engine = build_engine(model, config, settings, mesh, module)
        if given is not None:
            hold_exactly(engine, model, config, mesh, given, fresh=found is None)
            del given  # its files need not stay open while training
        if found is not None:
            resume.restore(engine, model, found, config, mesh)
        processor, encoder = Processor(config.model.image_size, tokenizer), encoder_of(module, mesh)

        def evaluate() -> dict[str, float]:
            return run_evaluations(encoder, processor, config.evaluation, group=mesh.data_parallel)

        Trainer(engine, model, config, mesh, tokenizer, evaluate).run(start, samples, found)


def _tell(message: str) -> None:
    """What a user can do something about is told in one paragraph.

    This is for errors that are found before ranks can talk, by every rank: the first tells them, and the launcher ends
    the others before they repeat it. Later ones are told once by `Watchdog.end`.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(REPEAT_AFTER_S)
    print(f"m2_ds.train{f', rank {rank}' if rank else ''}: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    main()
