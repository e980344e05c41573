"""Which words and patches are hidden, what is told of them, and how captions are scored by it."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import m2_ds
from m2_ds.data.text import SentencePieceTokenizer, Tokenizer, load_tokenizer
from m2_ds.data.text_train import train
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.encoder import M2Encoder
from m2_ds.model.loading import load_weights
from m2_ds.model.masked import caption_scores, pixel_targets, pixels_of, told_words
from m2_ds.model.masking import hidden_count, hide_attended, hide_patches, hide_words, word_numbers
from m2_ds.model.random import Noise
from m2_ds.model.weights import MASKED_HEADS, init_weights

TEXTS = ["strawberries and a red apple", "一个红苹果 and 龘", "x", "红"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("words")
    lines = ["straw berries and a red apple", "apple red", "a", "一个红苹果", "红", "and", "x"]
    lines += [f"{a}{b} {b}ing" for a in ("st", "tr", "gl", "dr", "cl", "br") for b in ("and", "ow", "een", "ass", "ip")]
    (folder / "lines.txt").write_text("\n".join(lines * 3), encoding="utf-8")
    train(folder / "made", corpus=(), text=(folder / "lines.txt",), vocab_size=300, coverage=1.0, max_length=40)
    return load_tokenizer(folder / "made")


def noise(count: int, seed: int = 0) -> Noise:
    return Noise.of(seed, torch.arange(count))


def test_words_are_whole_and_chinese_goes_piece_by_piece(tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer, SentencePieceTokenizer)
    ids, mask = tokenizer.encode(TEXTS)
    number = word_numbers(ids, mask, tokenizer.words())
    for row, text in enumerate(TEXTS):
        pieces = tokenizer.pieces(text)
        found: dict[int, str] = {}
        for piece, of in zip(pieces, number[row].tolist()):
            found[of] = found.get(of, "") + piece
        assert found.pop(0) == "[CLS][EOS]"  # start, end and padding are part of no word
        if text == TEXTS[0]:
            assert [word.strip("▁") for word in found.values()] == text.split()
        if text == TEXTS[1]:  # the bytes of a character that no piece has go together
            assert [word.strip("▁") for word in found.values()][-2:] == ["and", "<0xE9><0xBE><0x98>"]
            assert all(len(word) <= 5 for word in list(found.values())[:-2])


def test_about_the_share_of_words_is_hidden_and_one_at_least(tokenizer: Tokenizer) -> None:
    words = tokenizer.words()
    ids, mask = tokenizer.encode([TEXTS[0]] * 4000 + ["x"] * 10)
    hidden = hide_words(ids, mask, words, 0.3, noise(len(ids)))
    number = word_numbers(ids, mask, words)
    assert not hidden[number == 0].any() and hidden.any(1).all()
    for word in range(1, 6):  # a word goes as a whole, and each as often as the others
        of_word = hidden[:4000].masked_fill(number[:4000] != word, False)
        size = int((number[0] == word).sum())
        assert set(of_word.sum(1).tolist()) == {0, size}
        assert of_word.any(1).float().mean() == pytest.approx(0.3, abs=0.03)
    assert (hide_words(ids, mask, words, 1.0, noise(len(ids))) == (number > 0)).all()


def test_what_is_hidden_follows_the_sample_not_the_batch(tokenizer: Tokenizer) -> None:
    words = tokenizer.words()
    ids, mask = tokenizer.encode(TEXTS)
    whole = hide_words(ids, mask, words, 0.5, noise(4))
    alone = tokenizer.encode(TEXTS[1:2])
    part = hide_words(*alone, words, 0.5, Noise(noise(4).keys[1:2]))
    assert torch.equal(whole[1:2, : part.shape[1]], part) and not whole[1, part.shape[1] :].any()
    assert torch.equal(hide_patches(noise(4), 49, 0.4)[2:], hide_patches(Noise(noise(4).keys[2:]), 49, 0.4))
    assert not torch.equal(whole, hide_words(ids, mask, words, 0.5, noise(4, seed=1)))


def test_patches_are_as_many_as_asked_for() -> None:
    hidden = hide_patches(noise(2000), 49, 0.4)
    assert set(hidden.sum(1).tolist()) == {20} == {hidden_count(49, 0.4)}
    assert_close(hidden.float().mean(0), torch.full((49,), 20 / 49), atol=0.05, rtol=0)
    scores = torch.tensor([[0.1, 0.9, -0.3, 0.5]])
    assert hide_attended(scores, 2).tolist() == [[False, True, False, True]]
    assert hidden_count(196, 80 / 196) == 80 and hidden_count(16, 0.001) == 1


def test_pixel_targets_are_those_of_the_patches_and_can_be_undone() -> None:
    images = torch.randint(0, 256, (2, 3, 12, 12), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pixels = pixels_of(images, 4)
    assert_close(pixels[1, 5], images[1, :, 4:8, 8:12].flatten() / 255)  # second row, third column
    assert_close(pixels, F.unfold(images.float() / 255, 4, stride=4).transpose(1, 2))
    targets, mean, deviation = pixel_targets(pixels)
    assert_close(targets.mean(-1), torch.zeros(2, 9), atol=1e-5, rtol=0)
    assert_close(targets.var(-1, correction=0), torch.ones(2, 9), atol=1e-3, rtol=0)
    assert_close(targets * deviation + mean, pixels, atol=1e-5, rtol=0)
    flat, *_ = pixel_targets(torch.full((1, 1, 48), 0.5))
    assert not flat.any()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> M2Encoder:
    changes = {"vocab_size": tokenizer.vocab_size, "masked_text_head": True, "masked_image_head": 192}
    config = M2EncoderConfig.preset("test", position_std=0.02, **changes)
    model = M2Encoder(config)
    init_weights(model, config, seed=0)
    with torch.no_grad():
        model.masked_text_head.vocabulary.weight.mul_(20)  # far from all tokens alike
    return model.double()


def test_captions_are_scored_by_each_word_hidden_once(model: M2Encoder, tokenizer: Tokenizer) -> None:
    words = tokenizer.words()
    ids, mask = tokenizer.encode(TEXTS)
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    found = caption_scores(model, images, ids, mask, words, rounds=ids.shape[1])
    right, count = told_words(model, images, ids, mask, words)
    for n in range(len(TEXTS)):  # one caption, one word at a time, by the public joint forward
        number, length = word_numbers(ids, mask, words)[n], int(mask[n].sum())
        total, told = 0.0, 0
        for word in range(1, int(number.max()) + 1):
            place = (number == word).nonzero()[:, 0]
            hidden = ids[n : n + 1, :length].clone()
            hidden[0, place] = tokenizer.mask_id
            states = model.fuse(images[n : n + 1], hidden, torch.ones_like(hidden))[0, 17:][place]
            head = model.masked_text_head
            scores = head.vocabulary(head.transform(states)).log_softmax(-1)
            total += scores.gather(1, ids[n, place][:, None]).sum().item()
            told += bool((scores.argmax(1) == ids[n, place]).all())
        assert float(found[n]) == pytest.approx(total / int((number > 0).sum()), rel=1e-5)
        assert (int(right[n]), int(count[n])) == (told, int(number.max()))


def test_a_model_without_the_head_says_so(tokenizer: Tokenizer) -> None:
    model, _ = m2_ds.load("test")
    ids, mask = tokenizer.encode(["x"])
    with pytest.raises(ValueError, match="train one with loss.cmlm"):
        caption_scores(model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ids, mask, tokenizer.words())


def test_heads_are_drawn_or_left_out_when_weights_of_the_other_kind_are_loaded(model: M2Encoder) -> None:
    told: list[str] = []
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    plain = M2Encoder(model.config.without_masked_heads())
    load_weights(plain, plain.config, state, "with heads", told.append)
    assert "are left out" in told[-1] and all(torch.equal(x, state[n]) for n, x in plain.state_dict().items())
    again = M2Encoder(model.config)
    load_weights(again, again.config, plain.state_dict(), "without", told.append)
    assert "start from random values" in told[-1]
    fresh = {name: x for name, x in again.state_dict().items() if name.startswith(MASKED_HEADS)}
    assert len(fresh) == 12 and fresh["masked_text_head.vocabulary.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert fresh["masked_image_head.transform.norm.weight"].eq(1).all()
