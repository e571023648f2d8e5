"""Malformed values, files and folders at every entry point: a refusal in one sentence, or a sound result, and no more.

Everything is tried in a process of its own under limits of time and memory: see `hostile_server`.
"""

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from companion.evaluation.sampling.runs import sample
from companion.evaluation.sampling.settings import SamplingSettings
from companion.evaluation.tables.results import Cell, Figure, write_cell, write_cells
from companion.provenance import provenance
from companion.ranking.ranking import Ranking
from companion.ranking.rules.catalogue import RULES
from companion.ranking.suite import QUICK, measure_suite
from companion.ranking.suites import suite_problems
from tests.fork_server import fork_server
from tests.hostile_server import MEMORY, serve
from tests.networks.test_edm2 import tiny_unet
from tests.pipelines.adm.test_checkpoint import published_unet
from tests.pipelines.adm.test_pipeline import tiny_adm, tiny_resnet
from tests.pipelines.edm2.test_checkpoint import name_published_modules, published
from tests.pipelines.edm2.test_pipeline import tiny_edm2
from tests.pipelines.tiny import tiny_dit

ROOT = Path(__file__).parents[1]
SECONDS = 5  # of the processor for one request
PATIENCE = 60  # of the clock, on a machine that does other things as well


class Server:
    """The child, started once, and anew where a request killed it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start()

    def start(self) -> None:
        context = fork_server()
        self.link, others = context.Pipe()
        self.process = context.Process(target=serve, args=(others, self.folder), daemon=True)
        self.process.start()
        others.close()
        assert self.link.recv() == "ready"

    def stop(self) -> None:
        self.link.close()
        self.process.kill()
        self.process.join()

    def ask(self, entry: str, *given: Any, **named: Any) -> tuple[str, str]:
        """Outcome and message, which was within all limits."""
        self.link.send((entry, given, named))
        answers = self.link.poll(PATIENCE)
        try:
            if not answers:
                raise EOFError
            outcome, message, seconds, grown = self.link.recv()
        except EOFError:
            self.stop()
            ending = f"ended with {self.process.exitcode}" if answers else "no answer"
            self.start()
            raise AssertionError(f"{entry} {given} {named}: {ending}") from None
        asked = f"{entry} {given!r:.300} {named!r:.300}"
        assert outcome != "raised", f"{asked}\n{message}"
        assert seconds < SECONDS and grown < MEMORY, f"{asked}: {seconds:.1f} s, {grown >> 20} MiB"
        if outcome == "refused":
            assert message and "\n" not in message and "\x1b" not in message and len(message) < 2000, (asked, message)
            message.encode()
        return outcome, message


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder with one sound file or folder for every reader."""
    folder = tmp_path_factory.mktemp("good")
    torch.save(dict(published_unet()), folder / "adm.pt")
    with pytest.MonkeyPatch.context() as patch:
        name_published_modules(patch)
        (folder / "edm2.pkl").write_bytes(pickle.dumps(published(tiny_unet(0, torch.float32)), protocol=4))
    arrays = {"mu": np.zeros(3), "sigma": np.eye(3)}
    np.savez(folder / "statistics.npz", **arrays)
    (folder / "statistics.pkl").write_bytes(pickle.dumps({"fid": arrays}, 4))
    np.savez_compressed(folder / "pictures.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    (folder / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), (9, 99, 199)).save(folder / "pictures" / name)
    (folder / "pictures" / "captions.txt").write_text("a.png\ta star\nb.png\ta ring\n")
    coco = {
        "images": [{"id": i, "file_name": f"{'ab'[i]}.png"} for i in range(2)],
        "annotations": [{"id": i, "image_id": i, "caption": "a star"} for i in range(2)],
    }
    (folder / "pictures" / "captions.json").write_text(json.dumps(coco))
    (folder / "prompts.txt").write_text("a star\na ring\n")
    write_cells(folder / "cells.json", [Cell("a", {"steps": 2}, {"fid": Figure(1.0, 0.5, 1.5, "t", 3)}, 4.0, 1.0)])
    (folder / "table" / "cells").mkdir(parents=True)
    write_cell(folder / "table" / "cells", Cell("a", {"steps": 2}, {"fid": Figure(1.0, 0.5, 1.5, "t", 3)}, 4.0, 1.0))
    measured = measure_suite(suite_problems("quick")[:1], [RULES["none"], RULES["CFG"]], QUICK, folder=folder / "rank")
    Ranking(measured, provenance() | {"suite": "quick"}).save(folder / "ranking.json")
    tiny_dit(dtype=torch.float32).save_pretrained(folder / "dit")
    tiny_edm2(torch.float32).save_pretrained(folder / "edm2")
    tiny_adm("resnet", torch.float32).save_pretrained(folder / "adm")
    tiny_resnet().save_pretrained(folder / "resnet")
    run = SamplingSettings("tiny", 3, (1, 2), batch_size=2, steps=1, image_format="png")
    sample(tiny_dit(), run, folder / "run", progress=False)
    return folder


READERS = {
    "adm.pt": "adm checkpoint",
    "edm2.pkl": "edm2 checkpoint",
    "statistics.npz": "statistics",
    "statistics.pkl": "statistics",
    "pictures.npz": "pictures",
    "pictures/captions.txt": "captions",
    "pictures/captions.json": "captions",
    "prompts.txt": "prompts",
    "cells.json": "cells",
    "ranking.json": "ranking",
}
FOLDERS = {"dit": "load", "edm2": "load_edm2", "adm": "load_adm", "resnet": "classifier", "run": "run"}
FOLDERS |= {"table": "table", "rank": "ranking folder"}

NASTY: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 10**7, 10**9, 10**400, -(10**9), 0.5, 1e308, math.nan, math.inf, -math.inf),
    *("", "x", "x" * 5000, "a\x00b", "\x1b[31mred", "\ud800", "../../..", "\n\n"),
    *([], {}, [None], [[[]]], {"a": {}}, [0], [-1, 10**9], ["x", "y"]),
)
NESTED = b"[" * 200_000


