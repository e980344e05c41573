"""The M2-Encoder in transformers. Importing this registers its classes with the library's Auto classes:

import m2_ds.convert.hugging_face
model = transformers.AutoModel.from_pretrained("a canonical or an exported folder")

Files that end in _m2_encoder.py are also published with a model, their imports of m2_ds made relative (`code`).
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
)

from m2_ds.convert.hugging_face.configuration_m2_encoder import M2EncoderConfig
from m2_ds.convert.hugging_face.modeling_m2_encoder import M2EncoderModel, M2EncoderOutput
from m2_ds.convert.hugging_face.processing_m2_encoder import (
    M2EncoderImageProcessor,
    M2EncoderProcessor,
    M2EncoderTokenizer,
)

__all__ = [
    "M2EncoderConfig",
    "M2EncoderImageProcessor",
    "M2EncoderModel",
    "M2EncoderOutput",
    "M2EncoderProcessor",
    "M2EncoderTokenizer",
]

AutoConfig.register(M2EncoderConfig.model_type, M2EncoderConfig, exist_ok=True)
AutoModel.register(M2EncoderConfig, M2EncoderModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(M2EncoderConfig, M2EncoderModel, exist_ok=True)
AutoImageProcessor.register(M2EncoderConfig, image_processor_classes={"pil": M2EncoderImageProcessor}, exist_ok=True)
AutoTokenizer.register(M2EncoderConfig, M2EncoderTokenizer, exist_ok=True)
AutoProcessor.register(M2EncoderConfig, M2EncoderProcessor, exist_ok=True)
