"""Captions out of the fields that people's files have, and the language of a text by its script."""

import re
from collections.abc import Mapping
from typing import Any

from m2_ds.data.records import Caption, HardNegative

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_LATIN_WORD = re.compile(r"[A-Za-z\u00c0-\u024f]+")
_OTHER = re.compile(r"[\u0370-\u1fff\u3040-\u30ff\uac00-\ud7af]")


class FieldError(ValueError):
    """Fields that give no caption. `reason` is one of few words, for counting."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def detect_language(text: str) -> str | None:
    """ "zh" or "en" by script, None if it is neither.

    A Chinese character weighs as much as a Latin word, so "我的 iPhone" is Chinese and "tofu (豆腐) with rice" English.
    Kana, Hangul, Cyrillic, Arabic and so on in any number that matters make it neither.
    """
    han, latin, other = len(_HAN.findall(text)), len(_LATIN_WORD.findall(text)), len(_OTHER.findall(text))
    if han + latin == 0 or other > max(han, latin):
        return None
    # One kana among Chinese characters means Japanese more often than not.
    if han and re.search(r"[\u3040-\u309f]", text):
        return None
    return "zh" if han >= latin else "en"


def read_captions(value: Any, language: str | None = None) -> list[Caption]:
    """Captions from a field: a text, a list of them, a mapping from language to either, or objects with `text`.

    Args:
        value: the field; objects may have `language`, `weight` and `kind` besides `text`.
        language: of all texts that do not say their own; None: by script.

    Raises:
        FieldError: reason "no caption", "unknown language" or "bad fields". One usable text is enough.
    """
    found: list[Caption] = []
    troubles: list[str] = []
    _collect(value, language, found, troubles)
    if not found:
        if troubles:
            raise FieldError("unknown language", f"neither Chinese nor English by script: {troubles[0][:80]!r}")
        raise FieldError("no caption", "no text in the caption field")
    return found


def _collect(value: Any, language: str | None, found: list[Caption], troubles: list[str]) -> None:
    if value is None:
        return
    if isinstance(value, str):
        value = {"text": value}
    if isinstance(value, list):
        for entry in value:
            _collect(entry, language, found, troubles)
    elif isinstance(value, Mapping) and "text" in value:
        text = value["text"]
        weight, kind = value.get("weight", 1.0), value.get("kind", "caption")
        if not isinstance(text, str) or not isinstance(kind, str) or not isinstance(weight, int | float) or weight <= 0:
            raise FieldError("bad fields", f"text, kind and a positive weight expected, got {dict(value)!r:.120}")
        text = " ".join(text.split())
        if not text:
            return
        spoken = value.get("language") or language or detect_language(text)
        if spoken is None:
            troubles.append(text)
        else:
            found.append(Caption(text, str(spoken), float(weight), kind))
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            _collect(entry, str(name), found, troubles)
    else:
        raise FieldError("bad fields", f"a caption is a text, a list or a mapping, not {value!r:.80}")


def read_negatives(value: Any) -> list[HardNegative]:
    """Hard negatives from a list of objects with `text`, `kind` and perhaps `language`.

    Raises:
        FieldError: reason "bad fields".
    """
    found = []
    for entry in value or ():
        text = entry.get("text") if isinstance(entry, Mapping) else None
        language = entry.get("language") or detect_language(text) if isinstance(text, str) else None
        if not text or not language or not entry.get("kind"):
            raise FieldError("bad fields", f"a hard negative has text, kind and language, got {entry!r:.120}")
        found.append(HardNegative(text, language, entry["kind"]))
    return found
