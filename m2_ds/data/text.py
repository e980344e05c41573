"""Text as token ids: one interface, two kinds of tokenizer, both on plain sentencepiece.

`GlmTokenizer` follows the rules of the M2-Encoder release around a user's own copy of the GLM sentencepiece model;
`SentencePieceTokenizer` reads the models that `m2_ds.data.text_train` makes. A saved tokenizer is a folder with
`tokenizer.model` (sentencepiece) and `tokenizer_config.json` (kind, length, side of truncation, checksum).

Shapes: B texts, L tokens of the longest text in the batch, the start and end tokens counted.
"""

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from m2_ds.files import write_atomically
from m2_ds.schema import Settings
from m2_ds.words import Words

MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
DEFAULT_MAX_LENGTH = 52  # the release's max_text_len

# Pieces that a model must hold to be of a kind: {role: piece}.
GLM_PIECES = {"cls": "[CLS]", "eos": "<|endoftext|>", "pad": "<|endoftext|>", "mask": "[MASK]", "unk": "[UNK]"}
OWN_PIECES = {"cls": "[CLS]", "eos": "[EOS]", "pad": "[PAD]", "mask": "[MASK]", "unk": "[UNK]"}

Truncation = Literal["left", "right"]


class TokenizerConfig(Settings):
    """What `tokenizer_config.json` holds."""

    format: Literal["m2_ds-tokenizer"] = "m2_ds-tokenizer"
    format_version: Literal[1] = 1
    kind: Literal["glm", "sentencepiece"]
    max_length: int
    truncation: Truncation
    vocab_size: int
    model_sha256: str


