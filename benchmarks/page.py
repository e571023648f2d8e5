"""`python -m benchmarks`: a page with what guidance costs and how exact the optimum is, each figure with its anchor.

The page is docs/benchmarks.md, written from notebooks/results/bench.json, the record of the last run with what produced
it. `python -m benchmarks --page` writes the page again without measuring.
"""

import csv
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import companion
from benchmarks.cost import cost, distances
from benchmarks.methods import METHODS
from benchmarks.models import MODELS, build
from companion import exact
from companion.files import read_json, write_json
from companion.minis.scenes import SHAPES, scene
from companion.provenance import provenance

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "notebooks" / "results" / "bench.json", ROOT / "docs" / "benchmarks.md"
PUBLISHED = ROOT / "notebooks" / "results" / "runtime_published.csv"

SCALED_STEPS, ROUNDS = 6, 2
SIZES = {"mini-dit": ((4, 25), (8, 25), (8, 50)), "mini-sd": ((4, 25), (8, 25)), "mini-edm2": ((4, 25), (8, 25))}
"""Images and steps of one call. Part of a pass's time does not depend on its batch, so the ratios depend on the number
of images. 8 images in 25 steps are the demo's default."""
SCALES = {"mini-dit": 4.0, "mini-sd": 7.5, "mini-edm2": 2.0}
SCALED = ("SD-V1.4 512", "SD-XL 1024", "DiT-XL/2 256", "SD3 1024")
GOALS = {"evaluations": 1.0, "time_ratio": 1.05, "memory_ratio": 1.02, "median": 0.25, "nearer": 0.9, "error": 0.01}
"""What `auto` is to reach: multiples of CFG's; distance to REG's pictures, CFG's being 1; and the optimum's error."""


def minis(rounds: int) -> list[dict[str, Any]]:
    """Cost on the shipped models, and the distance of each method's pictures to full rectification's."""
    rows = []
    for name, sizes in SIZES.items():
        pipe = companion.load(name)
        pipe.set_progress_bar_config(disable=True)
        for images, steps in sizes:
            row, drawn = cost(pipe, mini_call(name, images, steps), images=images, rounds=rounds)
            drawn.pop("ones, public code")  # costs what public code does, but draws something else
            label = f"{name}, {images} images, {steps} steps"
            rows.append({"model": label, "scaled": None, **row, "distance": distances(drawn)})
    return rows


def mini_call(name: str, images: int, steps: int) -> dict[str, Any]:
    """Arguments of a mini's call: the first captions of the scenes, or every class in turn."""
    asked: dict[str, Any] = {"class_labels": [index % len(SHAPES) for index in range(images)]}
    if name == "mini-sd":
        asked = {"prompt": [scene(0, index).caption for index in range(images)]}
    return {**asked, "guidance_scale": SCALES[name], "num_inference_steps": steps, "output_type": "np"}


def scaled_down(rounds: int) -> list[dict[str, Any]]:
    """Cost on the paper's architectures, random weights, made small."""
    rows = []
    for model in MODELS:
        if model.paper in SCALED:
            call = {**model.call, "num_inference_steps": SCALED_STEPS}
            row, _ = cost(build(model), call, images=1, rounds=rounds)
            rows.append({"model": model.paper, "scaled": model.scaled, **row})
    return rows


def optimum(points: int = 256, steps: int = 50, times: int = 4) -> dict[str, Any]:
    """Seconds and density-weighted error of the exact optimum in the plane: eight Gaussians, w = 1."""
    data, schedule = exact.toy("eight_gaussians"), exact.linear_schedule(steps, 1e-4, 5 / steps)
    of = data.classes[0]
    chain = exact.DDPMChain(exact.mixture_prediction(of, schedule), schedule)
    reward, grid = exact.classifier_free_reward(of, data.unconditional, 1.0), data.grid(points)
    bound = float(exact.evaluate(grid, reward).max()) + 0.1
    start, processor = time.perf_counter(), time.process_time()
    chain.optimum(grid, reward, bound=bound)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    levels = [schedule.level(t) for t in range(steps + 1)]
    densities = torch.stack([exact.evaluate(grid, partial(_density, of, at), 1024) for at in levels])
    error = exact.optimum_error(chain, grid, reward, densities, times=times, bound=bound)
    problem = {"problem": data.name, "weight": 1.0, "points": points, "steps": steps, "times": times}
    return {**problem, "seconds": seconds, "processor_seconds": processor, "error": error}