def fewer(examples: int) -> Callable:
    """So many examples, the same in every run, so that a commit's result does not depend on luck."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=checks)


edits = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "end"]), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=4,
)
whole = st.sampled_from(
    [b"", b"\x00", b"\xff\xfe", b"{", b"[]", b"null", NESTED, b"<html>", b"PK\x03\x04", b"\x80\x04."]
)


def edited(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    held = bytearray(content)
    for kind, place, given_bytes in changes:
        at = int(place * len(held))
        if kind == "end":
            del held[at:]
        elif kind == "insert":
            held[at:at] = given_bytes
        else:
            held[at : at + len(given_bytes)] = given_bytes if kind == "flip" else b""
    return bytes(held)


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))


def spoiled(value: Any, path: tuple, nasty: Any) -> Any:
    if not path:
        return nasty
    value[path[0]] = spoiled(value[path[0]], path[1:], nasty)
    return value


@fewer(120)
@given(data=st.data())
def test_files(server, good, tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(READERS)))
    source = good / name
    place = good / f"{source.parent.name}-tried" if source.parent != good else good / "tried"
    if not place.exists():
        shutil.copytree(source.parent, place) if source.parent != good else place.mkdir()
    file = place / source.name
    if source.suffix == ".json" and data.draw(st.booleans()):
        held = json.loads(source.read_text())
        held = spoiled(held, data.draw(st.sampled_from(list(leaves(held)))), data.draw(st.sampled_from(NASTY)))
        content = json.dumps(held).encode()
    else:
        content = data.draw(whole | edits.map(lambda changes: edited(source.read_bytes(), changes)))
    file.write_bytes(content)
    server.ask(READERS[name], str(file))


@fewer(100)
@given(data=st.data())
def test_folders(server, good, data):
    """One file of a saved model or a run: damaged, gone, or something else than a file."""
    name = data.draw(st.sampled_from(sorted(FOLDERS)))
    file = data.draw(st.sampled_from(sorted(path for path in (good / name).rglob("*") if path.is_file())))
    before = file.read_bytes()
    kind = data.draw(st.sampled_from(["value", "value", "bytes", "bytes", "gone", "pipe", "folder", "loop"]))
    try:
        if kind == "value" and file.suffix == ".json":
            held = json.loads(before)
            held = spoiled(held, data.draw(st.sampled_from(list(leaves(held)))), data.draw(st.sampled_from(NASTY)))
            file.write_text(json.dumps(held))
        elif kind in ("value", "bytes"):
            file.write_bytes(data.draw(whole | edits.map(lambda changes: edited(before, changes))))
        else:
            file.unlink()
            if kind == "pipe":
                os.mkfifo(file)
            elif kind == "folder":
                file.mkdir()
            elif kind == "loop":
                file.symlink_to(file)
        server.ask(FOLDERS[name], str(good / name))
    finally:
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
        file.write_bytes(before)


def test_sound_ones_are_accepted(server, good):
    for name, entry in {**READERS, **FOLDERS}.items():
        assert server.ask(entry, str(good / name)) == ("accepted", ""), name


def integer(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def number(least: float = -math.inf, most: float = math.inf) -> Callable[[Any], bool]:
    def sound(value: Any) -> bool:
        try:
            return type(value) in (int, float) and math.isfinite(value) and least <= value <= most
        except OverflowError:
            return False

    return sound


def one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(value is known or (type(value) is type(known) and value == known) for known in values)


def anything(value: Any) -> bool:
    return True


# What each argument may be; an argument that is accepted with anything else was accepted in silence.
SOUND: dict[str, dict[str, Callable[[Any], bool]]] = {
    "settings": {
        "num_samples": integer(1, 10**7),
        "batch_size": integer(1, 10**5),
        "steps": integer(1, 1000),
        "seed": integer(0, 10**400),
        "guidance_scale": number(),
        "image_format": one_of("png", "npz"),
        "product": one_of("none", "finite_difference"),
    },
    "architecture": {
        "image_size": integer(1, 1 << 16),
        "model_channels": integer(1, 1 << 16),
        "layers": integer(1, 1 << 16),
        "head_channels": integer(1, 1 << 16),
        "in_channels": integer(1, 1 << 16),
        "channel_mult": one_of(),
    },
    "edm2": {
        "class_labels": one_of(3, 0, [0]),
        "num_inference_steps": integer(1, 10_000),
        "guidance_scale": number(),
        "guidance_interval": one_of(None),
        "guidance_reference": one_of(None, "guide", "null_label"),
        "sigma_min": number(0, 80),
        "sigma_max": number(0.002),
        "rho": number(0),
        "s_churn": number(0),
        "s_min": lambda value: value is not None,
        "s_max": lambda value: value is not None,
        "s_noise": number(0),
        "output_type": one_of("latent"),
        "latents": one_of(None),
    },
    "adm": {
        "class_labels": one_of(3, 0, [0]),
        "num_inference_steps": integer(1, 1000),
        "sampler": one_of("ddpm", "ddim"),
        "eta": number(0, 1),
        "classifier_scale": number(),
        "score": one_of(),
        "gradient_at": one_of(None, "noisy", "clean"),
        "gamma": number(0),
        "tilt": number(),
        "softplus_beta": lambda value: value is None or number(0)(value),
        "guidance_scale": number(1, 1),
        "output_type": one_of("pil", "np", "pt", "latent"),
        "latents": one_of(None),
    },
}


@fewer(150)
@given(data=st.data())
def test_values(server, data):
    entry = data.draw(st.sampled_from(sorted(SOUND)))
    name = data.draw(st.sampled_from(sorted(SOUND[entry])))
    value = data.draw(st.sampled_from(NASTY))
    outcome, _ = server.ask(entry, **{name: value})
    assert outcome == "refused" or SOUND[entry][name](value), f"{entry} accepts {name}={value!r}"


@fewer(60)
@given(
    entry=st.sampled_from(["device", "dtype", "weight", "load"]), value=st.sampled_from(NASTY) | st.text(max_size=20)
)
def test_names(server, entry, value):
    if entry == "weight" and not isinstance(value, str):
        return
    outcome, _ = server.ask(entry, value)
    known = {"device": (0,), "dtype": (None,), "weight": ("constant", "linear", "power-cosine"), "load": ()}
    assert outcome == "refused" or any(value is name or value == name for name in known[entry])


CONFIGURED: dict[str, dict[str, Callable[[Any], bool]]] = {
    "config": {
        "product": one_of(),
        "weight": lambda value: value is None or number()(value),
        "probes": lambda value: value is None or integer(1, 10**400)(value),
        "seed": integer(0, 10**400),
        "relative_step": lambda value: value is None or number(0, 1000)(value),
        "guide": one_of(None),
        "method": one_of(),
        "every": integer(1, 10**400),
        "skip": lambda value: value is None or number(0, 1)(value),
        "cost": lambda value: value is None or number(0.5)(value),
        "include_controlnet": one_of(True),
        "one_pass": one_of(True),
    },
    "guider": {
        "guider": one_of(None),
        "guider._class_name": one_of(),
        "guider.guidance_scale": lambda value: value is None or number()(value),
        "guider.use_original_formulation": one_of(None, True),
        "guider.start": number(0, 1),
        "scheduler": one_of(None),
        "scheduler._class_name": one_of(),
        "scheduler.num_train_timesteps": integer(1, 10**6),
        "scheduler.beta_start": lambda value: value is None or number()(value),
        "scheduler.beta_schedule": one_of(),
        "scheduler.trained_betas": one_of(None, [0]),
        "scheduler.clip_sample": one_of(None, True),
        "product": one_of(),
        "weight": lambda value: value is None or number()(value),
        "start": number(0, 1),
        "stop": number(0, 1),
        "enabled": one_of(True),
        "guidance_scale": lambda value: value is None or number()(value),
        "every": integer(1, 10**400),
    },
    "explored": {
        "problem": one_of(),
        "rule": one_of(),
        "weight": number(0, 4),
        "noise_level": number(0, 1),
        "steps": integer(2, 1000),
    },
}


@pytest.mark.parametrize("entry", CONFIGURED)
def test_settings(server, entry):
    """Every setting with every nasty value: of a configuration, a guider's saved settings, the tab *Explore*."""
    for name, sound in CONFIGURED[entry].items():
        for value in NASTY:
            outcome, message = server.ask(entry, **{name: value})
            assert outcome == "refused" or sound(value), f"{entry} accepts {name}={value!r}"
            assert len(message) < 1200, message  # some list the names that are known


