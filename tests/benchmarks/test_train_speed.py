"""The side-by-side benchmark: what it reads from either side's log, its clock, its choice of layouts, its tars."""

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import train_speed  # noqa: E402
from peer import make_tars, model_folder  # noqa: E402

from m2_ds.data.shards import Caption, Record, ShardWriter  # noqa: E402

# Two lines as the peer's logger writes them, and one that tells of no step.
PEER_LOG = [
    "2026-01-01,10:00:00 | INFO | Start epoch 0\n",
    "2026-01-01,10:00:02 | INFO | Train Epoch: 0 [ 256/3072 (8%)] Data (t): 0.833 Batch (t): 2.975, 86.0511/s, "
    "43.0255/s/gpu LR: 0.000050 Logit Scale: 14.286 Contrastive_loss: 5.5674 (5.5674) Loss: 5.5674 (5.5674)\n",
    "2026-01-01,10:00:03 | INFO | Train Epoch: 0 [ 512/3072 (17%)] Data (t): 0.012 Batch (t): 0.200, 1280.00/s, "
    "640.000/s/gpu LR: 0.000100 Logit Scale: 14.285 Contrastive_loss: 6.5357 (6.0516) Loss: 6.5357 (6.0516)\n",
]


def options(tmp_path: Path, **changes: object) -> train_speed.Options:
    given = {"peer_python": Path(sys.executable), "data": tmp_path / "data", "tokenizer": tmp_path / "tokenizer"}
    return train_speed.Options(**{**given, **changes})  # type: ignore[arg-type]


def test_rates_of_the_peer_are_the_whole_job_s_not_one_process_s() -> None:
    assert train_speed.peer_rates(PEER_LOG) == [86.0511, 1280.0]


def test_rates_of_ours_leave_out_a_line_being_written() -> None:
    lines = [json.dumps({"step": s, "samples_per_s": 100.0 + s}) + "\n" for s in range(3)] + ['{"step": 3, "sam']
    assert train_speed.our_rates(lines) == [100.0, 101.0, 102.0]


@pytest.mark.parametrize("text", ["2", "0x2", "2x", "axb"])
def test_layout_refuses_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="PROCESSESxTHREADS"):
        train_speed.Layout.parse(text)


def test_a_turn_is_watched_timed_and_counted(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    script = (
        "import json, os, sys, time\n"
        "with open(sys.argv[1], 'w') as out:\n"
        "    for step in range(8):\n"
        "        time.sleep(0.1)\n"
        "        out.write(json.dumps(dict(step=step, samples_per_s=float(os.environ['OMP_NUM_THREADS']))) + chr(10))\n"
        "        out.flush()\n"
    )
    arrivals = train_speed.watch([sys.executable, "-c", script, str(log)], 3, log, tmp_path / "out.txt", limit=30)
    lines = log.read_text().splitlines(keepends=True)
    assert len(arrivals) == len(lines) == 8
    assert arrivals == sorted(arrivals) and arrivals[-1] - arrivals[0] > 0.2  # as they came, not all at the end
    turn = train_speed.Turn("m2_ds", "fp32", "1x3", 0, 0.0)
    times = [10.0, 11.0, 12.0, 12.5, 13.0, 13.5, 14.0, 14.5]
    train_speed.count(turn, lines, times, options(tmp_path, warmup=2, batch=10))
    assert turn.rates == [3.0] * 6 and turn.median == 3.0  # what the log says: the number of threads, here
    assert turn.clock == round(60 / 3.5, 2)  # from the arrival of the last warm-up step to that of the last step
    with pytest.raises(ValueError, match="warm-up"):
        train_speed.count(turn, lines, times, options(tmp_path, warmup=7))


def test_a_turn_that_fails_shows_the_end_of_its_output(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="(?s)exit status 3.*the reason"):
        command = [sys.executable, "-c", "print('the reason', flush=True); raise SystemExit(3)"]
        train_speed.watch(command, 1, tmp_path / "log", tmp_path / "out.txt", limit=30)


def test_a_turn_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="longer than"):
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        train_speed.watch(command, 1, tmp_path / "log", tmp_path / "out.txt", limit=0.5)


