"""Round trips bit for bit through every layout, types, sizes, and what is written."""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close

import m2_ds
from m2_ds import cli
from m2_ds.convert.canonical import read_config, read_weights, weight_files, write_config
from m2_ds.convert.command import parse_size
from m2_ds.convert.fit import PATCH_KERNEL, resample_patches
from m2_ds.convert.release import find_release_config, read_release
from m2_ds.convert.source import open_source, resolve
from m2_ds.convert.torch_file import read_torch_file
from m2_ds.data.text import Tokenizer
from m2_ds.model.config import M2EncoderConfig
from m2_ds.model.loading import resize_positions
from m2_ds.model.weights import VISION_POSITIONS
from tests.convert.checkpoints import (
    CONFIG,
    LAYOUTS,
    as_layout,
    assert_same_bits,
    converted,
    left_in,
    random_state,
    write,
)
from tests.convert.conftest import GOLDENS

FP16, FP32, BF16 = torch.float16, torch.float32, torch.bfloat16
EMBEDDING = {"atol": 5e-6, "rtol": 0}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "prefixed"])
def test_round_trip_is_bit_for_bit(tmp_path: Path, layout: str, legacy: bool) -> None:
    dtypes = [FP16, FP32, BF16, torch.float64]
    state = {name: x.to(dtypes[i % 4]) for i, (name, x) in enumerate(random_state().items())}
    state["logit_scale"] = torch.tensor(float("nan"), dtype=FP16)  # kept, whatever it is
    source = write(tmp_path / "in", as_layout(state, layout), legacy=legacy)
    canonical = converted(source, tmp_path / "canonical")
    assert_same_bits(read_weights(canonical), state)
    assert read_config(canonical) == CONFIG
    back_to = layout if layout in LAYOUTS else "bare"
    back = converted(canonical, tmp_path / "back", to="release", layout=back_to)
    content = torch.load(back / "back.ckpt", weights_only=True)
    key = LAYOUTS[back_to]
    names = as_layout(dict.fromkeys(state), back_to)
    assert_same_bits(
        {name.removeprefix("_forward_module."): x for name, x in (content[key] if key else content).items()}, state
    )
    assert (content[key] if key else content).keys() == (names[key] if key else names).keys()
    assert find_release_config(back / "back.ckpt")[1] == find_release_config(source)[1]
    again = converted(back, tmp_path / "again")
    assert_same_bits(read_weights(again), state)
    assert left_in(tmp_path) == ["again", "back", "canonical", "in"]


@pytest.mark.parametrize("layout", ["ckpt_pl.ckpt", "ckpt_deepspeed.ckpt"])
@torch.no_grad()
def test_goldens_after_conversion(tmp_path: Path, layout: str) -> None:
    shutil.copy(GOLDENS / "variant_a" / layout, tmp_path / "m2.ckpt")
    shutil.copy(GOLDENS / "variant_a/config.json", tmp_path / "m2.json")
    canonical = converted(tmp_path / "m2.ckpt", tmp_path / "canonical")
    assert_same_bits(read_weights(canonical), load_file(GOLDENS / "variant_a/weights.safetensors"))
    back = converted(canonical, tmp_path / "back", to="release")
    inputs, want = (load_file(GOLDENS / f"variant_a/{name}puts.safetensors") for name in ("in", "out"))
    for path in (canonical, back):
        model, _ = m2_ds.load(path)
        assert_close(model.encode_image(inputs["image_uint8"]), want["image.cls_vlffn_feats"], **EMBEDDING)
        found = model.encode_text(inputs["text_ids"], inputs["text_masks"])
        assert_close(found, want["text.cls_vlffn_feats"], **EMBEDDING)


def test_a_released_half_precision_file_is_mapped(tmp_path: Path) -> None:
    source = write(tmp_path, as_layout(random_state(dtype=FP16), "lightning"))
    state = read_release(source)
    assert {x.dtype for x in state.values()} == {FP16}
    maps = Path("/proc/self/maps").read_text()
    assert str(source) in maps, "tensors are not in mapped memory"
    direct, through = (m2_ds.load(path)[0].state_dict() for path in (source, converted(source, tmp_path / "out")))
    assert_same_bits(direct, through)


