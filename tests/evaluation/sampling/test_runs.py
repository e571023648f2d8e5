"""Sampling runs: the same folder whatever the processes, interruptions and batches; what is wrong is said."""

import argparse
import hashlib
import json
import os
import resource
import signal
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from companion import sample_generators
from companion.cli.main import main as command_line
from companion.cli.sample import add_arguments, settings_from
from companion.cli.sample import run as main
from companion.evaluation.sampling import runs
from companion.evaluation.sampling import settings as sampling_settings
from companion.evaluation.sampling.folder import Lock, begin, read_batches, read_manifest
from companion.evaluation.sampling.runs import draw, sample
from companion.evaluation.sampling.settings import (
    SamplingSettings,
    check_sampling,
    conditions_for,
    model_defaults,
    read_prompts,
    weights_fingerprint,
)
from companion.files import Unwritable
from companion.pipelines.registry import load
from tests.evaluation.sampling.separate_processes import (
    SETTINGS,
    execute,
    kill,
    run,
    run_killed,
    run_slowly,
    start,
    wait,
)
from tests.evaluation.scene_pipelines import captioned_sd, save_scene_dit, scene_adm
from tests.fork_server import ROOT
from tests.pipelines.tiny import tiny_dit


def checksums(folder: Path) -> dict[str, str]:
    """Of all files but the one that says when and where."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "provenance.json"
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An uninterrupted run of one process in each format."""
    return {kind: run(tmp_path_factory.mktemp(kind) / "run", image_format=kind) for kind in ("png", "npz")}


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in the order in which a process with one thread takes them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def test_samples_are_the_pipelines_own(whole):
    pipe = tiny_dit()
    images, conditions = zip(*read_batches(whole["png"]), strict=True)
    with runs.rectified_guidance(pipe, SETTINGS.guidance):
        own = pipe([3, 7, 5], guidance_scale=4.0, num_inference_steps=2, generator=sample_generators(4, range(3)))
    for drawn, picture in zip(np.concatenate(images), own.images, strict=False):
        assert np.abs(drawn.astype(int) - np.asarray(picture)).max() <= 1
    assert [c for batch in conditions for c in batch] == [3, 7, 5, 3, 7, 5, 3, 7, 5, 3, 7]
    assert len({drawn.tobytes() for drawn in np.concatenate(images)}) == 11


def test_both_formats_hold_the_same(whole):
    for (first, conditions), (second, others) in zip(*map(read_batches, whole.values()), strict=True):
        assert np.array_equal(first, second) and conditions == others
    assert len(list((whole["png"] / "images").iterdir())) == 11
    assert len(list((whole["npz"] / "shards").iterdir())) == 6
    with np.load(whole["npz"] / "shards" / "00000010.npz", allow_pickle=False) as shard:
        assert shard["images"].shape == (1, 16, 16, 3) and shard["conditions"].tolist() == [7]
    with Image.open(whole["png"] / "images" / "00000010.png") as picture:
        assert picture.size == (16, 16) and picture.mode == "RGB"


def test_the_batch_size_matters_no_more_than_rounding(whole):
    reference = np.concatenate([images for images, _ in read_batches(whole["npz"])]).astype(int)
    for size in (1, 11):
        other = replace(SETTINGS, batch_size=size)
        drawn = np.concatenate([draw(tiny_dit(), other, other.samples(first))[0] for first in other.batches()])
        assert np.abs(drawn.astype(int) - reference).max() <= 1


@pytest.mark.slow
def test_two_processes_write_the_same_folder(tmp_path):
    """By the launcher's own command, over the loopback interface: no other network and no host name is needed."""
    model = save_scene_dit(tmp_path / "model")
    given = ["sample", "--model", str(model), "--num-samples", "5", "--batch-size", "2", "--steps", "2", "--seed", "4",
             "--classes", "star,3,heart", "--device", "cpu"]  # fmt: skip
    with one_thread():
        assert command_line([*given, "--out", str(tmp_path / "alone")]) == 0
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0",
              "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "companion"]  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, *given, "--out", str(tmp_path / "two")]
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    printed = execute(
        command, {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback, "PYTHONPATH": str(ROOT)}, seconds=300
    )
    assert printed.count(f"written: {tmp_path / 'two'}") == 1
    assert checksums(tmp_path / "two") == checksums(tmp_path / "alone")
    assert json.loads((tmp_path / "two" / "provenance.json").read_text())["sessions"][-1]["processes"] == 2


