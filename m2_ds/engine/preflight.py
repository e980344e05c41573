"""What can be known to fail before anything is built: found in seconds, on every rank alike."""

import importlib.util

from m2_ds.config import RunConfig
from m2_ds.data.reader import open_dataset
from m2_ds.data.text import Tokenizer, load_tokenizer
from m2_ds.evaluation.sources import open_source


def check(config: RunConfig) -> Tokenizer:
    """Look at every file that the run will ask for; returns the tokenizer. Raises ValueError with a remedy."""
    check_loggers(config)
    tokenizer = open_tokenizer(config)
    for source in config.data.sources:
        open_dataset(source.path).split(source.split)
    for task in config.evaluation.tasks:
        for part in task.parts:
            open_source(task, part)
    return tokenizer


def check_loggers(config: RunConfig) -> None:
    """Raises ValueError for a logger that is asked for and not installed."""
    if config.log.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ValueError("log.wandb_project is set, but wandb is not installed: pip install wandb, or unset it")


def open_tokenizer(config: RunConfig) -> Tokenizer:
    """The run's tokenizer. Raises ValueError where it cannot be read or the model has too few rows for its pieces."""
    tokenizer = load_tokenizer(config.tokenizer, max_length=config.model.max_text_length)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size {config.model.vocab_size} is less than the {tokenizer.vocab_size} pieces of "
            f"{config.tokenizer}; set model.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer
