"""The launcher's target:  deepspeed --module m2_ds.train --config ds_configs/recipes/emoji.yaml [field=value ...]

A batch comes from `data`, goes through `model`, meets its negatives in `loss`, and comes back as an update through
`engine`; `parallel` says who talks to whom.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2_ds.config import RunConfig, load_config


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="m2_ds.train", description="Train a model; started by deepspeed or torchrun.")
    parser.add_argument("--config", type=Path, required=True, help="recipe (YAML), see ds_configs/recipes/")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. optim.lr=1e-3 data.workers=2")
    options = parser.parse_args(arguments)
    try:
        train(load_config(options.config, options.overrides))
    except (ValueError, FloatingPointError) as error:
        # A wrong setting is told in one paragraph; only the first rank's, as all find the same.
        if os.environ.get("RANK", "0") == "0":
            print(f"m2_ds.train: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error


def train(config: RunConfig) -> None:
    """Run the whole job on this rank: resume, train, evaluate, write checkpoints and the report."""
    from m2_ds.api import Processor, load_into
    from m2_ds.data.text import load_tokenizer
    from m2_ds.engine.environment import describe
    from m2_ds.engine.setup import build_engine, quiet, set_threads
    from m2_ds.engine.trainer import Trainer
    from m2_ds.evaluation.run import run_evaluations
    from m2_ds.files import write_atomically, write_json
    from m2_ds.model.encoder import M2Encoder
    from m2_ds.model.weights import freeze_unused, init_weights
    from m2_ds.parallel.mesh import Mesh

    quiet()
    set_threads(config)
    mesh = Mesh.start(config.engine.timeout_minutes, config.engine.build_ops)
    try:
        config.micro_batch(mesh.data_parallel.size)
        tokenizer = load_tokenizer(config.tokenizer, max_length=config.model.max_text_length)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"model.vocab_size {config.model.vocab_size} is less than the {tokenizer.vocab_size} pieces of "
                f"{config.tokenizer}; set model.vocab_size={tokenizer.vocab_size}"
            )
        model = M2Encoder(config.model)
        if config.init_from is None:
            init_weights(model, config.model, config.seed)
        else:
            load_into(model, config.model, config.init_from)
        freeze_unused(model)
        engine = build_engine(model, config, mesh)
        if mesh.is_first:
            config.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(config.folder / "config.yaml", config.to_yaml().encode())
            write_json(config.folder / "environment.json", describe(mesh))
        processor = Processor(config.model.image_size, tokenizer)

        def evaluate(module: Any) -> dict[str, float]:
            return run_evaluations(module, processor, config.evaluation, group=mesh.data_parallel)

        Trainer(engine, config, mesh, tokenizer, evaluate).run()
    finally:
        mesh.stop()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    main()