@pytest.mark.parametrize(("image_format", "after"), [("png", 4), ("png", 8), ("npz", 3)])
@pytest.mark.slow
def test_killed_at_any_write_it_goes_on(tmp_path, image_format, after):
    """Every session is killed at its `after`-th renaming, alternately just after and just before it."""
    with one_thread():
        alone = run(tmp_path / "alone", image_format=image_format)
    out, sessions = tmp_path / "killed", 0
    while status := wait(start(run_killed, out, image_format, after, sessions % 2 == 1)):
        assert status == -signal.SIGKILL
        sessions += 1
        assert sessions < 40
    assert sessions >= 2
    assert checksums(out) == checksums(alone)
    entries = json.loads((out / "provenance.json").read_text())["sessions"]
    assert entries[-1]["seconds"] > 0 and entries[0]["seconds"] is None


def test_two_runs_do_not_mix_and_a_dead_ones_lock_is_none(tmp_path):
    out = tmp_path / "run"
    process = start(run_slowly, out)
    try:
        deadline = time.monotonic() + 60
        while not (out / "provenance.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(ValueError, match=rf"in use by another run \(process {process.pid} on ") as refused:
            run(out)
        assert "\n" not in str(refused.value)
        with pytest.raises(ValueError, match="in use"):
            run(out, seed=5)
    finally:
        kill(process)
    run(out)
    assert read_manifest(out)["finished"]


def test_a_finished_run_stays_as_it_is(whole):
    before = checksums(whole["npz"])
    stamps = {path: path.stat().st_mtime_ns for path in (whole["npz"] / "shards").iterdir()}
    run(whole["npz"], image_format="npz")
    assert checksums(whole["npz"]) == before
    assert stamps == {path: path.stat().st_mtime_ns for path in (whole["npz"] / "shards").iterdir()}


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "record"])
@pytest.mark.parametrize("image_format", ["png", "npz"])
def test_damage_is_said_and_repaired(tmp_path, capsys, image_format, damage):
    out = run(tmp_path / "run", image_format=image_format, num_samples=4)
    before = checksums(out)
    broken = out / ("images/00000003.png" if image_format == "png" else "shards/00000002.npz")
    if damage == "record":
        broken = out / "batches/00000002.json"
    content = bytearray(broken.read_bytes())
    if damage == "gone":
        broken.unlink()
    else:
        content[len(content) // 2] ^= 255
        broken.write_bytes(content if damage == "flipped" else content[:-9])
    with pytest.raises(ValueError, match=str(broken)):
        list(read_batches(out))
    run(out, image_format=image_format, num_samples=4)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(broken) in said and "samples 2 to 3 are drawn again" in said
    assert checksums(out) == before


def test_other_settings_and_foreign_folders_are_refused(whole, tmp_path):
    before = checksums(whole["png"])
    for change, words in (
        ({"steps": 3}, "steps was 2 and is now 3"),
        ({"seed": 5}, "seed was 4 and is now 5"),
        ({"conditions": (3, 7)}, "conditions was"),
        ({"weight": "linear", "product": "jvp"}, "weight was .* and is now .*; product was"),
        ({"image_format": "npz"}, "image_format was"),
    ):
        with pytest.raises(ValueError, match=f"{whole['png']} holds a run with other settings .*{words}"):
            run(whole["png"], **change)
    retrained = tiny_dit()
    next(retrained.transformer.parameters()).data.flatten()[0] += 0.01
    with pytest.raises(ValueError, match="weights was"):
        sample(retrained, SETTINGS, whole["png"], progress=False)
    assert checksums(whole["png"]) == before
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'thesis.tex' and no sampling run"):
        run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be used"):
        run(tmp_path / "file")
    manifest = whole["npz"] / "manifest.json"
    stored = manifest.read_text()
    try:
        for content, words in (
            ("{", "damaged, it is not JSON"),
            (stored.replace('"seed": 4', '"seed": 5'), "checksum"),
        ):
            manifest.write_text(content)
            with pytest.raises(ValueError, match=words):
                run(whole["npz"], image_format="npz")
    finally:
        manifest.write_text(stored)


def test_a_full_disk_is_said_and_the_run_goes_on(tmp_path):
    out = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1900, hard))  # the manifest fits, a shard of 2 x 16 x 16 x 3 does not
    try:
        with pytest.raises(Unwritable, match=r"shards/00000000.npz cannot be written \(File too large\): make room"):
            run(out, image_format="npz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(out.rglob(".*.tmp"))
    run(out, image_format="npz")
    assert read_manifest(out)["finished"]


def test_a_picture_that_is_not_finite_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="sample 0 diverged"):
        run(tmp_path / "run", guidance_scale=1e300)
    assert not list((tmp_path / "run" / "images").iterdir())


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path, monkeypatch):
    pixels = np.zeros((8, 64, 64, 3), dtype=np.uint8)
    monkeypatch.setattr(runs, "draw", lambda pipe, settings, samples: (pixels[: len(samples)].copy(), 1.0))
    peaks = []
    for samples in (80, 80, 800):  # the first also fills caches
        tracemalloc.start()
        run(tmp_path / str(len(peaks)), num_samples=samples, batch_size=8, image_format="npz")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 2**17  # 720 pictures more are 8.4 MB


