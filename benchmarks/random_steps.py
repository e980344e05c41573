"""Training steps of fresh models on random pairs, for benchmarks that need neither data nor a loader."""

from pathlib import Path
from typing import Any

import torch

from m2_ds.config import RunConfig
from m2_ds.data.stream import PairBatch
from m2_ds.engine.optim import freeze_unreached
from m2_ds.engine.setup import build_engine, deepspeed_config
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.weights import init_weights
from m2_ds.parallel.mesh import Mesh

DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"


def run_config(
    model: dict[str, Any], zero: int, *, batch: int, micro_batch: int, loss: dict[str, Any] | None = None, **engine: Any
) -> RunConfig:
    """Of a run that reads nothing from disk; ``loss``, ``engine``: fields of these blocks."""
    return RunConfig.model_validate(
        {
            "folder": "unused",
            "steps": 10**6,
            "tokenizer": "unused",
            "model": model,
            "global_batch": batch,
            "micro_batch": micro_batch,
            "data": {"sources": [{"path": "unused", "split": "train"}]},
            "loss": loss or {},
            "engine": {"deepspeed": str(DS_CONFIGS / f"zero{zero}.json"), **engine},
        }
    )


def training_engine(config: RunConfig, mesh: Mesh) -> Any:
    """A DeepSpeed engine around a fresh model."""
    model = M2Encoder(config.model)
    init_weights(model, config.model, config.seed)
    freeze_unreached(model, config.loss)
    engine = build_engine(model, config, deepspeed_config(config, mesh), mesh)
    engine.train()
    return engine


def random_pairs(model: M2EncoderConfig, pairs: int, lengths: tuple[int, int], seed: int) -> PairBatch:
    """``pairs`` pictures, each with one caption of lengths[0] to lengths[1] - 1 tokens; no two of one group or slot."""
    g = torch.Generator().manual_seed(seed)
    side, longest = model.image_size, lengths[1] - 1
    tokens = torch.randint(*lengths, (1, pairs, 1), generator=g)
    return PairBatch(
        images=torch.randint(0, 256, (pairs, 3, side, side), generator=g).to(torch.uint8),
        ids=torch.randint(0, model.vocab_size, (1, pairs, longest), generator=g),
        mask=(torch.arange(longest) < tokens).long(),
        language=torch.zeros(1, pairs, dtype=torch.int64),
        group=torch.arange(pairs) + seed * pairs,
        slot=torch.arange(pairs) + seed * pairs,
        keys=[],
        skipped={},
    )
