"""The demo through its API and on the terminal; the page itself is driven in test_browser.py.

That the command serves until it is interrupted is tested where it runs anyway, in test_hostile_requests.py.
"""

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

import demo
from companion.evaluation.comparison.side_by_side import Settings, compare
from companion.evaluation.comparison.streaming import THREAD
from companion.guidance.weights import IntervalWeight
from companion.minis.scenes import SHAPES, render, scene
from companion.page import Models, build_page, serve
from companion.page.guidance_tab import read
from companion.page.models import _check_arguments, scene_distances
from companion.pipelines.registry import load
from companion.pixels import to_uint8
from tests.evaluation.sampling.separate_processes import run_script, start, wait
from tests.evaluation.scene_pipelines import captioned_sd, save_scene_dit

ROOT = Path(__file__).parents[2]
OUTPUTS = ("without", "with_reg", "report", "script", "status")
PATIENCE = 120  # seconds, for what takes a few


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_scene_dit(tmp_path_factory.mktemp("pipelines") / "scenes")


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Any]:
    models = Models(str(folder), load(folder))
    models.distances = None
    models.evaluator = lambda images: torch.nn.functional.one_hot(torch.full((len(images),), 4), len(SHAPES)).float()
    page = serve(models, host="127.0.0.1", port=free_port())
    page.models = models
    yield page
    page.close(verbose=False)


@pytest.fixture
def client(server) -> Client:
    return Client(server.local_url, verbose=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def generate(client: Client, **chosen: Any) -> dict[str, Any]:
    asked = {"classes": ["star", "heart"], "steps": 4, "pictures": 2} | chosen
    made = client.submit(**asked, api_name="/generate").result(timeout=PATIENCE)
    return dict(zip(OUTPUTS, made, strict=False))


def pixels(gallery: list[dict[str, Any]]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(shown["image"])) for shown in gallery])


def test_both_sides_are_what_the_library_makes(client, folder):
    made = generate(
        client,
        pictures=3,
        guidance_scale=3.5,
        schedule="interval",
        interval_low=100,
        interval_high=800,
        product="vjp",
        scheduler="DEISMultistepScheduler",
        steps=5,
        seed=7,
    )
    settings = Settings(
        [3, 4, 3], 3.5, IntervalWeight(100.0, 800.0, unit="timestep"), "vjp", "DEISMultistepScheduler", 5, 7
    )
    expected = compare(load(folder), settings)
    for name, view in (("without", expected.without), ("with_reg", expected.with_reg)):
        np.testing.assert_array_equal(pixels(made[name]), np.stack([np.asarray(image) for image in view.side.images]))
        assert made["report"][name]["seconds"] > 0 and made["report"][name]["peak_mebibytes"] > 0
        assert made["report"][name]["recognised"] == 1  # the classifier here sees hearts only
        assert [shown["caption"][0] for shown in made[name]] == ["✗", "✓", "✗"]


def test_the_distance_from_valid_scenes_is_measured_on_both_sides(server, client, monkeypatch):
    """By the renderer, of the very pictures that are shown; a drawn scene has none."""
    drawn = to_uint8(render([scene(0, i, 1) for i in range(2)]))
    real = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in drawn]
    assert max(scene_distances(real)) < 0.01  # rounding to bytes
    asked: list[np.ndarray] = []

    def distances(images):
        asked.append(np.stack([np.asarray(image) for image in images]))
        return [0.2, 0.4, 0.1, 0.2]

    monkeypatch.setattr(server.models, "distances", distances)
    job = client.submit(classes=["star", "heart"], steps=3, pictures=2, api_name="/generate")
    made = dict(zip(OUTPUTS, job.result(timeout=PATIENCE), strict=False))
    assert [made["report"][side]["scene_distance"] for side in ("without", "with_reg")] == pytest.approx([0.3, 0.15])
    [both] = asked
    np.testing.assert_array_equal(both, np.concatenate([pixels(made[side]) for side in ("without", "with_reg")]))
    assert any("Measuring the distance from valid scenes" in said for said in statuses(job))