def test_what_torch_can_save_is_read_alike(tmp_path: Path) -> None:
    base = torch.randn(40, 6, dtype=FP16)
    content = {
        "transposed": base.T,
        "strided": base[::3, 1::2],
        "row": base[7],
        "shares storage": base[:2],
        "parameter": torch.nn.Parameter(base.float()),
        "scalar": torch.tensor(3.5, dtype=BF16),
        "empty": torch.empty(0, 5),
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "complex keys": {("a", 1): base, 5: base},
        "long": torch.arange(5),
        "list": [base, (base[1:], None, True, 2.5, "x", 2**80)],
    }
    for legacy in (False, True):
        torch.save(content, tmp_path / "x", _use_new_zipfile_serialization=not legacy)
        found = read_torch_file(tmp_path / "x").content
        assert alike(found, torch.load(tmp_path / "x", weights_only=True)) == 13


def alike(found: object, wanted: object) -> int:
    """How many tensors were compared."""
    if isinstance(wanted, torch.Tensor):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(found.read(), wanted) and torch.equal(found.mapped({}), wanted)
        return 1
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        return sum(alike(found[key], value) for key, value in wanted.items())
    if isinstance(wanted, list | tuple):
        assert type(found) is type(wanted) and len(found) == len(wanted)
        return sum(map(alike, found, wanted))
    assert found == wanted
    return 0


def test_bytes_in_the_other_order_are_turned(tmp_path: Path) -> None:
    state = random_state(dtype=FP16)
    torch.save(state, tmp_path / "little.ckpt")
    with zipfile.ZipFile(tmp_path / "little.ckpt") as old, zipfile.ZipFile(tmp_path / "m2.ckpt", "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith("byteorder"):
                content = b"big"
            elif "/data/" in info.filename:
                content = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 2).flip(1).numpy().tobytes()
            new.writestr(info.filename, content)
    (tmp_path / "little.ckpt").unlink()
    (tmp_path / "m2.json").write_text((write(tmp_path / "x", state).parent / "m2.json").read_text())
    assert_same_bits(read_weights(converted(tmp_path / "m2.ckpt", tmp_path / "out")), state)
    assert_same_bits(read_release(tmp_path / "m2.ckpt"), state)


def test_strided_tensors_are_written_row_by_row(tmp_path: Path) -> None:
    state = random_state(dtype=FP16)
    wide = {name: x.T.contiguous().T if x.dim() == 2 else x for name, x in state.items()}
    assert not all(x.is_contiguous() for x in wide.values())
    source = write(tmp_path, as_layout(wide, "model"))
    assert_same_bits(read_weights(converted(source, tmp_path / "out")), state)


def test_shards_index_order_and_checksums(tmp_path: Path, tokenizer: Tokenizer) -> None:
    state = {name: x.to(FP32 if x.dim() < 2 else FP16) for name, x in random_state().items()}
    state["logit_scale"] = state["logit_scale"].half()  # two bytes: what comes behind it would not be aligned
    source = write(tmp_path / "in", as_layout(state, "lightning"))
    tokenizer.save(tmp_path / "in")
    out = converted(source, tmp_path / "out", shard_size="20kB")
    files = weight_files(out)
    assert len(files) > 3 and read_weights(out).keys() == state.keys()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in state.values())
    for file in files:
        raw = file.read_bytes()
        base = 8 + int.from_bytes(raw[:8], "little")
        assert base % 8 == 0
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())  # noqa: SIM118
            assert all(index["weight_map"][name] == file.name for name in names)
            assert sum(state[name].nbytes for name in names) <= 20000 or len(names) == 1
        for name, entry in json.loads(raw[8:base]).items():
            if name != "__metadata__":
                assert entry["data_offsets"][0] % state[name].element_size() == 0
    checksums = json.loads((out / "checksums.json").read_text())
    assert sorted([*checksums, "checksums.json"]) == left_in(out)
    assert {"config.json", "tokenizer.model", "tokenizer_config.json"} < checksums.keys()
    assert all(hashlib.sha256((out / name).read_bytes()).hexdigest() == x for name, x in checksums.items())
    assert m2_ds.load(out)[1].texts(["a dog"])[0].shape[0] == 1
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    for use in (m2_ds.load, open_source):
        with pytest.raises(ValueError, match=rf"{files[1].name} is damaged"):
            use(out)


@pytest.mark.parametrize("limit", [zipfile.ZIP64_LIMIT, 1000], ids=["zip", "zip64"])
def test_the_archive_is_one_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    state = random_state(dtype=FP16)
    out = converted(write(tmp_path / "in", state), tmp_path / "out", to="release", layout="bare")
    for mapped in (False, True):
        assert_same_bits(torch.load(out / "out.ckpt", weights_only=True, mmap=mapped), state)
    assert_same_bits(torch.load(out / "out.ckpt", weights_only=False), state)
    with zipfile.ZipFile(out / "out.ckpt") as archive:
        assert archive.testzip() is None
    for tensor in read_torch_file(out / "out.ckpt").content.values():
        assert tensor.stretches[0].offset % 64 == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_types_are_changed_as_torch_does(tmp_path: Path, dtype: str) -> None:
    state = random_state()
    out = converted(write(tmp_path / "in", state), tmp_path / "out", dtype=dtype)
    assert_same_bits(read_weights(out), {name: x.to(getattr(torch, dtype)) for name, x in state.items()})