@pytest.mark.parametrize(
    ("changes", "nfe"),
    [
        ({"product": "none"}, 4),
        ({"product": "finite_difference"}, 6),
        ({"product": "vjp"}, 6),
        ({"product": "diagonal"}, 12),
        ({"product": "none", "guidance_scale": 1.0}, 2),
        ({"product": "jvp", "weight": "linear:0,1"}, 4),
    ],
)
def test_evaluations_are_counted(changes, nfe):
    pipe, rows = tiny_dit(), []
    settings = replace(SETTINGS, **changes)
    hook = pipe.transformer.pos_embed.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    counted = draw(pipe, settings, range(2))[1]
    hook.remove()
    assert counted == nfe
    if settings.product in ("none", "finite_difference"):  # nothing but forward passes
        assert sum(rows) / 2 == nfe


@given(st.integers(1, 200), st.integers(1, 60))
def test_batches_cover_every_sample_once(number, size):
    settings = SamplingSettings("m", num_samples=number, conditions=(0,), batch_size=size)
    assert [i for first in settings.batches() for i in settings.samples(first)] == list(range(number))


def test_settings_are_checked():
    for wrong in (
        {"num_samples": 0},
        {"batch_size": 2.5},
        {"steps": True},
        {"seed": -1},
        {"guidance_scale": float("nan")},
        {"weight": "up"},
        {"product": "hessian"},
        {"image_format": "gif"},
        {"conditions": ()},
    ):
        with pytest.raises(ValueError):
            replace(SETTINGS, **wrong)
    with pytest.raises(ValueError, match="unknown class"):
        check_sampling(tiny_dit(), replace(SETTINGS, conditions=(1, 1000)))
    with pytest.raises(ValueError, match="scheduler must be one of"):
        check_sampling(tiny_dit(), replace(SETTINGS, scheduler="HappyScheduler"))