def test_pictures_do_not_stay_on_the_disk_for_ever(server, client):
    assert server.delete_cache == (3600, 3600)
    generate(client, seed=77)
    files = set().union(*server.temp_file_sets)  # what Gradio deletes when it is old
    assert len([file for file in files if file.endswith(".png") and Path(file).is_file()]) >= 4


def test_a_pipeline_that_needs_more_than_prompts_is_refused():
    class Inpainting:
        def __call__(self, prompt=None, image=None, mask_image=None, guidance_scale=7.5):
            raise AssertionError("never called")

    class Control:
        def __call__(self, prompt, control_scale, guidance_scale=7.5):
            raise AssertionError("never called")

    for kind, needs in ((Inpainting, "Inpainting needs image"), (Control, "Control needs control_scale")):
        with pytest.raises(ValueError, match=f"{needs}, which this page cannot give"):
            _check_arguments(kind())
    for kind in (StableDiffusionPipeline, DiTPipeline, StableDiffusion3Pipeline, FluxPipeline):
        _check_arguments(kind.__new__(kind))


@pytest.mark.slow
def test_the_script_makes_the_same_pictures_in_a_process_of_its_own(client, tmp_path):
    made = generate(client, schedule="power-cosine", power=2, peak=1.5, scheduler="UniPCMultistepScheduler", seed=3)
    (tmp_path / "run.py").write_text(made["script"])
    assert wait(start(run_script, tmp_path / "run.py", torch.get_num_threads())) == 0
    for name, side in (("without", "without"), ("with_reg", "with")):
        again = np.stack([np.asarray(Image.open(tmp_path / f"{side}-{index}.png")) for index in range(2)])
        np.testing.assert_array_equal(again, pixels(made[name]))


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, got 0"),
        ({"steps": 1_000_000}, "steps must be a whole number from 1 to 1000, got 1000000"),
        ({"steps": None}, "steps must be a whole number from 1 to 1000, got nothing"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"guidance_scale": "strong"}, "guidance scale must be a number from 1 to 30, got 'strong'"),
        ({"guidance_scale": 0.5}, "guidance scale must be a number from 1 to 30, got 0.5"),
        ({"schedule": "linear", "linear_last": "much"}, "last weight must be a number from -10 to 10, got 'much'"),
        ({"schedule": "interval", "interval_low": 600, "interval_high": 500}, "low must not exceed high"),
        ({"schedule": "sudden"}, "schedule must be one of constant, linear"),
        ({"classes": ["dragon"]}, "unknown class 'dragon': the model draws circle, square"),
        ({"classes": ["<b>dragon</b>"]}, "unknown class '&lt;b&gt;dragon"),
        ({"classes": []}, "say what to draw"),
        ({"classes": list(SHAPES), "pictures": 2}, "10 classes or prompts do not fit in 2 pictures"),
        ({"pictures": 17}, "pictures must be a whole number from 1 to 16"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": "9" * 500}, "seed must be a whole number"),
        ({"seed": [1]}, "seed must be a whole number from 0 to 4294967295, got [1]"),
        ({"steps": {"at": 1}}, "steps must be a whole number from 1 to 1000, got {"),
        ({"steps": True}, "steps must be a whole number from 1 to 1000, got True"),
        ({"guidance_scale": [4]}, "guidance scale must be a number from 1 to 30, got [4]"),
        ({"schedule": ["linear"]}, "schedule must be one of constant, linear"),
        ({"classes": {"star": 1}}, "classes must be a list of names or numbers, got {"),
        ({"classes": [["star"]]}, "classes must be a list of names or numbers, got [["),
        ({"classes": [True]}, "classes must be a list of names or numbers, got [True]"),
        ({"classes": [3.5]}, "classes must be a list of names or numbers, got [3.5]"),
        ({"product": ["vjp"]}, "product must be one of"),
        ({"product": {"vjp": 1}}, "product must be one of"),
        ({"scheduler": ["DDIMScheduler"]}, "scheduler must be a text, got ["),
        ({"scheduler": 5}, "scheduler must be a text, got 5"),
        ({"model": {"name": "mini-sd"}}, "model must be a text, got {"),
        ({"model": ["mini-sd"]}, "model must be a text, got ["),
        ({"model": "mini\0sd"}, "model must not hold control characters"),
        ({"model": "m" * 5000}, "model must have at most 500 characters, got 5000"),
        ({"model": "m" * 400}, "has a name of 400 characters, longer than a file's can be"),
        ({"product": "mean"}, "product must be one of"),
        ({"scheduler": "EulerDiscreteScheduler"}, "scheduler must be one of DDIMScheduler"),
        ({"model": "mini-dot"}, "model 'mini-dot' is not known"),
        ({"model": "/nowhere/at/all"}, "is not known"),
        ({"model": str(ROOT / "tests")}, "holds no diffusers pipeline"),
        ({"model": ""}, "choose a model"),
    ],
)
def test_bad_input_gets_one_sentence(client, chosen, sentence):
    began = time.monotonic()
    with pytest.raises(AppError) as caught:
        generate(client, **chosen)
    assert time.monotonic() - began < 5
    said = str(caught.value)
    assert sentence in said and "\n" not in said and "Traceback" not in said


