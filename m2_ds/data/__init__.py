"""Data: shards on disk, a resumable stream over them, pictures and text as tensors."""
