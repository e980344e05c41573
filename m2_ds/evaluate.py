"""Carrying out an evaluation: in this process, or as the launcher's target on every rank.

    deepspeed --no_local_rank --module m2_ds.evaluate REQUEST.json

`m2 evaluate` writes the request. Ranks share out pictures and texts; the first one counts and writes.
"""

import hashlib
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import PIL
import torch
from pydantic import Field

from m2_ds.api import Processor, load, resolve
from m2_ds.evaluation import run as evaluation
from m2_ds.evaluation.cache import Cache, Identity
from m2_ds.evaluation.config import EvaluationConfig
from m2_ds.evaluation.report import write_report
from m2_ds.parallel.collectives import broadcast_object
from m2_ds.parallel.mesh import SOLO, Group, Mesh
from m2_ds.schema import Settings

EMBEDDINGS = "embeddings"  # below the output folder
REPEAT_AFTER_S = 3.0

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Request(Settings):
    """What `m2 evaluate` asks for."""

    model: Path = Field(description="run folder, checkpoint, canonical folder or release .ckpt")
    evaluation: EvaluationConfig
    out: Path = Field(description="output folder")
    precision: Precision = Field("fp32", description="of weights and arithmetic; embeddings are fp32")
    keep: bool = Field(True, description="keep embeddings, and take those that an earlier evaluation kept")
    cache: Path | None = Field(None, description="where they are kept; None: OUT/embeddings")


def carry_out(request: Request, device: torch.device | str, group: Group = SOLO) -> None:
    """Evaluate, write files and page, and print the numbers. Every rank of ``group`` calls it."""
    source = resolve(request.model)
    model, processor = load(source.absolute(), device, DTYPES[request.precision])  # a folder, be it called "tiny"
    processor.texts([""])  # that there is no tokenizer is told now, not after the pictures
    cache = None
    if request.keep:
        identity = broadcast_object(identify(model, processor) if group.is_first else None, group)
        assert identity is not None
        cache = Cache(request.cache or request.out / EMBEDDINGS, identity)
    facts = {"model": str(source), "precision": request.precision}
    content = evaluation.evaluate(
        model, processor, request.evaluation, request.out, facts=facts, device=device, group=group, cache=cache
    )
    if group.is_first:
        if cache is not None and request.cache is None:
            cache.forget_others()  # an output folder speaks of one model; a cache that was named may serve several
        print(evaluation.summary(content))
        print(f"\n{write_report(request.out)}")


def identify(model: torch.nn.Module, processor: Processor) -> Identity:
    """What the embeddings of a model depend on, besides pictures and texts themselves."""
    texts: object = None
    if processor.tokenizer is not None:
        state = processor.tokenizer.__getstate__()
        texts = {**state, "model": hashlib.sha256(state["model"]).hexdigest(), "kind": processor.tokenizer.kind}
    return Identity.of(model, ["square, bicubic", processor.image_size, PIL.__version__], texts)


def main(arguments: Sequence[str] | None = None) -> None:
    """One rank of a job that the launcher started."""
    from m2_ds.engine.setup import quiet

    (path,) = sys.argv[1:] if arguments is None else arguments
    quiet()
    request = Request.model_validate_json(Path(path).read_bytes())
    mesh = Mesh.start()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // mesh.world_size))
    try:
        carry_out(request, mesh.device, mesh.data_parallel)
    except ValueError as error:
        # Every rank finds most errors: the first tells them, and the launcher ends the others before they repeat it.
        if not mesh.is_first:
            time.sleep(REPEAT_AFTER_S)
        print(f"m2 evaluate: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    except RuntimeError as error:
        if not re.search("Connection (closed|reset) by peer", str(error)):
            raise
        raise SystemExit(1) from error  # another rank has ended, and told its reason
    mesh.stop()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