def test_an_error_in_the_sampling_names_what_was_sampled(client, monkeypatch):
    def broken(*arguments, **options):
        raise TypeError("unsupported operand\nwith a second line")

    monkeypatch.setattr("companion.evaluation.comparison.side_by_side._call", broken)
    with pytest.raises(AppError) as caught:
        generate(client, product="vjp", scheduler="DEISMultistepScheduler", steps=6, seed=9)
    said = str(caught.value)
    assert "product vjp, scheduler DEISMultistepScheduler, steps 6, pictures 2, seed 9: unsupported operand" in said
    assert "TypeError" not in said and "second line" not in said


def test_a_hub_name_without_a_network(client, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(AppError, match="no connection"):
        generate(client, model="owner/model")
    assert time.monotonic() - began < 5
    assert len(generate(client)["with_reg"]) == 2  # and the demo goes on


def test_two_visitors_at_once_both_get_their_pictures(server):
    visitors = [Client(server.local_url, verbose=False) for _ in range(2)]
    alone = [pixels(generate(visitors[0], seed=seed)["with_reg"]) for seed in (1, 2)]
    jobs = [
        visitor.submit(classes=["star", "heart"], steps=4, pictures=2, seed=seed, api_name="/generate")
        for seed, visitor in enumerate(visitors, start=1)
    ]
    for job, expected in zip(jobs, alone, strict=True):
        np.testing.assert_array_equal(pixels(job.result(timeout=60)[1]), expected)


def test_cancelling_ends_ones_own_run_and_nobody_elses(server):
    one, other = (Client(server.local_url, verbose=False) for _ in range(2))
    long = one.submit(classes=["star"], steps=1000, pictures=16, api_name="/generate")
    wait_for(lambda: any("Sampling" in said for said in statuses(long)))
    waiting = other.submit(classes=["star"], steps=4, pictures=1, api_name="/generate")
    wait_for(lambda: any("Waiting: one run is ahead of you" in said for said in statuses(waiting)))
    other.predict(api_name="/cancel")  # gives up its place in the queue
    wait_for(waiting.done)
    assert "Cancelled before it began" in statuses(waiting)[-1] and not long.done()
    waiting = other.submit(classes=["star"], steps=4, pictures=1, api_name="/generate")
    wait_for(lambda: any("Waiting" in said for said in statuses(waiting)))
    asked = time.monotonic()
    one.predict(api_name="/cancel")
    wait_for(long.done)
    assert re.search(r"Cancelled at step \d+ of 1000", statuses(long)[-1])
    assert len(waiting.result(timeout=30)[1]) == 1
    assert time.monotonic() - asked < 10
    assert not [thread for thread in threading.enumerate() if thread.name == THREAD]


def statuses(job: Any) -> list[str]:
    texts = [output[OUTPUTS.index("status")] for output in job.outputs()]
    return [text for text in texts if isinstance(text, str)]


def wait_for(happened: Any, seconds: float = PATIENCE) -> None:
    ends = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.slow
def test_progress_counts_the_steps_of_both_sides(client):
    job = client.submit(classes=["star"], steps=300, pictures=4, api_name="/generate")
    seen = []

    def done() -> bool:
        progress = job.status().progress_data
        if progress and progress[0].index is not None:
            seen.append((progress[0].index, progress[0].length, progress[0].unit))
        return job.done()

    wait_for(done)
    assert len(job.result(timeout=PATIENCE)[1]) == 4
    assert seen and seen == sorted(seen) and {(length, unit) for _, length, unit in seen} == {(600, "steps")}
    bars = [[bar for bar in output[5:7] if isinstance(bar, str)] for output in job.outputs()]
    counts = [
        tuple(int(re.search(r'valuenow="(\d+)"', bar).group(1)) for bar in pair) for pair in bars if len(pair) == 2
    ]
    assert counts == sorted(counts) and counts[-1] == (300, 300)
    assert any(0 < without < 300 for without, _ in counts) and any(0 < rectified < 300 for _, rectified in counts)


def test_prompts_are_read_line_by_line(tmp_path):
    pipe = captioned_sd(tmp_path)
    models = Models("mini", pipe)
    page = build_page(models)
    visible = [(block.label, block.visible) for block in page.blocks.values() if hasattr(block, "label")]
    assert ("Prompts (one on each line)", True) in visible and ("Draw (classes)", False) in visible
    assert ("Prompts (one on each line)", False) not in visible
    rest = {"guidance_scale": 4, "schedule": "constant", "product": "ones", "scheduler": None}
    counts = {"steps": 4, "pictures": 3, "seed": 0}
    run = read(models, {"model": "mini", "prompts": " a star \n\na heart", **rest, **counts})
    assert run.settings.conditions == ("a star", "a heart", "a star") and run.captions == run.settings.conditions


def test_a_page_for_strangers_offers_only_what_its_owner_chose(folder):
    models = Models(str(folder), load(folder), local_only=True)
    with pytest.raises(ValueError, match="is not offered on this page"):
        models.pipe("owner/model")
    assert models.pipe(str(folder)) is not None


# ------------------------------------------------------------------------------------------------------- the terminal


def terminal(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, str(ROOT / "demo.py"), *arguments], capture_output=True, text=True, timeout=PATIENCE
    )
    return ended, time.monotonic() - began


