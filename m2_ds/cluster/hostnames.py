"""Names of machines as Slurm and people write them: gpu[01-04,7],login."""

import re
from collections.abc import Iterator

_PIECE = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")
_BRACKET = re.compile(r"\[([^\[\]]*)\]")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.:_-]*[A-Za-z0-9])?")


def expand(texts: tuple[str, ...]) -> list[str]:
    """All names, in the order in which they are written. Raises ValueError for what is no list of names."""
    found = [name for text in texts for name in _names(text)]
    if not found:
        raise ValueError("no hosts: name at least one, as in gpu[01-04]")
    if twice := sorted({name for name in found if found.count(name) > 1}):
        raise ValueError(f"hosts named twice: {', '.join(twice)}; name each once")
    return found


def _names(text: str) -> Iterator[str]:
    pieces = _PIECE.findall(text)
    if ",".join(pieces) != text.strip(","):
        raise ValueError(f"hosts {text!r}: brackets do not match; write gpu[01-04,7],login")
    for piece in pieces:
        yield from _expanded(piece, text)


def _expanded(piece: str, text: str) -> Iterator[str]:
    bracket = _BRACKET.search(piece)
    if bracket is None:
        if not _HOST.fullmatch(piece):
            raise ValueError(f"hosts {text!r}: {piece!r} is no name of a machine")
        yield piece
        return
    for part in bracket[1].split(","):
        span = _RANGE.fullmatch(part)
        if span is None or int(span[2] or span[1]) < int(span[1]):
            raise ValueError(f"hosts {text!r}: {part!r} is no range; write [01-04,7]")
        width = len(span[1])  # zeros in front are kept
        for number in range(int(span[1]), int(span[2] or span[1]) + 1):
            yield from _expanded(f"{piece[: bracket.start()]}{number:0{width}}{piece[bracket.end() :]}", text)
