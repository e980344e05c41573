"""Captions: cleaning, identification of the language, and the rules that they have to pass."""

import functools
import html
import re
import unicodedata
from typing import Any

from m2_ds.data.records import Caption
from m2_ds.prepare.config import TextConfig
from m2_ds.prepare.pairs import CaptionDrops, Drop
from m2_ds.prepare.readers import UNKNOWN

_TAGS = re.compile(
    r"</?(?:a|abbr|article|b|blockquote|body|br|button|center|cite|code|dd|del|div|dl|dt|em|figcaption|figure|font|footer"
    r"|form|h[1-6]|head|header|hr|html|i|iframe|img|input|ins|label|li|link|main|mark|meta|nav|ol|option|p|picture|pre|q|s"
    r"|section|select|small|source|span|strike|strong|style|sub|sup|svg|table|tbody|td|textarea|tfoot|th|thead|time|title"
    r"|tr|tt|u|ul|video|wbr)(?:\s[^<>]{0,500})?/?>|<!--.{0,2000}?-->",
    re.IGNORECASE | re.DOTALL,
)
_DROPPED_ELEMENTS = re.compile(r"<(script|style)\b[^<>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_KANA = re.compile(r"[\u3040-\u30ff\u31f0-\u31ff]")
_WORD = re.compile(r"[^\W\d_]+")
_LATIN = re.compile(r"[A-Za-z\u00aa\u00ba\u00c0-\u024f\u1e00-\u1eff]+")
_BEYOND_ENGLISH = re.compile(r"[\u00c0-\u024f\u1e00-\u1eff]")
# In next to no other language: they spare the library's opinion on most longer English captions.
_ENGLISH = re.compile(r"\b(?:the|and|with|from|this|that|above|below)\b", re.IGNORECASE)
# Languages that are told from English. Of all that the library knows, rare ones would win too many short captions.
_LATIN_LANGUAGES = [
    "en",
    "fr",
    "de",
    "es",
    "it",
    "pt",
    "nl",
    "pl",
    "tr",
    "id",
    "vi",
    "sv",
    "da",
    "no",
    "fi",
    "cs",
    "hu",
    "ro",
    "ca",
    "hr",
]
DISTINCT_FROM = 8  # words, or Chinese characters, from which on `min_distinct` is asked for


class _Usual(dict[int, str]):
    """For str.translate, filled as characters come: letters and digits in their usual form, nothing that is unseen.

    NFKC on everything would turn the Chinese "，" and "！" into Latin marks, "…" into three dots and "²" into "2".
    """

    def __missing__(self, code: int) -> str:
        self[code] = found = self._usual(chr(code))
        return found

    def _usual(self, character: str) -> str:
        category = unicodedata.category(character)
        if category in ("Cc", "Zs", "Zl", "Zp"):
            return " "
        if category in ("Cf", "Cs", "Co", "Cn") and not _is_kept_format(ord(character)):
            return ""
        if category[0] == "L" or category == "Nd":
            usual = unicodedata.normalize("NFKC", character)
            return character if usual[0].isspace() else usual
        return character


def _is_kept_format(code: int) -> bool:
    """Joiners are parts of emoji, and of Persian and Indic words; tags spell the flags of regions."""
    return code in (0x200C, 0x200D) or 0xE0020 <= code <= 0xE007F


_USUAL = _Usual()


def clean(text: str, strip_html: bool = True) -> str:
    """A caption without entities, tags, control characters and doubled white space; letters in their usual form (NFC).

    Emoji stay whole: joiners, variation selectors and tags are kept.
    """
    if strip_html and ("&" in text or "<" in text):
        # Twice: what was escaped twice ("&amp;amp;") is common.
        text = html.unescape(html.unescape(text)) if "&" in text else text
        if "<" in text:
            text = _TAGS.sub(" ", _DROPPED_ELEMENTS.sub(" ", text))
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    return " ".join(unicodedata.normalize("NFC", text.translate(_USUAL)).split())


@functools.cache
def _identifier(latin: bool) -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    found = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if latin:
        found.set_languages(_LATIN_LANGUAGES)
    return found


def identify(text: str, foreign_confidence: float = 0.7) -> str:
    """The language of a cleaned caption, ISO 639-1; "und" if it has no letters.

    Han characters without kana are Chinese where they are no fewer than the words in other letters: "我的 iPhone 手机"
    is Chinese, "tofu (豆腐) with rice" English. Latin script is English unless py3langid is sure of another language,
    because captions are mostly too short for it to be sure of English.
    """
    if text.isascii():
        han, words, latin = 0, len(_WORD.findall(text)), len(_LATIN.findall(text))
    else:
        han, latin = len(_HAN.findall(text)), len(_LATIN.findall(text))
        if (kana := len(_KANA.findall(text))) and kana + han >= latin:
            return "ja"
        words = len(_WORD.findall(_HAN.sub(" ", text)))
    if han and han >= latin and han >= words:
        return "zh"
    if not words:
        return UNKNOWN
    if latin < words / 2:
        return str(_identifier(False).classify(text)[0])
    if _ENGLISH.search(text):
        return "en"
    language, confidence = _identifier(True).classify(text)
    # What speaks for another language besides the library's opinion: letters that English does not have.
    needed = foreign_confidence / 2 if _BEYOND_ENGLISH.search(text) else foreign_confidence
    return str(language) if language != "en" and confidence >= needed else "en"


class TextRules:
    """The rules of a configuration, ready to be applied."""

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        self.boilerplate = [re.compile(pattern, re.IGNORECASE) for pattern in config.boilerplate]
        self.run = re.compile(rf"([^\d\s])\1{{{config.max_run},}}") if config.max_run else None

    def apply(self, captions: list[Caption]) -> tuple[list[Caption], CaptionDrops]:
        """(captions that pass, cleaned; the others with why). A text that repeats another of the record is no drop."""
        kept: list[Caption] = []
        dropped: CaptionDrops = []
        for caption in captions:
            text = clean(caption.text, self.config.strip_html)
            language = caption.language
            if language == UNKNOWN:
                language = identify(text, self.config.foreign_confidence)
            cleaned = Caption(text, language, caption.weight, caption.kind)
            why = self._check(text, language)
            if why is None:
                kept.append(cleaned)
            else:
                # The text as it came, where cleaning left nothing to show.
                dropped.append((cleaned if text else caption, why))
        return kept, dropped

    def _check(self, text: str, language: str) -> Drop | None:
        if not text:
            return Drop("no_caption", "nothing is left of it after cleaning")
        if not any(map(str.isalpha, text)):
            return Drop("no_letters", "neither letters nor Chinese characters")
        for pattern in self.boilerplate:
            if pattern.fullmatch(text):
                return Drop("boilerplate", pattern.pattern)
        if self.run is not None and (found := self.run.search(text)):
            return Drop("repetition", f"{found[1]!r} {len(found[0])} times in a row")
        words = _HAN.findall(text) if language == "zh" else text.lower().split()
        if len(words) >= DISTINCT_FROM and len(set(words)) < self.config.min_distinct * len(words):
            return Drop("repetition", f"{len(set(words))} distinct of {len(words)} words")
        if self.config.languages and language not in self.config.languages:
            return Drop("language", language)
        length = self.config.lengths.get(language, self.config.length)
        characters = len(text) - text.count(" ")
        if characters < length.min_characters:
            return Drop("short_caption", f"{characters} characters")
        if characters > length.max_characters:
            return Drop("long_caption", f"{characters} characters")
        return None
