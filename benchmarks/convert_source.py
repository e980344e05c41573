#!/usr/bin/env python
"""A checkpoint of a released size with random numbers, in the release's layout, written in a stream.

python benchmarks/convert_source.py --preset 10b --folder DIR
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from m2_ds.convert.fit import Entry
from m2_ds.convert.formats import write_torch_zip
from m2_ds.convert.output import HashedFile
from m2_ds.convert.release import Layout, release_config, wrapped
from m2_ds.convert.stored import CHUNK_BYTES, Stored
from m2_ds.files import write_json
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import canonical_shapes

_NOISE = torch.randint(0, 256, (CHUNK_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Noise(Stored):
    """A tensor of random bits that lies nowhere: other ones in every chunk, made of one stretch of noise."""

    def chunks(self, dtype: torch.dtype | None = None, limit: int = CHUNK_BYTES) -> Iterator[Tensor]:
        left, turn = self.nbytes, self.numel
        while left:
            turn += 1
            size = min(left, limit)
            yield (_NOISE[:size] ^ (turn % 251)).view(self.dtype)
            left -= size


def generate(preset: str, folder: Path, dtype: str = "float16", layout: Layout = "lightning") -> None:
    """FOLDER/m2.ckpt and its JSON, of a preset's shapes.

    Args:
        preset: released size.
        folder: where to write.
        dtype: of the numbers.
        layout: of the file.
    """
    config = M2EncoderConfig.preset(preset)
    kind: torch.dtype = getattr(torch, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    entries = {n: Entry(n, kind, s, Noise(kind, s, ())) for n, s in canonical_shapes(config).items()}
    with HashedFile(folder / "m2.ckpt", lambda _: None) as file:
        write_torch_zip(file, wrapped(layout, entries), "m2")
    write_json(folder / "m2.json", release_config(config))


if __name__ == "__main__":
    tyro.cli(generate)
