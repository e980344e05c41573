"""The exported towers in onnxruntime, as a model that evaluation takes.

Legend: B pictures or captions, S image side, L tokens, E embedding.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from m2_ds.convert.onnx.folder import OnnxConfig, Precision, graph_name, read_config, verify
from m2_ds.convert.onnx.graph import INPUTS, TOWERS, Tower

CPU = "CPUExecutionProvider"


class OnnxModel:
    """``encode_image`` and ``encode_text`` as `m2_ds.model.encoder.M2Encoder` has them, computed by onnxruntime.

    Tensors come in and go out on the CPU. Several threads may call it at once.
    """

    def __init__(
        self,
        folder: Path,
        config: OnnxConfig,
        precision: Precision = "fp32",
        *,
        threads: int = 0,
        providers: Sequence[str] = (CPU,),
    ) -> None:
        """``threads``: of one call, 0: a thread a core; ``providers``: onnxruntime's, in order of preference."""
        if precision not in config.precisions:
            raise ValueError(
                f"{folder} holds {', '.join(config.precisions)}, not {precision}: export it again with --int8"
            )
        self.config, self.precision = config, precision
        self._sessions: dict[Tower, onnxruntime.InferenceSession] = {
            tower: open_session(folder / graph_name(tower, precision), threads, providers) for tower in TOWERS
        }

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeddings [B, E], unit length, of pictures uint8 (or float in [0, 1]) [B, 3, S, S]."""
        side = self.config.image_size
        if images.dim() != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(f"images have shape {list(images.shape)}; this model takes [B, 3, {side}, {side}]")
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return self._run("image", pixels)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings [B, E], unit length, of captions ``ids`` int64 [B, L], ``mask`` [B, L] (1 token, 0 padding)."""
        if ids.dim() != 2 or ids.shape != mask.shape:
            raise ValueError(f"ids {list(ids.shape)} and mask {list(mask.shape)} have to be [B, L] both")
        if not bool(mask[:, 0].bool().all()):
            raise ValueError("a caption of the batch has padding in place of its class token; check the mask")
        longest = int(mask.sum(dim=1).max())
        if longest > self.config.text_positions:
            raise ValueError(f"a caption has {longest} tokens; this model takes at most {self.config.text_positions}")
        return self._run("text", ids[:, :longest].long(), mask[:, :longest].long())

    def _run(self, tower: Tower, *inputs: Tensor) -> Tensor:
        arrays = [np.ascontiguousarray(tensor.cpu().numpy()) for tensor in inputs]
        (found,) = self._sessions[tower].run(None, dict(zip(INPUTS[tower], arrays)))
        return torch.from_numpy(found)


def open_model(
    folder: Path, precision: Precision = "fp32", *, threads: int = 0, providers: Sequence[str] = (CPU,)
) -> OnnxModel:
    """The model of a folder whose files are compared with their checksums first. Raises ValueError for what is wrong.

    Arguments as of `OnnxModel`.
    """
    config = read_config(folder)
    verify(folder)
    return OnnxModel(folder, config, precision, threads=threads, providers=providers)


def open_session(path: Path, threads: int = 0, providers: Sequence[str] = (CPU,)) -> onnxruntime.InferenceSession:
    """A session with the providers that are asked for. Raises ValueError where one cannot be had."""
    here = onnxruntime.get_available_providers()
    if missing := [name for name in providers if name not in here]:
        raise ValueError(
            f"onnxruntime has no {', '.join(missing)} here; it has {', '.join(here)}. A GPU needs the package "
            "onnxruntime-gpu in place of onnxruntime"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime raises a class of its own for each status
        raise ValueError(f"{path} cannot be opened by onnxruntime {onnxruntime.__version__}: {error}") from None
    # Where a provider's own libraries are missing, onnxruntime takes another one and goes on.
    if lost := [name for name in providers if name not in session.get_providers()]:
        raise ValueError(f"onnxruntime could not start {', '.join(lost)}; its log, above, says what is missing")
    return session