def test_numbers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = random_state()
    state["norm.weight"][3] = -70000.0
    source = write(tmp_path / "in", state)
    with pytest.raises(ValueError, match=r"norm\.weight holds numbers up to 70000, which float16 does not reach"):
        converted(source, tmp_path / "out", dtype="float16")
    assert left_in(tmp_path) == ["in"]


def test_other_pictures_resize_positions(tmp_path: Path) -> None:
    state = random_state(dtype=FP16)
    out = converted(write(tmp_path / "in", state), tmp_path / "out", image_size=48, report=tmp_path / "r.json")
    found = read_weights(out)
    assert torch.equal(found[VISION_POSITIONS], resize_positions(state.pop(VISION_POSITIONS), 36))
    assert_same_bits({name: x for name, x in found.items() if name != VISION_POSITIONS}, state)
    assert read_config(out).image_size == 48
    assert json.loads((tmp_path / "r.json").read_text())["resized"] == {VISION_POSITIONS: [[19, 32], [39, 32]]}
    assert m2_ds.load(out)[0].encode_image(torch.zeros(1, 3, 48, 48)).shape == (1, 32)
    with pytest.raises(ValueError, match="image_size 50 is not a multiple of patch_size 8"):
        converted(out, tmp_path / "other", image_size=50)


def test_other_patches_resample_the_kernel(tmp_path: Path) -> None:
    state = random_state()
    source = write(tmp_path / "in", state)
    out = converted(source, tmp_path / "out", image_size=48, patch_size=12)  # the grid stays
    found = read_weights(out)
    assert torch.equal(found[PATCH_KERNEL], resample_patches(state[PATCH_KERNEL], 12))
    assert torch.equal(found[VISION_POSITIONS], state[VISION_POSITIONS])
    assert read_config(out).patch_size == 12
    with pytest.raises(ValueError, match=rf"{PATCH_KERNEL} is \[32, 3, 8, 8\], not \[32, 3, 16, 16\]"):
        other = tmp_path / "other.json"
        other.write_text(json.dumps({**json.loads((tmp_path / "in/m2.json").read_text()), "patch_size": 16}))
        converted(source, tmp_path / "x", config=other)  # a wrong configuration, not a wish


@pytest.mark.parametrize("side", [9, 12, 16, 20])
def test_a_resampled_kernel_answers_to_resized_patches_as_before(side: int) -> None:
    g = torch.Generator().manual_seed(1)
    kernel, patch = torch.randn(5, 3, 8, 8, generator=g), torch.randn(7, 3, 8, 8, generator=g)
    larger = F.interpolate(patch, size=(side, side), mode="bilinear", align_corners=False)
    assert_close(F.conv2d(larger, resample_patches(kernel, side)), F.conv2d(patch, kernel), atol=2e-4, rtol=0)


def test_a_smaller_kernel_is_the_best_there_is() -> None:
    """No kernel answers better, over white noise, than the one found; and it differs from plain resizing."""
    g = torch.Generator().manual_seed(2)
    kernel, patches = torch.randn(1, 1, 8, 8, generator=g), torch.randn(4000, 1, 8, 8, generator=g)
    smaller = F.interpolate(patches, size=(5, 5), mode="bilinear", antialias=True)
    answers = F.conv2d(patches, kernel).flatten()

    def error(candidate: torch.Tensor) -> float:
        return (F.conv2d(smaller, candidate).flatten() - answers).square().mean().item()

    best = torch.linalg.lstsq(smaller.flatten(1), answers[:, None]).solution.reshape(1, 1, 5, 5)
    found = error(resample_patches(kernel, 5))
    assert found <= error(best) * 1.05
    assert found < 0.9 * error(F.interpolate(kernel, size=(5, 5), mode="bilinear", antialias=True))


def test_the_same_side_is_the_same_kernel() -> None:
    kernel = torch.randn(4, 3, 8, 8)
    assert_close(resample_patches(kernel, 8), kernel, atol=1e-6, rtol=0)