def test_summary_compares_each_side_at_its_best() -> None:
    def turn(side: train_speed.Side, layout: str, *rates: float) -> train_speed.Turn:
        return train_speed.Turn(side, "bf16", layout, 0, 0.0, median=rates[0], clock=rates[0], rates=list(rates))

    turns = [turn("peer", "1x2", 90, 100, 110), turn("peer", "2x1", 120, 80, 100), turn("peer", "2x1", 130, 140, 150)]
    turns += [turn("m2_ds", "1x2", 250, 250, 1000), turn("m2_ds", "2x1", 200, 200, 200)]
    (row,) = train_speed.summarise(turns)
    assert row["peer"]["best"] == "2x1" and row["peer"]["samples_per_s"] == 125  # type: ignore[index]
    assert row["m2_ds"]["best"] == "1x2" and row["ratio"] == 2.0  # type: ignore[index]
    table = train_speed.table([row], {"cpu": "A", "cores": 2, "date": "D", "batch": 256, "counted": 3})
    assert "| bf16 | peer | 2x1 | 125 | 120 / 120, 130 / 130 | best |" in table and "2.00 x" in table


def test_both_commands_ask_for_the_same_work(tmp_path: Path) -> None:
    for name in ("00000.tar", "00011.tar"):
        (tmp_path / name).touch()
    asked = options(tmp_path, steps=5, batch=64)
    layout = train_speed.Layout(2, 1)
    peer = train_speed.peer_command(asked, "bf16", layout, tmp_path / "model", tmp_path, tmp_path / "runs" / "a")
    ours = train_speed.our_command(asked, "bf16", layout, tmp_path / "runs" / "b")
    peer_text, our_text = " ".join(peer), " ".join(ours)
    assert "--train-num-samples 320 " in peer_text and "--batch-size 32 " in peer_text  # per process
    assert "{00000..00011}.tar" in peer_text and "--precision amp_bf16" in peer_text and "launch.py" in peer_text
    assert "steps=5" in ours and "global_batch=64" in ours and "--num_gpus 2" in our_text
    assert "engine.precision=bf16" in ours
    alone = train_speed.peer_command(asked, "fp32", train_speed.Layout(1, 2), tmp_path, tmp_path, tmp_path / "a")
    assert "launch.py" not in " ".join(alone) and "open_clip_train.main" in alone


def test_model_folder(tmp_path: Path) -> None:
    config = json.loads((model_folder.write(tmp_path / "m") / model_folder.CONFIG_NAME).read_text())["model_cfg"]
    assert config["text_cfg"]["heads"] == 3 and config["vision_cfg"]["layers"] == config["text_cfg"]["layers"] == 8
    with pytest.raises(ValueError, match="multiple of patch_size"):
        model_folder.model_config(image_size=50)


def test_tars_hold_every_picture_once_a_language(tmp_path: Path) -> None:
    pictures = {}
    with ShardWriter(tmp_path / "data", "small") as writer:
        for number in range(40):
            buffer = io.BytesIO()
            Image.new("RGB", (16, 16), (number, 0, 0)).save(buffer, "PNG" if number % 2 else "JPEG")
            pictures[f"{number:08d}"] = buffer.getvalue()
            captions = [Caption(f"en {number}", "en", 1.0, "name"), Caption(f"never {number}", "en", 1e-9, "name")]
            captions += [Caption(f"zh {number} {i}", "zh", 1.0, "name") for i in range(2 * (number != 7))]
            record = Record(
                f"a.b{number}", buffer.getvalue(), captions, "g", source="s", license="l", width=16, height=16
            )
            writer.add("train", record)
    out = make_tars.write(tmp_path / "data", tmp_path / "tars", shards=4)
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                stem, _, extension = member.name.partition(".")
                samples.setdefault(stem, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    assert len(samples) == 79 == sum(json.loads((out / "sizes.json").read_text()).values())  # no zh for number 7
    chosen = set()
    for name, sample in samples.items():
        number, language = name.split("_")
        assert sample["png" if int(number) % 2 else "jpg"] == pictures[number]
        text = sample["txt"].decode()
        assert text.startswith(f"{language} {int(number)}")
        chosen |= {text[-1]} if language == "zh" else set()
    assert chosen >= {"0", "1"}  # both captions of a language are drawn
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    make_tars.write(tmp_path / "data", tmp_path / "tars", shards=4)
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}  # reused
    with pytest.raises(ValueError, match="remove it"):
        make_tars.write(tmp_path / "data", tmp_path / "tars", shards=5)
