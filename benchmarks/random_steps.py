"""Training steps of fresh models on random pairs, for benchmarks that need neither data nor a loader."""

from typing import Any

from m2_ds.config import RunConfig
from m2_ds.engine.optim import freeze_unreached
from m2_ds.engine.setup import build_engine, deepspeed_config
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.weights import init_weights
from m2_ds.parallel.mesh import Mesh
from m2_ds.plan.trial import random_pairs, trial_tree

__all__ = ["random_pairs", "run_config", "training_engine"]


def run_config(
    model: dict[str, Any], zero: int, *, batch: int, micro_batch: int, loss: dict[str, Any] | None = None, **engine: Any
) -> RunConfig:
    """Of a run that reads nothing from disk; ``loss``, ``engine``: fields of these blocks."""
    tree = trial_tree(model, f"zero{zero}", batch, micro_batch, "fp32")
    tree["engine"] |= engine
    return RunConfig.model_validate(tree | {"loss": loss or {}})


def training_engine(config: RunConfig, mesh: Mesh) -> Any:
    """A DeepSpeed engine around a fresh model."""
    model = M2Encoder(config.model)
    init_weights(model, config.model, config.seed)
    freeze_unreached(model, config.loss)
    engine = build_engine(model, config, deepspeed_config(config, mesh), mesh)
    engine.train()
    return engine