def test_settings_of_a_weight(server):
    for value in NASTY:
        assert server.ask("weight settings", value)[0] == "refused", value
        assert server.ask("weight settings", {"type": value})[0] == "refused", value
        server.ask("weight settings", {"type": "LinearWeight", "first": value, "along": value})
    assert server.ask("weight settings", depth=3)[0] == "accepted"
    assert server.ask("weight settings", depth=5000)[0] == "refused"


OPTIONS = ("--steps", "--num-samples", "--batch-size", "--seed", "--guidance-scale", "--weight", "--product")
OPTIONS += (
    "--scheduler",
    "--classes",
    "--prompts",
    "--format",
    "--device",
    "--dtype",
    "--reference",
    "--out",
    "--model",
)


@fewer(40)
@given(option=st.sampled_from(OPTIONS), value=st.sampled_from([str(value) for value in NASTY if value != 10**400]))
def test_the_command_line(server, good, tmp_path_factory, option, value):
    assume((option, value) != ("--num-samples", str(10**7)))  # would be drawn
    given_options = {
        "--model": str(good / "dit"),
        "--num-samples": "2",
        "--steps": "1",
        "--device": "cpu",
        "--out": str(tmp_path_factory.mktemp("out")),
        option: value.replace("\x00", ""),
    }
    server.ask("command", "sample", *(part for pair in given_options.items() for part in pair))