def _density(mixture: exact.GaussianMixture, level: tuple[float, float], x: torch.Tensor) -> torch.Tensor:
    return mixture.log_prob(x, *level).exp()


PARTS: dict[str, Callable[[int], Any]] = {
    "minis": minis,
    "scaled": scaled_down,
    "optimum": lambda rounds: optimum(),
}


def measure(part: str, note: str = "", rounds: int = ROUNDS) -> dict[str, Any]:
    """What one part of the page measured, and what produced it.

    Args:
        part: a key of `PARTS`.
        note: on the state of the machine, for the page.
        rounds: how often every method is timed.
    """
    made = provenance("cpu", command=["python", "-m", "benchmarks", "--parts", part])
    start = time.perf_counter()
    found = PARTS[part](rounds)
    made |= {"cores": os.cpu_count(), "rounds": rounds, "note": note, "seconds": time.perf_counter() - start}
    return {"provenance": made, "found": found}


def published() -> dict[str, dict[str, str]]:
    """The paper's figures by model and resolution."""
    lines = [line for line in PUBLISHED.read_text().splitlines() if not line.startswith("#")]
    return {f"{row['model']} {row['resolution']}": row for row in csv.DictReader(lines)}


def page(record: Mapping[str, Any]) -> str:
    """The page, in Markdown."""
    small, scaled, optimal = (record[part]["found"] for part in PARTS)
    rows = [*small, *scaled]
    names = [name for name in METHODS if name in rows[0]["time_ratio"]]
    parts = [
        "# Benchmarks",
        "`make bench` writes this page. Every figure is a multiple of CFG's in the same run, so machines can be"
        f" compared. The models with random weights draw {_count(scaled[0]['images'], 'image')} in"
        f" {scaled[0]['steps']} steps.",
        "\n".join(f"- {part}: {_made(record[part]['provenance'])}" for part in PARTS),
        "## Time",
        "Processor time, because it depends least on other load. The column *the paper* has the published ratio on one"
        " A40 (REG by `ones`). `ones, public code` computes as the authors' code does: both branches in one graph.",
        _cost_table(rows, names, "time_ratio", "time_ratio"),
        *_passes(rows),
        "## Network evaluations",
        "Forward, forward-mode and backward passes on one image, counted in the network. Where REG shows more than"
        " 1.50, the run includes a check of three passes, made once: whether the stacked batch may be split.",
        _cost_table(rows, names, "evaluations", None),
        "## Peak memory",
        "Weights and the peak of all tensors, measured over two steps. `auto`, `skip` and `every` differ from REG in"
        " time only.",
        _cost_table(rows, names, "memory_ratio", "memory_ratio"),
        "## Distance to full rectification's pictures",
        "Median over a row's pictures from the same noise. CFG's distance is 1. In brackets: the share of pictures that"
        " are nearer to REG's than CFG's are.",
        _distance_table(small),
        "## Goals for `auto`",
        _goals(rows, small),
        "## The exact optimum",
        _optimum(optimal),
    ]
    return "\n\n".join(parts) + "\n"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _made(made: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {made['versions'][name]}" for name in ("python", "torch", "diffusers"))
    when = made["started"][:16].replace("T", " ")
    return (
        f"{when} UTC, commit {made['commit']}, {made['device']}, {made['cores']} cores, {made['threads']} threads,"
        f" {versions}; median of {made['rounds']}, {made['seconds'] / 60:.0f} minutes. {made['note']}"
    ).strip()


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def _cost_table(rows: list[dict[str, Any]], names: list[str], what: str, anchor: str | None) -> str:
    theirs = published() if anchor else {}
    lines = []
    for row in rows:
        name = row["model"] if row["scaled"] is None else f"{row['model']} ({row['scaled']})"
        cells = [name, *(f"{row[what][method]:.2f}" for method in names)]
        lines.append([*cells, theirs[row["model"]][anchor] if row["model"] in theirs else "–"] if anchor else cells)
    return _table(["model", *names, *(["the paper"] if anchor else [])], lines)


def _passes(rows: list[dict[str, Any]]) -> list[str]:
    """What of `auto`'s time its passes alone explain: `N + k` of one branch and k of both, for CFG's N of both."""
    lines = []
    for row in rows:
        if half := row.get("half_pass"):
            alone = row["evaluations"]["REG, auto"] - 0.5 + half
            lines.append([row["model"], f"{half:.2f}", f"{alone:.2f}", f"{row['time_ratio']['REG, auto']:.2f}"])
    if not lines:
        return []
    text = (
        "`auto` takes as many evaluations as CFG in more and smaller passes: of N steps it guides k, each with one pass"
        " on both branches and one for the product; the others take one pass on the conditional branch. Where a pass on"
        " one branch takes h times one on both, and h is more than 1/2, that is (k + N h) / N times CFG's time before"
        " anything else."
    )
    return [text, _table(["model", "h", "`auto` by its passes alone", "`auto`, measured"], lines)]


def _distance_table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0]["distance"])
    lines = [
        [row["model"], *(f"{row['distance'][n]['median']:.2f} ({row['distance'][n]['nearer']:.0%})" for n in names)]
        for row in rows
    ]
    return _table(["model", *names], lines)


