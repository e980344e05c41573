"""m2_ds trains, evaluates and converts M2-Encoder-class bilingual image-text models.

What it hands out is imported on first use, so that `import m2_ds` stays fast.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["M2EncoderConfig", "load", "load_onnx"]

if TYPE_CHECKING:
    from m2_ds.api import load, load_onnx
    from m2_ds.model.config import M2EncoderConfig


def __getattr__(name: str) -> Any:
    if name in ("load", "load_onnx"):
        from m2_ds import api

        return getattr(api, name)
    if name == "M2EncoderConfig":
        from m2_ds.model.config import M2EncoderConfig

        return M2EncoderConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
