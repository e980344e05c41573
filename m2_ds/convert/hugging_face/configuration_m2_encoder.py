"""The configuration of an M2-Encoder for transformers: the network's own fields beside the library's."""

from typing import Any

from transformers import PreTrainedConfig

from m2_ds.model.config import M2EncoderConfig as NetworkConfig


class M2EncoderConfig(PreTrainedConfig):
    """Fields as in `NetworkConfig`, with its defaults and checks: a ValueError names the field and what would fit.

    A canonical folder's config.json is one, and so is what `save_pretrained` writes.
    """

    model_type = "m2_encoder"
    attribute_map = {
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "projection_dim": "embed_dim",
    }

    def __init__(self, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in NetworkConfig.model_fields if name in kwargs}
        super().__init__(**kwargs)
        for name, value in NetworkConfig(**given).model_dump(mode="json").items():
            setattr(self, name, value)

    def network(self) -> NetworkConfig:
        """The network that these fields describe. Raises ValueError where they do not fit each other."""
        return NetworkConfig(**{name: getattr(self, name) for name in NetworkConfig.model_fields})
