"""Train a bilingual SentencePiece tokenizer (see docs/tokenizers.md)."""

import sys

import tyro

from m2_ds.data.text_train import train

if __name__ == "__main__":
    try:
        tyro.cli(train)
    except ValueError as error:
        sys.exit(f"train_tokenizer: {error}")