class Tokenizer(ABC):
    """Texts to ids and back. Immutable after construction, picklable, and cheap to hand to loader workers.

    Attributes: vocab_size (pieces in the model), pad_id, cls_id, eos_id, mask_id, unk_id, max_length (tokens, start and
    end counted), truncation (the side that a long text loses), special_ids (ids that stand for no text).
    """

    kind: ClassVar[Literal["glm", "sentencepiece"]]
    required: ClassVar[dict[str, str]]
    default_truncation: ClassVar[Truncation]

    def __init__(
        self,
        model: bytes,
        *,
        max_length: int = DEFAULT_MAX_LENGTH,
        truncation: Truncation | None = None,
    ):
        """`model` is a serialised sentencepiece model; `truncation` None takes the kind's own side."""
        if max_length < 3:
            raise ValueError(f"max_length is {max_length}: start token, one piece and end token need at least 3")
        if truncation not in (None, "left", "right"):
            raise ValueError(f"truncation is {truncation!r}: give 'left' or 'right'")
        self._model = model
        self.max_length = max_length
        self.truncation: Truncation = truncation or self.default_truncation
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._sp.get_piece_size()
        if missing := _missing_pieces(self._sp, self.required):
            raise ValueError(f"this sentencepiece model lacks the pieces {missing}, so it is no {self.kind} tokenizer")
        self.cls_id, self.eos_id, self.pad_id, self.mask_id, self.unk_id = (
            self._sp.piece_to_id(self.required[role]) for role in ("cls", "eos", "pad", "mask", "unk")
        )
        self.special_ids = frozenset({self.cls_id, self.eos_id, self.pad_id, self.mask_id, self.unk_id})

    @abstractmethod
    def _split(self, text: str) -> list[str | int]:
        """The text as segments that sentencepiece encodes on their own (str) and ready ids (int)."""

    @abstractmethod
    def _join(self, ids: list[int]) -> str:
        """The text of ids among which no start, end or padding is left."""

    def encode(self, texts: Sequence[str], *, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64 [B, L]: start token, pieces, end token, padding on the right (mask 0 there).

        L is the longest text's length (at most max_length), or `length` when given, for batches of a fixed shape.
        Raises ValueError for a `length` under what the texts need, and for something that is not a list of strings.
        """
        if isinstance(texts, str):
            raise ValueError("encode takes a list of texts, got one string: write encode([text])")
        rows = [self._frame(ids) for ids in self._ids(texts)]
        lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
        longest = int(lengths.max(initial=2))
        width = longest if length is None else length
        if width < longest:
            raise ValueError(f"length is {length}, but a text of this batch has {longest} tokens: give at least that")
        mask = np.arange(width) < lengths[:, None]
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        ids[mask] = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum()))
        return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))

    def pieces(self, text: str, *, truncate: bool = False) -> list[str]:
        """The pieces of one text, with start and end token; cut to max_length only if asked."""
        (ids,) = self._ids([text])
        return [self._sp.id_to_piece(i) for i in (self._frame(ids) if truncate else [self.cls_id, *ids, self.eos_id])]

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of one row of ids; start, end and padding are dropped."""
        row = ids.tolist() if isinstance(ids, Tensor) else [int(i) for i in ids]
        if bad := [i for i in row if not 0 <= i < self.vocab_size]:
            raise ValueError(f"ids {bad[:5]} lie outside this tokenizer's vocabulary of {self.vocab_size} pieces")
        return self._join([i for i in row if i not in (self.cls_id, self.eos_id, self.pad_id)])

    def words(self) -> Words:
        """How pieces make words, for hiding these whole."""
        pieces = [self._sp.id_to_piece(i) for i in range(self.vocab_size)]
        special = [i in self.special_ids or self._sp.is_control(i) for i in range(self.vocab_size)]
        ends = [bool(_ends_unspaced.search(piece)) for piece in pieces]
        begins = [piece.startswith(_SPACE) or bool(_begins_unspaced.match(piece)) for piece in pieces]
        return Words(torch.tensor(begins), torch.tensor(ends), torch.tensor(special), self.mask_id)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.model` and `tokenizer_config.json` into a folder; `load_tokenizer` reads them back."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        config = TokenizerConfig(
            kind=self.kind,
            max_length=self.max_length,
            truncation=self.truncation,
            vocab_size=self.vocab_size,
            model_sha256=hashlib.sha256(self._model).hexdigest(),
        )
        # The config names the model's checksum, so it goes last: a folder cut short by a crash never loads.
        write_atomically(target / MODEL_FILE, self._model)
        write_atomically(target / CONFIG_FILE, (json.dumps(config.model_dump(), indent=2) + "\n").encode())

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model, "max_length": self.max_length, "truncation": self.truncation}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(vocab_size={self.vocab_size}, max_length={self.max_length}, "
            f"truncation={self.truncation!r})"
        )

    def _frame(self, ids: list[int]) -> list[int]:
        room = self.max_length - 2
        if len(ids) > room:
            ids = ids[-room:] if self.truncation == "left" else ids[:room]
        return [self.cls_id, *ids, self.eos_id]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text without start and end, one call into sentencepiece for all of them."""
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"text {place} of the batch is {type(text).__name__}, not a string")
        parts = [self._split(text) for text in texts]
        segments = [part for row in parts for part in row if isinstance(part, str)]
        try:
            encoded = iter(self._sp.encode(segments, num_threads=1))
        except (TypeError, UnicodeEncodeError):  # which of the two depends on sentencepiece's version
            broken = next((text for text in texts if any("\ud800" <= char <= "\udfff" for char in text)), None)
            if broken is None:
                raise
            raise ValueError(f"a text holds half a surrogate pair, which is no character: {broken!r}") from None
        rows = []
        for row in parts:
            if len(row) == 1 and isinstance(row[0], str):
                rows.append(next(encoded))
            else:
                rows.append([i for part in row for i in ([part] if isinstance(part, int) else next(encoded))])
        return rows


class GlmTokenizer(Tokenizer):
    """The release's tokenizer around the GLM-10B-Chinese sentencepiece model, as transformers 4.17 applies it.

    Four strings in a text become their ids and lose the white space around them; runs of 2 to 10 spaces become
    `<|blank_N|>` pieces; a text that is too long keeps its end (truncation "left").
    """

    kind = "glm"
    required = GLM_PIECES
    default_truncation: ClassVar[Truncation] = "left"

    _literal = re.compile(r"(<\|endoftext\|>|\[UNK\]|\[CLS\]|\[MASK\])")
    _blanks = re.compile(" {2,10}")  # greedy, so the longest run first, as the release replaces from 10 down to 2
    _blank_piece = re.compile(r"<\|blank_(\d+)\|>")

    def _split(self, text: str) -> list[str | int]:
        if "[" not in text and "<|" not in text:
            return [self._encode_blanks(text)] if text else []
        tokens = self._literal.split(text)  # text, special, text, special, ..., text
        parts: list[str | int] = []
        for place, token in enumerate(tokens):
            if place % 2:
                parts.append(self._sp.piece_to_id(token))
                continue
            if place > 0:
                token = token.lstrip()
            if place < len(tokens) - 1:
                token = token.rstrip()
            if token:
                parts.append(self._encode_blanks(token))
        return parts

    def _encode_blanks(self, text: str) -> str:
        if "  " not in text:
            return text
        return self._blanks.sub(lambda run: f"<|blank_{len(run[0])}|>", text)

    def _join(self, ids: list[int]) -> str:
        return self._blank_piece.sub(lambda piece: " " * int(piece[1]), self._sp.decode(ids))


class SentencePieceTokenizer(Tokenizer):
    """A bilingual tokenizer of our own: unigram pieces, bytes for what they lack, no special string in user text.

    Normalisation (NFKC, lower-casing) is inside the model file, word marks are ours (`mark_words`). A text that is too
    long keeps its start. Reads models made by `m2_ds.data.text_train`.
    """

    kind = "sentencepiece"
    required = OWN_PIECES
    default_truncation: ClassVar[Truncation] = "right"

    def _split(self, text: str) -> list[str | int]:
        return [mark_words(text)]

    def _join(self, ids: list[int]) -> str:
        return self._sp.decode([i for i in ids if i not in self.special_ids]).strip()


# Scripts written without spaces between words: Han with its radicals and marks, kana.
_UNSPACED = (
    "\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
)
_space_before = re.compile(rf" (?=[{_UNSPACED}])")
_word_after = re.compile(rf"(?<=[{_UNSPACED}]) ?(?=[^\W{_UNSPACED}])")
_starts_unspaced = re.compile(f"[{_UNSPACED}]")
# Of characters that have no piece, the first byte of three or four: nearly all are written without spaces.
_begins_unspaced = re.compile(f"[{_UNSPACED}]|<0x[EF].>")
_ends_unspaced = re.compile(f"[{_UNSPACED}]$")
_SPACE = "\u2581"  # sentencepiece's mark of a space


def mark_words(text: str) -> str:
    """Text with one space before every word of a spaced script and none before Chinese, whatever the writer did.

    A space becomes part of the piece that follows it. Without this, sentencepiece's dummy prefix would make the first
    character of every Chinese caption another piece than the same character inside (12% more tokens were measured), and
    "爱machine" would hold another word than "a machine".
    """
    text = " ".join(text.split())
    if text.isascii():
        return " " + text if text else ""
    text = _word_after.sub(" ", _space_before.sub("", text))
    return text if _starts_unspaced.match(text) else " " + text


KINDS: dict[str, type[Tokenizer]] = {"glm": GlmTokenizer, "sentencepiece": SentencePieceTokenizer}


def load_tokenizer(path: str | os.PathLike[str], *, max_length: int | None = None) -> Tokenizer:
    """A tokenizer from a saved folder, or from a sentencepiece .model file (the kind is told from its pieces).

    A folder without our config but with exactly one .model file, such as the release's tokenizer folder, counts as
    that file. `max_length` (tokens) overrides what was saved. Raises ValueError with a remedy for a missing, damaged or
    foreign file.
    """
    source = Path(path)
    if not source.exists():
        raise ValueError(f"no tokenizer at {source}: give a folder with {CONFIG_FILE}, or a sentencepiece .model file")
    if source.is_dir():
        config = _read_config(source / CONFIG_FILE)
        if config is not None:
            return _from_folder(source, config, max_length)
        models = sorted(source.glob("*.model"))
        if len(models) != 1:
            raise ValueError(
                f"{source} holds no {CONFIG_FILE} of m2_ds and {len(models)} .model files: "
                "name the .model file itself, or save a tokenizer there with Tokenizer.save"
            )
        source = models[0]
    return _from_model(source, max_length)


def _from_folder(folder: Path, config: TokenizerConfig, max_length: int | None) -> Tokenizer:
    file = folder / MODEL_FILE
    if not file.is_file():
        raise ValueError(f"{folder / CONFIG_FILE} is there but {file} is not: copy the tokenizer's folder again")
    model = file.read_bytes()
    if hashlib.sha256(model).hexdigest() != config.model_sha256:
        raise ValueError(f"{file} is not the file that {CONFIG_FILE} was saved with: copy the tokenizer's folder again")
    try:
        return KINDS[config.kind](model, max_length=max_length or config.max_length, truncation=config.truncation)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


def _from_model(file: Path, max_length: int | None) -> Tokenizer:
    model = file.read_bytes()
    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        sp = None
    if sp is None or sp.get_piece_size() == 0:
        raise ValueError(
            f"{file} is not a sentencepiece model ({len(model)} bytes; a download page or a Git LFS pointer, perhaps): "
            "download the model file itself"
        )
    for kind in KINDS.values():
        if not _missing_pieces(sp, kind.required):
            return kind(model, max_length=max_length or DEFAULT_MAX_LENGTH)
    wanted = "; ".join(f"{kind.kind} lacks {_missing_pieces(sp, kind.required)}" for kind in KINDS.values())
    raise ValueError(
        f"{file} is a sentencepiece model of neither kind ({wanted}): take the GLM-10B-Chinese model, "
        "or train one with tools/train_tokenizer.py"
    )


def _read_config(file: Path) -> TokenizerConfig | None:
    """The saved config; None if there is none or it is another library's."""
    if not file.is_file():
        return None
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}): copy the tokenizer's folder again") from None
    if not isinstance(fields, dict) or fields.get("format") != TokenizerConfig.model_fields["format"].default:
        return None
    try:
        return TokenizerConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{file} was not written by this version of m2_ds: {error}") from None


def _missing_pieces(sp: sentencepiece.SentencePieceProcessor, required: dict[str, str]) -> list[str]:
    # piece_to_id answers the unknown id for a piece that is not there.
    return [p for p in dict.fromkeys(required.values()) if sp.id_to_piece(sp.piece_to_id(p)) != p]