TABLE_OPTIONS = ("name", "--profile", "--data", "--out", "--only", "--models", "--collect", "--num-samples", "--runs")
TABLE_OPTIONS += (
    "--batch-size",
    "--seeds",
    "--device",
    "--dtype",
    "--source",
    "--strength",
    "--smoothing",
    "--entropy",
)
RANK_OPTIONS = ("--rule", "--suite", "--against", "--read", "--out", "--docs", "--folder")
TYPED = tuple(str(value).replace("\x00", "") for value in NASTY if value != 10**400)


@fewer(30)
@given(option=st.sampled_from(TABLE_OPTIONS), value=st.sampled_from(TYPED), listed=st.booleans())
def test_the_command_table(server, good, option, value, listed):
    """Only listed, or with time for no cell: what is refused is refused before anything is drawn."""
    given_options = {"--out": str(good / "table"), "--limit-minutes": "0", option: value}
    name = given_options.pop("name", "variants")
    end = ["--list"] if listed else ["--resume"]
    server.ask("command", "table", name, *(part for pair in given_options.items() for part in pair), *end)


@fewer(20)
@given(option=st.sampled_from(RANK_OPTIONS), value=st.sampled_from(TYPED))
def test_the_command_rank(server, good, option, value):
    given_options = {"--read": str(good / "ranking.json"), option: value}
    if option in ("--rule", "--suite", "--against", "--folder"):
        given_options = {"--rule": "absent:rule", option: value}  # refused before anything is measured
    if option in ("--out", "--docs"):
        given_options[option] = f"{good}/written/{value}"
    outcome, _ = server.ask("command", "rank", *(part for pair in given_options.items() for part in pair))
    assert outcome == "refused" or option in ("--out", "--docs")