def test_the_terminal_says_what_is_wrong_in_one_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cases = {
            ("--port", str(taken.getsockname()[1])): "cannot be used (Address already in use)",
            ("--port", "0"): "--port must be from 1 to 65535, got 0",
            ("--port", "http"): "invalid int value: 'http'",
            ("--dtype", "int3"): "invalid choice: 'int3'",
            ("--model", str(tmp_path)): "holds no diffusers pipeline",
            ("--host", "nowhere.invalid"): "--host must be an address of this machine, got 'nowhere.invalid'",
            ("--host", "203.0.113.7"): "cannot be used (Cannot assign requested address)",
            ("--allow-host", "a.*.example"): "--allow-host must be a name such as demo.example.org",
        }
        for arguments, sentence in cases.items():
            ended, seconds = terminal(*arguments)
            assert ended.returncode == 2 and sentence in ended.stderr and ended.stderr.count("\n") == 1
            assert seconds < 5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--model", "mini-dot"), "model 'mini-dot' is not known"),
        (("--device", "warp"), "device 'warp' is not available"),
        (("--model", "owner/model"), "no connection"),
    ],
)
def test_the_terminal_refuses_what_only_the_library_can_know(arguments, sentence, folder, capsys, monkeypatch):
    """In this process: another one would import torch and diffusers first."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    given = arguments if "--model" in arguments else ("--model", str(folder), *arguments)
    handlers = {ending: signal.getsignal(ending) for ending in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as stopped:
            demo.main(["--port", str(free_port()), *given])
    finally:
        for ending, handler in handlers.items():
            signal.signal(ending, handler)
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in shown and shown.strip().count("\n") == 0
