"""README.md of an exported folder: how it is used, with m2_ds and with onnxruntime alone."""

from m2_ds import __version__
from m2_ds.convert.onnx.folder import OnnxConfig, graph_name
from m2_ds.convert.onnx.graph import INPUTS, OUTPUT


def readme(name: str, config: OnnxConfig) -> str:
    """Markdown for the folder ``name``."""
    side, size = config.image_size, config.embed_dim
    (pixels,), (ids, mask) = INPUTS["image"], INPUTS["text"]
    image, text = graph_name("image", "fp32"), graph_name("text", "fp32")
    int8 = ""
    if "int8" in config.precisions:
        files = f"`{graph_name('image', 'int8')}` and `{graph_name('text', 'int8')}`"
        int8 = (
            f"\n{files} have the same inputs and outputs, and weights of 8 bits. Embeddings of the two\n"
            "precisions differ a little: compare those of one precision with each other. `metrics.json`, where it is\n"
            "here, says what recall that costs.\n"
        )
    return f'''# {name}

A bilingual image-text encoder with the network of M2-Encoder (arXiv 2401.15896), exported by m2_ds {__version__} as
ONNX graphs of opset {config.opset}.

| file | inputs | output |
| --- | --- | --- |
| `{image}` | `{pixels}` float32 [batch, 3, {side}, {side}] in [0, 1] | `{OUTPUT}` float32 [batch, {size}] |
| `{text}` | `{ids}`, `{mask}` int64 [batch, length] | `{OUTPUT}` float32 [batch, {size}] |

Embeddings have unit length. Batch and length are free, length up to {config.text_positions}. The mask is 1 at a token
and 0 at padding, which comes last; a caption without a token has no embedding. A file `*.onnx.data` holds the weights
of the graph of that name and has to stay beside it under its name.
{int8}
## With m2_ds

```python
import math

import m2_ds
from PIL import Image

model, processor = m2_ds.load_onnx("{name}")
image = model.encode_image(processor.images([Image.open("picture.png")]))
text = model.encode_text(*processor.texts(["a red apple", "一个红苹果"]))
probabilities = (math.exp(model.config.logit_scale) * image @ text.T).softmax(-1)
```

## With onnxruntime alone

```python
import numpy as np
import onnxruntime
from PIL import Image

picture = Image.open("picture.png").convert("RGB").resize(({side}, {side}), Image.Resampling.BICUBIC)
pixels = np.asarray(picture, np.float32).transpose(2, 0, 1)[None] / 255
session = onnxruntime.InferenceSession("{name}/{image}")
(image,) = session.run(None, {{"{pixels}": pixels}})
```

The graph normalises. Pictures are squeezed to the square with Pillow's bicubic filter and nothing is cropped. Ids are
made by the rules of `m2_ds.data.text` around the sentencepiece model `tokenizer.model`; `tokenizer_config.json` says
which. The folder that `m2 export hugging-face` writes has the same tokenizer for transformers.
'''
