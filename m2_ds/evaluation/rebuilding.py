"""What a model makes of hidden words and patches, to look at. Everything is JSON-able; pictures are data URIs.

Legend: n pictures, P patches, L tokens.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from m2_ds.data.text import Tokenizer
from m2_ds.evaluation.embed import Listing, Processor
from m2_ds.evaluation.sources import Decode, Source
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.masked import guess_words, rebuild_patches
from m2_ds.model.masking import hide_patches, hide_words, word_numbers
from m2_ds.model.random import Noise

PICTURES = 8
WORDS, PATCHES = 0.4, 0.5  # shares that are hidden
SIDE = 96  # pixels, at least


def rebuilding(
    model: Any,
    processor: Processor,
    source: Source,
    rows: Sequence[int],
    listing: Listing,
    languages: Sequence[str],
    read_picture: Decode,
    device: torch.device | str,
) -> list[dict[str, Any]]:
    """Some pictures, spread evenly, each with one caption; languages in turn. Empty for a model without such heads.

    ``words``: [text, guess or None] of each word, a guess where it was hidden; ``pictures``: true, hidden, rebuilt.
    """
    if not isinstance(model, M2Encoder) or not (model.config.masked_text_head or model.config.masked_image_head):
        return []
    tokenizer = getattr(processor, "tokenizer", None)
    assert isinstance(tokenizer, Tokenizer)
    chosen: list[tuple[int, str]] = []
    for number in range(0, len(rows), max(1, len(rows) // PICTURES)):
        texts = {caption["language"]: caption["text"] for caption in reversed(listing.captions[number])}
        wanted = languages[len(chosen) % len(languages)]
        if wanted in texts and len(chosen) < PICTURES:
            chosen.append((number, texts[wanted]))
    if not chosen:
        return []
    records = source.read([rows[number] for number, _ in chosen])
    images = processor.images([read_picture(record.image) for record in records]).to(device)
    ids, mask = (x.to(device) for x in tokenizer.encode([text for _, text in chosen]))
    noise = Noise.of(0, torch.arange(len(chosen), device=device))
    found: list[dict[str, Any]] = [{"text": text, "words": [], "pictures": []} for _, text in chosen]
    with torch.no_grad():
        if model.config.masked_text_head:
            _add_words(found, model, tokenizer, images, ids, mask, noise)
        if model.config.masked_image_head == model.config.patch_values:
            _add_pictures(found, model, images, ids, mask, noise)
    return found


def _add_words(
    found: list[dict[str, Any]], model: M2Encoder, tokenizer: Tokenizer, images: Tensor, ids: Tensor, mask: Tensor,
    noise: Noise,
) -> None:  # fmt: skip
    words = tokenizer.words().to(ids.device)
    hidden = hide_words(ids, mask, words, WORDS, noise)
    guesses, number = guess_words(model, images, ids, mask, hidden, words.mask_id), word_numbers(ids, mask, words)
    for each, true, told, of, gone in zip(found, ids, guesses, number, hidden):
        for word in range(1, int(of.max()) + 1):
            place = of == word
            guess = tokenizer.decode(told[place]) if bool(gone[place].any()) else None
            each["words"].append([tokenizer.decode(true[place]), guess])


def _add_pictures(
    found: list[dict[str, Any]], model: M2Encoder, images: Tensor, ids: Tensor, mask: Tensor, noise: Noise
) -> None:
    config = model.config
    patches = hide_patches(noise, config.num_patches, PATCHES)
    rebuilt = rebuild_patches(model, images, ids, mask, patches)
    true = images.float() / 255
    grid = config.image_size // config.patch_size
    square = patches.view(-1, 1, grid, grid).float()
    away = square.repeat_interleave(config.patch_size, 2).repeat_interleave(config.patch_size, 3)
    grey = true * (1 - away) + 0.5 * away
    for each, *pictures in zip(found, true, grey, rebuilt):
        each["pictures"] = [_uri(picture) for picture in pictures]


def _uri(picture: Tensor) -> str:
    """A PNG of fp32 [3, S, S] in [0, 1], small ones enlarged by whole numbers so that pixels stay sharp."""
    array = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(array)
    times = -(-SIDE // image.width)
    out = io.BytesIO()
    image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
