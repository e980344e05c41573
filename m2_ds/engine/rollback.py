"""Going back to the newest checkpoint within a job: the engine that stands is set to where the checkpoint stands."""

from pathlib import Path
from typing import Any

from m2_ds.config import RunConfig
from m2_ds.convert.run_folder import ADAPTER
from m2_ds.engine import resume
from m2_ds.engine.setup import opened
from m2_ds.engine.start import given_weights
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.loading import fill_whole
from m2_ds.model.weights import fill, has_adapters
from m2_ds.parallel.mesh import Mesh


def go_back(engine: Any, model: M2Encoder, config: RunConfig, mesh: Mesh) -> Path:
    """The checkpoint at which the engine then stands. Raises FloatingPointError where there is none yet."""
    found = resume.find(config, mesh)
    if found is None:
        raise FloatingPointError(
            "anomalies.policy is roll_back, and there is no checkpoint to go back to yet. Lower optim.lr, lengthen "
            "optim.schedule.warmup_steps, lower checkpoint.every, or set anomalies.policy: skip, and start the job "
            "again"
        )
    given = given_weights(config, model, found)
    assert given is not None
    fill_whole(model, given, opened)
    if has_adapters(model):
        from m2_ds.model.lora import read_adapters  # peft is imported where it is asked for

        saved = read_adapters(found / ADAPTER)
        fill(model, lambda piece: saved[piece.name], opened, adapters=True)
    resume.restore(engine, model, found, config, mesh)
    return found