PAGE: dict[str, dict[str, Callable[[Any], bool]]] = {
    "guidance": {
        "guidance_scale": number(1, 30),
        "product": one_of(),
        "schedule": one_of(),
        "linear_first": number(-10, 10),
        "linear_last": number(-10, 10),
        "power": number(0.01, 100),
        "peak": number(-10, 10),
        "interval_low": number(0, 502),
        "interval_high": number(205, 1000),
    },
    "sweep": {"scales": one_of(), "product": one_of()},
    "classifier": {
        "divergence": one_of(),
        "strength": number(0, 1000),
        "smoothing": number(0, 1),
        "joint_temperature": number(0.01, 100),
        "marginal_temperature": number(0.01, 100),
        "tilt": number(-100, 100),
        "classifier_scale": number(0, 1000),
        "gradient_at": one_of(),
        "product": one_of(),
        "sampler": one_of(),
        "compared": one_of(),
        "conditional": one_of(True),
        "classifier": one_of(None, "", "\n\n"),
    },
}
EVERYWHERE: dict[str, Callable[[Any], bool]] = {
    "model": one_of(),
    "classes": one_of(3, 0, [0]),
    "prompts": anything,  # of models that take classes
    "steps": integer(1, 1000),
    "pictures": integer(1, 16),
    "seed": integer(0, 2**32 - 1),
}
SCHEDULES = {  # the control that a number belongs to
    "linear_first": "linear",
    "linear_last": "linear",
    "power": "power-cosine",
    "peak": "power-cosine",
    "interval_low": "interval",
    "interval_high": "interval",
}


@fewer(150)
@given(data=st.data())
def test_the_page(server, data):
    """Every control of every tab, as a program may send it."""
    tab = data.draw(st.sampled_from(sorted(PAGE)))
    sound = PAGE[tab] | EVERYWHERE
    if tab != "classifier":
        sound["scheduler"] = one_of(None, "", "\n\n")
    name, value = data.draw(st.sampled_from(sorted(sound))), data.draw(st.sampled_from(NASTY))
    controls = {"schedule": SCHEDULES[name]} if name in SCHEDULES else {}
    if name in ("strength", "smoothing"):
        controls["divergence"] = "jensen_shannon"
    outcome, _ = server.ask("pressed", tab, **controls, **{name: value})
    assert outcome == "refused" or sound[name](value), f"the tab {tab} accepts {name}={value!r}"


@pytest.mark.parametrize("entry", sorted({*READERS.values(), *FOLDERS.values()} - {"table", "ranking folder"}))
def test_places_that_are_no_files(server, tmp_path, entry):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / os.fsdecode(b"\xff")).mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "empty").mkdir()
    for name in ("pipe", os.fsdecode(b"\xff"), "loop", "empty", "absent", "x" * 300, "a\x00b"):
        assert server.ask(entry, str(tmp_path / name))[0] == "refused", name
    assert server.ask(entry, "/dev/zero")[0] == "refused"
    assert entry == "pictures" or server.ask(entry, "")[0] == "refused"  # of these, "" is where the server is
