#!/usr/bin/env python
"""Pictures a second of open_clip's own training pipeline (webdataset, torchvision), in this process, without workers.

Runs in the peer's environment; called by benchmarks/loader.py. Prints one JSON object.
"""

import argparse
import json
import time
from pathlib import Path

import open_clip
import torch
from open_clip_train.data import get_wds_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tars", type=Path, required=True)
    parser.add_argument("--size", type=int, required=True, help="side of the squares, pixels")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--pictures", type=int, required=True, help="pictures that are timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    last = max(int(path.stem) for path in options.tars.glob("*.tar"))
    arguments = argparse.Namespace(
        train_data=f"{options.tars}/{{00000..{last:05d}}}.tar",
        train_num_samples=1_000_000,
        train_data_upsampling_factors=None,
        dataset_resampled=True,  # tars over and over, without an epoch's end
        batch_size=options.batch,
        workers=0,
        world_size=1,
        seed=0,
    )
    preprocess = open_clip.image_transform(options.size, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    batches = iter(get_wds_dataset(arguments, preprocess, is_train=True, tokenizer=tokenizer).dataloader)
    images, _ = next(batches)  # fills the shuffle buffer
    assert images.shape == (options.batch, 3, options.size, options.size)
    start = time.perf_counter()
    done = 0
    while done < options.pictures:
        done += len(next(batches)[0])
    seconds = time.perf_counter() - start
    versions = {"open_clip": open_clip.__version__, "torch": torch.__version__}
    print(json.dumps({"pictures_per_s": done / seconds, "pictures": done, **versions}))


if __name__ == "__main__":
    main()