def test_classes_of_a_pipeline_of_pixels():
    pipe = scene_adm()
    assert conditions_for(pipe) == tuple(range(10)) and conditions_for(pipe, classes="star, 0") == (3, 0)
    with pytest.raises(ValueError, match="unknown class 'cat': the model draws circle"):
        conditions_for(pipe, classes="cat")
    with pytest.raises(ValueError, match="unknown class '10': the model draws circle"):
        check_sampling(pipe, replace(SETTINGS, conditions=(1, 10)))
    assert "classifier_scale" not in model_defaults("adm", pipe)["call"]
    pipe.register_modules(classifier=None)
    own = model_defaults("adm", pipe)
    assert own["call"] == {"classifier_scale": 0.0} and own["steps"] == 250 and own["guidance_scale"] == 1
    pixels, nfe = draw(
        pipe, SamplingSettings("adm", 2, (1, 2), steps=2, guidance_scale=2.0, call=own["call"]), range(2)
    )
    assert pixels.shape == (2, 32, 32, 3) and nfe == 6


def test_prompts_and_classes(tmp_path):
    pipe = tiny_dit()
    assert conditions_for(pipe)[:3] == (0, 1, 2) and conditions_for(pipe, classes="3, 7") == (3, 7)
    with pytest.raises(ValueError, match="prompts must be left out"):
        conditions_for(pipe, prompts=tmp_path / "p.txt")
    file = tmp_path / "p.txt"
    file.write_text("a star\na ring\n")
    assert read_prompts(file) == ("a star", "a ring")
    file.write_text("a star\n\na ring\n")
    with pytest.raises(ValueError, match=r"p\.txt, line 2, is empty"):
        read_prompts(file)
    file.write_bytes(b"a star\na \xff ring\n")
    with pytest.raises(ValueError, match=r"p\.txt, line 2, is not UTF-8"):
        read_prompts(file)
    with pytest.raises(ValueError, match="cannot be opened: No such file"):
        read_prompts(tmp_path / "q.txt")
    coco = tmp_path / "captions.json"
    images = [{"id": 2, "file_name": "2.jpg"}, {"id": 1, "file_name": "1.jpg"}]
    said = [{"id": 9, "image_id": 1, "caption": "late"}, {"id": 3, "image_id": 2, "caption": "two "},
            {"id": 5, "image_id": 1, "caption": "one"}]  # fmt: skip
    coco.write_text(json.dumps({"images": images, "annotations": said}))
    assert read_prompts(coco) == ("one", "two")
    for described, words in (
        ({"images": images, "annotations": said[:1]}, r"no caption of image 2 \(2\.jpg\)"),
        ({"images": images[:1], "annotations": said}, "a caption of image 1, which it does not list"),
        ({"pictures": images}, "is not of COCO's form"),
    ):
        coco.write_text(json.dumps(described))
        with pytest.raises(ValueError, match=words):
            read_prompts(coco)
    coco.write_text('{"images":\n[,]}')
    with pytest.raises(ValueError, match="line 2, is damaged, it is not JSON"):
        read_prompts(coco)


def test_prompts_reach_the_pictures(tmp_path):
    pipe = captioned_sd(tmp_path / "words")
    settings = SamplingSettings("sd", 3, ("a star", "a ring"), batch_size=2, steps=2, guidance_scale=3.0)
    out = sample(pipe, settings, tmp_path / "run", progress=False)
    (images, said), (last, more) = read_batches(out)
    assert said == ["a star", "a ring"] and more == ["a star"] and len(last) == 1
    assert not np.array_equal(images[0], images[1])
    assert read_manifest(out)["nfe"] == 6


