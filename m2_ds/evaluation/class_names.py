"""Names of classes and prompt templates from files.

A file holds the classes in their order, in several languages or in one:

    {id: {language: name or [names]}}           JSON or YAML, several languages
    id,en,zh                                    CSV with a header, several languages, synonyms between |
    {id: name or [names]}                       JSON or YAML, one language
    [name or [names], ...]                      JSON or YAML, one language, in the order of the ids sorted
    {"0": ["n01440764", "tench"], ...}          JSON, one language: number, id, name
    n01440764 tench, Tinca tinca                text, one language, a line a class, synonyms between commas
"""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

SHIPPED = resources.files("m2_ds.evaluation") / "classes"

_Names = dict[str, list[str]]  # names by class id


@dataclass(frozen=True)
class Classes:
    """Classes in a fixed order. `names[language][class]` lists synonyms."""

    ids: list[str]
    names: dict[str, list[list[str]]]


def load_classes(
    source: str | Path | Mapping[str, str | Path],
    languages: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
) -> Classes:
    """Class names from a file, from one a language, or from a list that ships ('emoji_groups').

    `languages`: those that are asked for (None: all that the file has); a file of one language needs to be told which.
    `ids`: of the classes where the file lists names alone; None: "0", "1", ... Raises ValueError that names the file
    and class.
    """
    if isinstance(source, Mapping):
        asked = [language for language in source if languages is None or language in languages]
        parts = {language: load_classes(source[language], [language], ids) for language in asked}
        return _joined(source, parts)
    content, path = _read(source)
    if isinstance(content, list):
        content = _with_ids(content, ids, path)
    if not isinstance(content, dict) or len(content) < 2:
        raise ValueError(f"{path}: expected at least two classes, in one of the forms that docs/evaluation.md lists")
    if _is_class_index(content):
        content = {entry[0]: entry[1] for _, entry in sorted(content.items(), key=lambda item: int(item[0]))}
    if not any(isinstance(names, dict) for names in content.values()):
        if languages is None or len(languages) != 1:
            asked_for = "languages are not given" if languages is None else f"{list(languages)} are asked for"
            raise ValueError(
                f"{path} has names of one language, and {asked_for}: give one language, or a file for each "
                "(classes: {en: FILE, zh: FILE}), or a file of the form {id: {language: [names]}}"
            )
        content = {key: {languages[0]: names} for key, names in content.items()}
    return _several(content, path, languages)


def load_templates(language: str, path: Path | None = None) -> list[str]:
    """Prompt templates (a YAML list, each with one `{}`): ours for en and zh unless a file is given."""
    source: Any = path if path is not None else SHIPPED / f"templates_{language}.yaml"
    if not source.is_file():
        raise ValueError(
            f"no prompt templates at {source}"
            if path is not None
            else f"no templates ship for language {language!r}: name a file in `templates`"
        )
    found = yaml.safe_load(source.read_text(encoding="utf-8"))
    if not isinstance(found, list) or not found or not all(isinstance(t, str) and t.count("{}") == 1 for t in found):
        raise ValueError(f"{source}: expected a list of sentences that each hold {{}} once")
    return found


def _several(content: Mapping[Any, Any], path: str, languages: Sequence[str] | None) -> Classes:
    for entry in content.values():
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: expected {{language: [names]}} for each class, found {entry!r}")
    there = list(dict.fromkeys(language for entry in content.values() for language in entry))
    if languages is not None and (missing := [language for language in languages if language not in there]):
        raise ValueError(f"{path} has no class names in {missing[0]!r}; it has {there}")
    names: dict[str, list[list[str]]] = {language: [] for language in there}
    for key, by_language in content.items():
        for language in there:
            found = by_language.get(language)
            synonyms = [found] if isinstance(found, str) else found
            if not isinstance(synonyms, list) or not synonyms or not all(map(_is_name, synonyms)):
                raise ValueError(f"{path}: class {key!r} has no name in {language!r}, which other classes have")
            names[language].append([name.strip() for name in synonyms])
    return Classes([str(key) for key in content], names)


def _joined(source: Mapping[str, str | Path], parts: Mapping[str, Classes]) -> Classes:
    """Languages from files of their own; the first one's order counts."""
    ids = next(iter(parts.values())).ids
    names = {}
    for language, classes in parts.items():
        if different := sorted({*ids} ^ {*classes.ids}):
            raise ValueError(f"{source[language]}: classes {different[:5]} are in one of the files of names only")
        row = {key: number for number, key in enumerate(classes.ids)}
        names[language] = [classes.names[language][row[key]] for key in ids]
    return Classes(list(ids), names)


def _with_ids(content: list[Any], ids: Sequence[str] | None, path: str) -> dict[str, Any]:
    ids = [str(number) for number in range(len(content))] if ids is None else ids
    if len(ids) != len(content):
        raise ValueError(
            f"{path} lists {len(content)} names without ids, but there are {len(ids)} classes: "
            "give a file of the form {id: [names]}"
        )
    return dict(zip(ids, content))


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name.strip())


def _is_class_index(content: Mapping[Any, Any]) -> bool:
    return all(
        str(key).isdigit() and isinstance(entry, list) and len(entry) == 2 and re.fullmatch(r"n\d{8}", str(entry[0]))
        for key, entry in content.items()
    )


def _read(source: str | Path) -> tuple[Any, str]:
    """What a file holds, and how messages call it."""
    path, shipped = Path(source), SHIPPED / f"{source}.yaml"
    if not path.suffix and shipped.is_file() and not path.exists():
        return yaml.safe_load(shipped.read_text(encoding="utf-8")), str(source)
    if not path.is_file():
        raise ValueError(f"no class names at {path}: give a JSON, YAML, CSV or text file, or 'emoji_groups'")
    text = path.read_text(encoding="utf-8-sig")
    try:
        if path.suffix == ".csv":
            return _csv(text, path), str(path)
        if path.suffix == ".txt":
            return _text(text, path), str(path)
        return (json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)), str(path)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} can't be read: {error}") from None


def _csv(text: str, path: Path) -> dict[str, _Names]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if "id" not in (reader.fieldnames or ()):
        raise ValueError(f"{path}: expected a column 'id' and one a language, found {reader.fieldnames}")
    return {
        row["id"]: {
            language: [name for name in (cell or "").split("|") if name.strip()]
            for language, cell in row.items()
            if language and language != "id"
        }
        for row in reader
    }


def _text(text: str, path: Path) -> _Names:
    found: _Names = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            key, _, names = line.strip().partition(" ")
            if not names or key in found:
                raise ValueError(f"{path}, line {number}: expected an id of its own and names, found {line!r}")
            found[key] = [name.strip() for name in names.split(",")]
    return found