def _goals(rows: list[dict[str, Any]], small: list[dict[str, Any]]) -> str:
    kinds = {"evaluations": "evaluations / CFG's", "time_ratio": "time / CFG's", "memory_ratio": "memory / CFG's"}
    lines = []
    for key, title in kinds.items():
        worst = max(rows, key=lambda row: row[key]["REG, auto"])
        value = worst[key]["REG, auto"]
        lines.append([title, f"at most {GOALS[key]:.2f}", f"{value:.2f} ({worst['model']})", _met(value <= GOALS[key])])
    worst = max(small, key=lambda row: row["distance"]["REG, auto"]["median"])
    value = worst["distance"]["REG, auto"]["median"]
    goal = f"at most {GOALS['median']:.2f}"
    lines.append(["median distance", goal, f"{value:.2f} ({worst['model']})", _met(value <= GOALS["median"])])
    worst = min(small, key=lambda row: row["distance"]["REG, auto"]["nearer"])
    value = worst["distance"]["REG, auto"]["nearer"]
    goal = f"at least {GOALS['nearer']:.0%}"
    lines.append(
        ["pictures nearer than CFG's", goal, f"{value:.0%} ({worst['model']})", _met(value >= GOALS["nearer"])]
    )
    return _table(["`auto`", "goal", "worst", ""], lines)


def _met(reached: bool) -> str:
    return "reached" if reached else "missed"


def _optimum(found: Mapping[str, Any]) -> str:
    finer = (found["points"] - 1) * found["times"] + 1
    return (
        f"The optimal direction (the paper calls it golden) of {found['problem'].replace('_', ' ')} at w ="
        f" {found['weight']:g} on {found['points']} x {found['points']} points and {found['steps']} steps takes"
        f" {found['seconds']:.1f} s, {found['processor_seconds']:.1f} s of processor time (goal: 10 s). Its"
        f" density-weighted relative error, `√(Σ_t E‖found - exact‖² / Σ_t E‖exact‖²)` over x_t ~ p(x_t|y), against"
        f" {finer} x {finer} points is {100 * found['error']:.2f} % (goal: {100 * GOALS['error']:.0f} %):"
        f" {_met(found['error'] <= GOALS['error'])}."
    )


def write_page() -> None:
    """Write docs/benchmarks.md from the record of the last run."""
    PAGE.write_text(page(read_json(RESULTS)), encoding="utf-8")


def main(note: str = "", rounds: int = ROUNDS, parts: Sequence[str] = tuple(PARTS)) -> None:
    """Measure the parts, put them in the record, write the page and print it."""
    for part in parts:
        print(f"measuring: {part}", file=sys.stderr, flush=True)
        measured = measure(part, note, rounds)
        write_json(RESULTS, {**(read_json(RESULTS) if RESULTS.exists() else {}), part: measured})
    if all(part in read_json(RESULTS) for part in PARTS):
        write_page()
        print(PAGE.read_text(encoding="utf-8"))
