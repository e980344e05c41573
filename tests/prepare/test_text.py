"""Captions: what cleaning changes and what it leaves, the language of short texts, and every rule."""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from m2_ds.data.records import Caption
from m2_ds.prepare.config import TextConfig
from m2_ds.prepare.text import TextRules, clean, identify

ENGLAND = "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  a\tred\n fox ", "a red fox"),
        ("salt &amp; pepper &amp;amp; more", "salt & pepper & more"),
        ("<p>a <b>red</b> fox<br/></p>", "a red fox"),
        ("<script>let x = 1 < 2;</script>a fox", "a fox"),
        ("3 < 5 and a <3 heart", "3 < 5 and a <3 heart"),
        ("\ufeffa\x00 fox\u200b\u202e\x07", "a fox"),
        ("half \ud83d pair", "half pair"),
        ("ＡＢＣ１２３ 全角，标点！", "ABC123 全角，标点！"),
        ("cafe\u0301 ﬁsh ㎏ ½ ①²™…", "café fish ㎏ ½ ①²™…"),
        ("一　只\u00a0猫", "一 只 猫"),
        ("family 👨\u200d👩\u200d👧 ❤️ 👍🏽", "family 👨\u200d👩\u200d👧 ❤️ 👍🏽"),
        (f"flag {ENGLAND}", f"flag {ENGLAND}"),
    ],
)  # fmt: skip
def test_clean(raw: str, cleaned: str) -> None:
    assert clean(raw) == cleaned


def test_markup_stays_where_it_is_asked_to() -> None:
    assert clean("a <b>red</b> fox &amp; hen", strip_html=False) == "a <b>red</b> fox &amp; hen"


@given(st.text(alphabet=st.characters(), max_size=60))
@example("\ud800<b>\x00&#0;")
def test_clean_text_can_be_written_and_stays_as_it_is(text: str) -> None:
    once = clean(text, strip_html=False)
    once.encode()
    assert once == clean(once, strip_html=False)
    assert once == once.strip() and "  " not in once
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn") for c in once)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("a red fox", "en"),
        ("red fox", "en"),
        ("café crème brûlée with berries", "en"),
        ("一只红色的狐狸", "zh"),
        ("我的 iPhone 手机壳", "zh"),
        ("plate of mapo tofu (豆腐) on a table", "en"),
        ("赤い帽子をかぶった女の子", "ja"),
        ("レストラン", "ja"),
        ("빨간 모자를 쓴 아이", "ko"),
        ("маленький красный дом стоит на берегу большого озера", "ru"),
        ("Ein kleiner roter Vogel sitzt auf dem Zweig eines alten Baumes", "de"),
        ("Une petite maison blanche au bord de la mer avec un grand jardin", "fr"),
        ("12:30 !!", "und"),
        ("", "und"),
    ],
)
def test_language(text: str, language: str) -> None:
    assert identify(text) == language


@given(st.text(max_size=40))
def test_any_text_has_a_language(text: str) -> None:
    assert identify(clean(text)).isalpha()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a red fox on a hill", None),
        ("五个字够了", None),
        ("一只猫", "short_caption"),
        ("cat", "short_caption"),
        ("a b c", "short_caption"),
        ("a b c d e", None),
        (" \x00 <br> ", "no_caption"),
        ("2024/05/06 -- 12:30", "no_letters"),
        ("★★★★★★", "no_letters"),
        ("woooooooooooow so nice", "repetition"),
        ("哈哈哈哈哈哈哈哈哈哈", "repetition"),
        ("buy now " * 6, "repetition"),
        ("call 000000000000 for a house", None),
        ("IMG_1234.jpg", "boilerplate"),
        ("holiday-2.png", "boilerplate"),
        ("Click here to enlarge image", "boilerplate"),
        ("点击查看大图", "boilerplate"),
        ("https://example.org/a.jpg", "boilerplate"),
        ("a photo of 3 dogs", None),
        ("赤い帽子をかぶった女の子", "language"),
        (" ".join(f"word{number}" for number in range(400)), "long_caption"),
    ],
)
def test_rules(text: str, rule: str | None) -> None:
    kept, drops = TextRules(TextConfig()).apply([Caption(text, "und")])
    assert [drop.rule for _, drop in drops] == ([rule] if rule else [])
    assert len(kept) == (rule is None)


def test_rules_by_language_and_given_languages() -> None:
    config = TextConfig.model_validate({"lengths": {"zh": {"min_characters": 2}}, "languages": ["zh", "fr"]})
    captions = [
        Caption("红狐", "und"),
        Caption("chat", "fr"),
        Caption("un grand chat", "fr"),
        Caption("a fox here", "en"),
    ]
    kept, drops = TextRules(config).apply(captions)
    assert [(c.text, c.language) for c in kept] == [("红狐", "zh"), ("un grand chat", "fr")]
    assert [(c.text, drop.rule) for c, drop in drops] == [("chat", "short_caption"), ("a fox here", "language")]