def test_a_convolutional_stem_is_not_resampled(tmp_path: Path) -> None:
    config = M2EncoderConfig.preset("test", num_layers=1, stem="conv")
    model = tmp_path / "in"
    model.mkdir()
    save_file(random_state(config), model / "model.safetensors")
    write_config(model, config)
    assert read_weights(converted(model, tmp_path / "larger", image_size=64))[VISION_POSITIONS].shape[0] == 67
    with pytest.raises(ValueError, match=r"convolutional stem.*--patch-size 4"):
        converted(model, tmp_path / "x", patch_size=4)
    with pytest.raises(ValueError, match=r"cannot express text_positions 130 \(there 1024\), stem 'conv'"):
        converted(model, tmp_path / "x", to="release")


def test_the_key_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = random_state(dtype=FP16)
    content = as_layout({f"model.{name}": x for name, x in state.items()}, "lightning")
    content["state_dict"]["visual_tokenizer.encoder.weight"] = torch.ones(3)
    content["optimizer_states"] = [{"state": {0: {"exp_avg": torch.ones(3)}}}]
    source = write(tmp_path / "in", content)
    converted(source, tmp_path / "out", dry_run=True, report=tmp_path / "r.json", shard_size="100kB")
    told, report = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    assert left_in(tmp_path) == ["in", "r.json"]
    assert report["layout"] == "lightning, zip file" and report["prefixes"] == {"model.": len(state)}
    assert report["dropped"] == ["visual_tokenizer.encoder.weight"]
    assert report["other"] == ["epoch", "global_step", "optimizer_states"]
    assert report["dtypes"] == {
        "float16": {
            "tensors": len(state),
            "parameters": sum(x.numel() for x in state.values()),
            "bytes": sum(x.nbytes for x in state.values()),
        }
    }
    assert [name for name, *_ in report["files"]][:2] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2)]
    for words in (
        "lightning",
        "visual_tokenizer.encoder.weight",
        "optimizer_states",
        "model-00002-of-00003",
        "--dry-run",
    ):
        assert words in told


def test_names_and_shapes_of_another_network_stop_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = random_state()
    state["fuser.weight"] = state.pop("norm.weight")
    source, report = write(tmp_path / "in", as_layout(state, "model")), tmp_path / "r.json"
    with pytest.raises(ValueError, match=r"(?s)missing \(1\): norm\.weight.*unexpected \(1\): fuser\.weight"):
        converted(source, tmp_path / "out", report=report)
    assert json.loads(report.read_text())["missing"] == ["norm.weight"]
    state["norm.weight"] = state.pop("fuser.weight")[:5]
    state["norm.bias"] = state["norm.bias"].long()
    source = write(tmp_path / "in", as_layout(state, "model"))
    with pytest.raises(ValueError, match=r"norm\.bias is int64, not floating point, norm\.weight is \[5\], not \[32\]"):
        converted(source, tmp_path / "out", report=report)
    state["module.norm.weight"] = state["norm.weight"]
    source = write(tmp_path / "in", as_layout(state, "model"))
    with pytest.raises(ValueError, match=r"norm\.weight and module\.norm\.weight both stand for norm\.weight"):
        converted(source, tmp_path / "out")
    assert left_in(tmp_path) == ["in", "r.json"]


def test_sizes_are_read() -> None:
    assert [parse_size(x) for x in ("4GB", "4GiB", "500 MB", "1.5kB", "123")] == [
        4 * 10**9, 4 << 30, 5 * 10**8, 1500, 123,
    ]  # fmt: skip
    for text in ("", "4 apples", "-1GB", "0GB", "1e9", "GB"):
        with pytest.raises(ValueError, match="--shard-size"):
            parse_size(text)


def test_through_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", random_state())
    cli.main(["convert", str(source), str(tmp_path / "out"), "--dtype", "float16", "--shard-size", "50kB"])
    assert {x.dtype for x in read_weights(tmp_path / "out").values()} == {FP16}
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "x")])
    assert ended.value.code == 2 and "nowhere does not exist" in capsys.readouterr().err


def test_folders_and_files_are_told_apart(tmp_path: Path) -> None:
    source = write(tmp_path / "in", random_state())
    assert open_source(tmp_path / "in").path == source and resolve(tmp_path / "in") == source
    out = converted(source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"one file of a canonical folder: give the folder"):
        open_source(out / "model.safetensors")
    with pytest.raises(ValueError, match=r"OUT is the folder that m2\.ckpt and its JSON are written to"):
        converted(out, tmp_path / "m2.ckpt", to="release")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        open_source(tmp_path / "empty")
