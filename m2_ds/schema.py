"""The base of every configuration block, and how one is read: YAML, dotted overrides, errors that name the field."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class Settings(BaseModel):
    """A configuration block. Unknown names and wrong types raise pydantic's ValidationError, which names the field."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


Block = TypeVar("Block", bound=Settings)


def load_settings(block: type[Block], path: Path, overrides: Sequence[str], what: str) -> Block:
    """A whole file of settings. ``overrides``: ``optim.lr=1e-3``, values as in YAML, list items by number.

    ``what``: what messages call the file. Raises ValueError that names the file, the field, its value and what would be
    accepted.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no such {what}: {path}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a mapping of fields, not {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    try:
        return block.model_validate(tree)
    except ValidationError as error:
        raise ValueError(explain(error, str(path), block)) from None


def explain(error: ValidationError, where: str, root: type[Settings]) -> str:
    """One line a wrong field of ``root``: its dotted name, its value, what is wrong and what would be accepted."""
    lines = [f"{where}: {error.error_count()} wrong field{'s' * (error.error_count() > 1)}"]
    for item in error.errors():
        block, parts = _walk(root, item["loc"])
        name = ".".join(parts) or "(whole configuration)"
        message = item["msg"].removeprefix("Value error, ")
        value = repr(item["input"])
        shown = f" (got {value})" if len(value) <= 80 and item["type"] != "missing" else ""
        if item["type"] == "extra_forbidden" and block:
            close = difflib.get_close_matches(parts[-1], block.model_fields, n=1)
            guess = f"did you mean {close[0]}? " if close else ""
            message, shown = f"there is no such field; {guess}here are {', '.join(block.model_fields)}", ""
        elif item["type"] == "missing" and block and parts[-1] in block.model_fields:
            message = f"must be given: {block.model_fields[parts[-1]].description or parts[-1]}"
        lines.append(f"  {name}: {message}{shown}")
    return "\n".join(lines)


def _walk(root: type[Settings], loc: Sequence[int | str]) -> tuple[type[Settings] | None, list[str]]:
    """The block that holds the field at a place of a pydantic error, and the field's name in parts.

    pydantic puts the kind of a task among the parts; it is no field and left out.
    """
    blocks, holder, parts = [root], None, []
    for part in loc:
        if isinstance(part, str) and len(blocks) > 1 and part in [b.model_fields["kind"].default for b in blocks]:
            blocks = [b for b in blocks if b.model_fields["kind"].default == part]
            continue
        parts.append(str(part))
        if isinstance(part, str):
            holder = blocks[0] if blocks else None
            field = holder.model_fields.get(part) if holder else None
            blocks = _blocks(field.annotation) if field else []
    return holder, parts


def _blocks(annotation: Any) -> list[type[Settings]]:
    """The configuration blocks in a type such as list[Annotated[A | B, ...]]."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [block for inner in get_args(annotation) for block in _blocks(inner)]


def _apply(tree: dict[str, Any], override: str) -> None:
    name, found, text = override.partition("=")
    if not found or not name:
        raise ValueError(f"an override is written field.name=value, not {override!r}")
    *parents, last = name.split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, list):
            node = node[_position(node, part, override)]
        else:
            # An empty block ("optim:") is None in YAML.
            node[part] = {} if node.get(part) is None else node[part]
            node = node[part]
        if not isinstance(node, dict | list):
            raise ValueError(f"override {override!r}: {part!r} is a value, it has no fields")
    value = _value(text, override)
    if isinstance(node, list):
        node[_position(node, last, override)] = value
    else:
        node[last] = value


def _value(text: str, override: str) -> Any:
    if _NUMBER.fullmatch(text):  # YAML 1.1 takes 1e-3 for text
        return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not YAML ({error})".replace("\n", " ")) from None


def _position(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ValueError(f"override {override!r}: {part!r} is not an item of a list of {len(items)}; count from 0")
    return int(part)