def test_the_command_line(tmp_path, capsys):
    folder = save_scene_dit(tmp_path / "model")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = ["--model", str(folder), "--num-samples", "3", "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main(parser.parse_args([*given, "--steps", "2", "--classes", "star,3", "--format", "npz"])) == 0
    printed = capsys.readouterr()
    assert printed.out == f"written: {tmp_path / 'run'}\n"
    assert "3/3" in printed.err and "image/s" in printed.err
    settings = read_manifest(tmp_path / "run")["settings"]
    assert (settings["guidance_scale"], settings["steps"], settings["scheduler"]) == (4.0, 2, "DDIMScheduler")
    assert settings["weights"] == weights_fingerprint(load(folder))
    assert main(parser.parse_args([*given, "--steps", "3", "--classes", "star,3", "--format", "npz"])) == 2
    before, error, refused = capsys.readouterr().err.partition("error: ")  # diffusers' loading bar, if it was drawn
    assert error and "Traceback" not in before and "steps was 2 and is now 3" in refused and refused.count("\n") == 1
    assert command_line(["sample", *given, "--classes", "unicorn"]) == 2
    assert "unknown class 'unicorn'" in capsys.readouterr().err
    options = parser.parse_args([*given, "--scheduler", "UniPCMultistepScheduler", "--weight", "power-cosine:4"])
    assert settings_from(options, load(folder)).steps == 50


def test_a_run_begins_while_no_process_of_another_is_alive(tmp_path):
    main, worker = Lock(tmp_path), Lock(tmp_path, 1)
    with pytest.raises(ValueError, match="in use by another run; wait"):
        Lock(tmp_path)
    with pytest.raises(ValueError, match="in use"):
        Lock(tmp_path, 1)
    main.release()
    with pytest.raises(ValueError, match="in use"):  # its worker still draws
        Lock(tmp_path)
    worker.release()
    last = Lock(tmp_path)
    assert begin(tmp_path, SETTINGS.identity(tiny_dit()), SETTINGS).missing == tuple(range(0, 11, 2))
    last.release()
    lock = next(tmp_path.glob(".lock*"), tmp_path / ".lock")
    lock.unlink(missing_ok=True)
    os.mkfifo(lock)
    with pytest.raises(ValueError, match="is not a regular file"):
        Lock(tmp_path)


def test_every_weight_counts_and_is_read_once(monkeypatch):
    pipe = tiny_dit()
    known = weights_fingerprint(pipe)
    hashed = []
    monkeypatch.setattr(sampling_settings.hashlib, "sha256", lambda *given: hashed.append(1) or hashlib.new("sha256"))
    assert weights_fingerprint(pipe) == known and not hashed
    weight = max(pipe.transformer.parameters(), key=torch.numel)
    with torch.no_grad():
        weight.view(-1)[weight.numel() // 2] += 1e-3  # neither end of it
    changed = weights_fingerprint(pipe)
    assert hashed and changed != known
    weight.data = weight.data.clone()
    assert weights_fingerprint(pipe) == changed and weights_fingerprint(tiny_dit()) == known


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("nfe"),
        lambda record: record.update(nfe="four"),
        lambda record: record.update(nfe=0),
        lambda record: record["files"].popitem(),
        lambda record: record.update(conditions=[5, 5]),
        lambda record: record.update(files={"../../manifest.json": "0"}),
    ],
)
def test_a_record_that_does_not_describe_its_batch_is_no_whole_batch(tmp_path, capsys, change):
    out = run(tmp_path / "run", num_samples=4)
    before, path = checksums(out), out / "batches" / "00000002.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    run(out, num_samples=4)
    assert "samples 2 to 3 are drawn again" in capsys.readouterr().err
    assert checksums(out) == before


@pytest.mark.parametrize("name", ["num_samples", "batch_size", "steps"])
def test_absurd_numbers_are_refused_before_memory_is_filled(name):
    with pytest.raises(ValueError, match=rf"{name} must be an integer from 1 to [0-9,]+, got 1000000000"):
        replace(SETTINGS, **{name: 10**9})


def test_names_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not UTF-8"):
        run(tmp_path / os.fsdecode(b"run-\xff"))
    with pytest.raises(ValueError, match="longer than a file's can be"):
        run(tmp_path / ("x" * 300))


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes(b"\xef\xbb\xbfa star\na ring\n")
    assert read_prompts(file) == ("a star", "a ring")
    file = tmp_path / "p.json"
    described = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "a"}]}
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(described).encode())
    assert read_prompts(file) == ("a",)
