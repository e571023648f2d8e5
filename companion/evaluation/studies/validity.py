"""How valid guided pictures are: embedded models under CFG, REG and other rules, scale by scale, from the same noise.

Every picture is compared with the nearest scene that the renderer could have drawn. `python -m
companion.evaluation.studies.validity draw` draws the pictures and measures each (resuming a killed run), `measure`
writes the figures and the paired differences (`--models NAME --keep-others`: of these models anew, beside the others),
`threshold` measures which residual is still valid.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from companion.evaluation.metrics.evaluators import scene_batches
from companion.evaluation.metrics.features import RegressorFeatures, extract
from companion.evaluation.metrics.figures import Figure
from companion.evaluation.metrics.inversion import Inversion
from companion.evaluation.metrics.kernel_distance import KernelReference, kernel_values
from companion.evaluation.metrics.metrics import share
from companion.evaluation.metrics.paired_statistics import (
    Comparison,
    mcnemar,
    paired_bootstrap,
    paired_means,
    with_holm,
)
from companion.evaluation.metrics.scene_validity import (
    THRESHOLD_FILE,
    VALID_SHARE,
    law_distances,
    load_autoencoder,
    mean_law_distance,
    percentile,
    valid_residual,
    weights_digest,
)
from companion.evaluation.sampling.evaluations import evaluations, heun_levels, scheduler_levels
from companion.evaluation.sampling.folder import write_json
from companion.evaluation.studies.picture_scores import read_scores, write_scores
from companion.evaluation.studies.validity_pictures import (
    FOUND,
    PART,
    Scorer,
    Scores,
    asked_scenes,
    draw_rows,
    parts_there,
    read_images,
    read_row,
)
from companion.evaluation.studies.validity_rows import METHODS, MODELS, Row, rows_of
from companion.files import read_json
from companion.guidance.noise_level import NoiseLevel
from companion.minis.scene_regressor import reconstructed
from companion.minis.scenes import HELD_OUT_SEED, render, scene
from companion.pipelines.configuration import RectifiedGuidanceConfig
from companion.pipelines.registry import load
from companion.pixels import to_uint8
from companion.provenance import provenance

COMMAND = ("python", "-m", "companion.evaluation.studies.validity")
SAMPLES = 60
RESULTS = Path("notebooks/results/validity.json")
ATTRIBUTES = ("shape", "colour", "texture", "size")
_ORDER = ("no guidance", *METHODS)
CEILINGS = ("real scenes", "autoencoder")
_REFERENCE = 2000  # scenes that the kernel distance compares with
_RESAMPLES = 200  # of the distribution distance's paired bootstrap
_CHUNK = 100


@dataclass(frozen=True)
class Measured:
    """A row's pictures, by the scores of each.

    Args:
        scores: of `Scorer`, and `kid`, of `kernel_values`: one value a picture.
        captions: whether the model was asked for colour, texture and size too; else for the shape alone.
    """

    scores: Scores
    captions: bool = True

    @property
    def numbers(self) -> dict[str, Float[Tensor, " samples"]]:
        """Residual to the nearest scene and to the nearest of the requested shape; the kernel distance's values; of
        captions, the CLIP score."""
        names = ("residual", "class_residual", "kid", *(("clip_score",) if self.captions else ()))
        return {name: self.scores[name] for name in names}

    def first(self, samples: int) -> "Measured":
        """The first pictures alone."""
        return Measured({name: values[:samples] for name, values in self.scores.items()}, self.captions)

    def shares(self, largest: float) -> dict[str, Bool[Tensor, " samples"]]:
        """Whether each picture is valid, is recognised, and has every requested attribute of its nearest scene."""
        asked = ATTRIBUTES if self.captions else ATTRIBUTES[:1]
        met = torch.stack([self.scores[name] > 0.5 for name in asked]).all(dim=0)
        return {
            "valid": self.scores["residual"] < largest,
            "recognised": self.scores["recognised"] > 0.5,
            "attributes": met,
        }

    @cached_property
    def found(self) -> Float[Tensor, "samples 7"]:
        """The nearest scenes, in `FOUND`'s order."""
        return torch.stack([self.scores[f"found_{name}"] for name in FOUND], dim=1)


def nearest(found: Float[Tensor, "samples 7"]) -> Inversion:
    """The nearest scenes in `FOUND`'s order, as `law_distances` takes them."""
    shape, texture, colour, x, y, radius, rotation = found.unbind(dim=1)
    return Inversion(
        shape=shape.long(),
        texture=texture.long(),
        colour=colour.long(),
        place=torch.stack([x, y], dim=1),
        radius=radius,
        rotation=rotation,
        residual=torch.zeros_like(radius),
        class_residual=None,
        scenes=(),
    )


def law_distance(found: Float[Tensor, "samples 7"]) -> float:
    """Mean distance of the nearest scenes from the distribution of scenes, 0 to 1."""
    return mean_law_distance(nearest(found))


def row_figures(row: Measured, largest: float) -> dict[str, Figure]:
    """Means with Student's intervals, shares with Wilson's."""
    figures = {name: paired_means(values, torch.zeros_like(values)).figure for name, values in row.numbers.items()}
    return figures | {name: share(right) for name, right in row.shares(largest).items()}


def comparisons(first: Measured, second: Measured, largest: float) -> dict[str, Comparison]:
    """First minus second, pair by pair, of the pictures that both have."""
    samples = min(len(row.scores["residual"]) for row in (first, second))
    first, second = first.first(samples), second.first(samples)
    found = {name: paired_means(values, second.numbers[name]) for name, values in first.numbers.items()}
    shares = second.shares(largest)
    found |= {name: mcnemar(values, shares[name]) for name, values in first.shares(largest).items()}
    law = paired_bootstrap(first.found, second.found, law_distance, resamples=_RESAMPLES)
    return found | {"law_distance": law}


def as_json(pairs: Sequence[tuple[Row, Row, Mapping[str, Comparison]]]) -> list[dict[str, Any]]:
    """Paired differences as plain JSON."""
    return [
        {
            "first": one.name,
            "second": other.name,
            "figures": {name: each.as_json for name, each in compared.items()},
        }
        for one, other, compared in pairs
    ]


def adjusted(differences: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same differences with p-values adjusted by Holm's method beside the measured ones.

    A family is one method against one other in one metric, over all models and scales.
    """
    result = [{**pair, "figures": dict(pair["figures"])} for pair in differences]
    families: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for pair in result:
        methods = (pair["first"].split("/")[1], pair["second"].split("/")[1])
        for name in pair["figures"]:
            families.setdefault((*methods, name), []).append(pair["figures"])
    for (_, _, name), members in families.items():
        for figures, figure in zip(members, with_holm([each[name] for each in members]), strict=True):
            figures[name] = figure
    return result


def with_models_of(earlier: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """A new measurement with the models that only an earlier one has; p-values are adjusted over both.

    Raises:
        ValueError: the earlier one was made with another autoencoder or regressor.
    """
    for name in ("valid_residual", "weights_sha256"):
        if earlier[name] != new[name]:
            raise ValueError(f"the earlier measurement has another {name}; measure its models again")
    kept = [name for name in earlier["models"] if name not in new["models"]]
    models = {**earlier["models"], **new["models"]}
    rows = {**{name: row for name, row in earlier["rows"].items() if row["model"] in kept}, **new["rows"]}
    rows = {name: row for model in MODELS for name, row in rows.items() if row["model"] == model}
    pairs = wanted_pairs([Row(row["model"], row["method"], row["guidance_scale"]) for row in rows.values()])
    differences = {(pair["first"], pair["second"]): pair for each in (earlier, new) for pair in each["differences"]}
    return {
        **new,
        "models": {name: models[name] for name in MODELS if name in models},
        "not_measured": [name for name in earlier["not_measured"] if name.split("/")[0] in kept] + new["not_measured"],
        "kept": {name: earlier.get("kept", {}).get(name, earlier["provenance"]) for name in kept},
        "rows": rows,
        "differences": adjusted([differences[one.name, other.name] for one, other in pairs]),
    }


def wanted_pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Every method against CFG at the same scale, and every guided row against no guidance."""
    there, guided = set(rows), [row for row in rows if row.method != "no guidance"]
    pairs = [(row, row.cfg) for row in guided if row.method != "CFG"] + [(row, row.unguided) for row in guided]
    return [(one, other) for one, other in pairs if other in there]


@cache
def _levels(model: str) -> tuple[NoiseLevel, ...]:
    steps = MODELS[model].steps
    return tuple(heun_levels(steps) if model == "mini-edm2" else scheduler_levels(load(model).scheduler, steps))


def planned_evaluations(row: Row) -> int:
    """Evaluations of the network for one picture."""
    levels = _levels(row.model)
    if row.method == "no guidance":
        return len(levels)
    return evaluations(row.config or RectifiedGuidanceConfig(product="none"), levels)


class KernelDistance:
    """Kernel distances of rows to held-out scenes that nobody is asked for, in the regressor's features."""

    @cached_property
    def _network(self) -> RegressorFeatures:
        return RegressorFeatures()

    @cached_property
    def _reference(self) -> KernelReference:
        scenes = [scene(HELD_OUT_SEED, index, 1) for index in range(_REFERENCE)]
        return KernelReference(extract(self._network, scene_batches(scenes)).features)

    def __call__(self, images: UInt8[Tensor, "samples 3 64 64"]) -> Float[Tensor, " samples"]:
        """`kernel_values` of a row's pictures."""
        return kernel_values(self._network(images).features, self._reference).float()


def ceilings(samples: int, kernel: KernelDistance) -> dict[str, Measured]:
    """The requested scenes themselves, and what the autoencoder makes of them: the best that a model could draw."""
    asked, scorer = asked_scenes(samples), Scorer()
    real = render(asked)
    pictures = {"real scenes": real, "autoencoder": reconstructed(load_autoencoder(), real)}
    return {
        name: Measured({**scorer(pictures[name], asked), "kid": kernel(to_uint8(pictures[name]))}) for name in CEILINGS
    }


def measure_rows(
    folder: Path, table: Path, models: Sequence[str], samples: int = SAMPLES, earlier: Path | None = None
) -> dict[str, Any]:
    """Figures of every row that is drawn, and every paired difference, as plain JSON.

    A row counts with all its pictures, a difference with those that both rows have. The scores of each picture go
    into `table`. Rows with fewer than `samples` pictures are named in `not_measured`.

    Args:
        folder: of the drawn pictures.
        earlier: an earlier measurement, with its table beside it, whose other models are kept as they are.

    Raises:
        ValueError: no row has that many pictures, or they were measured with other weights.
    """
    chosen = ["--models", ",".join(models), "--samples", str(samples), *(["--keep-others"] if earlier else [])]
    source = provenance(command=[*COMMAND, "measure", *chosen])
    others = None if earlier is None else (read_json(earlier), read_scores(earlier.with_suffix(".csv")))
    largest, kernel = valid_residual(), KernelDistance()
    rows: dict[str, Any] = {}
    found: dict[Row, Measured] = {}
    planned = [row for model in models for row in rows_of(model)]
    drawn = {row: parts for row in planned if (parts := parts_there(folder, row)) * PART >= samples}
    if not drawn:
        raise ValueError(f"{folder} holds no row of {samples} pictures; draw them first: {' '.join(COMMAND)} draw")
    for row, parts in drawn.items():
        scores, told = read_row(folder, row, parts)
        scores["kid"] = kernel(read_images(folder, row, parts))
        found[row] = Measured(scores, MODELS[row.model].captions)
        figures = row_figures(found[row], largest)
        rows[row.name] = {
            **asdict(row),
            "samples": parts * PART,
            "evaluations": planned_evaluations(row),
            "cpu_seconds": round(sum(part["cpu_seconds"] for part in told), 1),
            "figures": {name: asdict(figure) for name, figure in figures.items()},
            "law_distance": law_distance(found[row].found),
            "law_distances": {k: v._asdict() for k, v in law_distances(nearest(found[row].found)).items()},
            "drawn_by": told[0]["provenance"],
            "commits": sorted({str(part["provenance"]["commit"]) for part in told}),
        }
        print(f"{row.name}: residual {figures['residual'].text(4)}", flush=True)
    perfect = ceilings(max(drawn.values()) * PART, kernel)
    named = {row.name: each.scores for row, each in found.items()}
    pairs = [(one, other, comparisons(found[one], found[other], largest)) for one, other in wanted_pairs(list(found))]
    result: dict[str, Any] = {
        "models": {name: {**asdict(MODELS[name]), "scales": list(MODELS[name].scales)} for name in models},
        "methods": dict(METHODS),
        "not_measured": [row.name for row in planned if row not in found],
        "samples": samples,
        "valid_residual": largest,
        "weights_sha256": weights_digest(),
        "provenance": source,
        "ceilings": {
            name: {
                "figures": {key: asdict(value) for key, value in row_figures(each, largest).items()},
                "law_distance": law_distance(each.found),
            }
            for name, each in perfect.items()
        },
        "rows": rows,
        "differences": adjusted(as_json(pairs)),
    }
    if others is not None:
        result, named = with_models_of(others[0], result), others[1] | named
    write_scores(
        table, {name: named[name] for name in result["rows"]} | {k: each.scores for k, each in perfect.items()}
    )
    return result


def measure_threshold(samples: int = 2000) -> dict[str, Any]:
    """Residuals and attributes of held-out scenes, and of the first half of them reconstructed, as plain JSON."""
    source = provenance(command=[*COMMAND, "threshold", "--samples", str(samples)])
    result: dict[str, Any] = {"seed": HELD_OUT_SEED, "weights_sha256": weights_digest()}
    for kind, number in (("real", samples), ("reconstructed", samples // 2)):
        scenes = [scene(HELD_OUT_SEED, index, 1) for index in range(number)]
        images = render(scenes)
        if kind == "reconstructed":
            images = reconstructed(load_autoencoder(), images)
        scorer, begun = Scorer(), time.process_time()
        parts = [scorer(images[i : i + _CHUNK], scenes[i : i + _CHUNK]) for i in range(0, number, _CHUNK)]
        spent = (time.process_time() - begun) / number
        scores = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        right = {name: scores[name] > 0.5 for name in ATTRIBUTES}
        distances = law_distances(nearest(Measured(scores).found))
        result[kind] = {
            "residual": {**asdict(percentile(scores["residual"])), "quantile": VALID_SHARE},
            "median_residual": float(scores["residual"].median()),
            "attributes_right": float(torch.stack(list(right.values())).double().mean()),
            **{f"{name}_right": asdict(share(values)) for name, values in right.items()},
            "law_distances": {name: distance._asdict() for name, distance in distances.items()},
            "milliseconds_a_picture": round(1000 * spent, 1),
        }
        print(f"{kind}: {json.dumps(result[kind], indent=2)}", flush=True)
    return {**result, "provenance": source}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=" ".join(COMMAND), description=__doc__)
    parser.add_argument("step", choices=("draw", "measure", "threshold"))
    parser.add_argument("--models", default=",".join(MODELS), metavar="NAMES", help=f"default: {','.join(MODELS)}")
    parser.add_argument(
        "--methods", default=";".join(_ORDER), metavar="NAMES", help=f"to draw; default: {';'.join(_ORDER)!r}"
    )
    parser.add_argument("--pictures", type=Path, default=Path("runs/validity"), metavar="FOLDER")
    parser.add_argument(
        "--samples",
        type=int,
        help=f"pictures a row, when measuring the fewest that count: {SAMPLES}; scenes of the threshold: 2000",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON; default: where the package reads it")
    parser.add_argument(
        "--keep-others", action="store_true", help="when measuring, keep the other models that FILE has"
    )
    options = parser.parse_args(arguments)
    models, methods = options.models.split(","), [name.strip() for name in options.methods.split(";")]
    samples = options.samples or SAMPLES
    try:
        for option, names, known in (("models", models, MODELS), ("methods", methods, _ORDER)):
            if wrong := [name for name in names if name not in known]:
                raise ValueError(f"--{option} must be of {'; '.join(known)}, got {wrong[0]!r}")
        if options.step == "draw":
            chosen = ["--models", options.models, "--methods", options.methods, "--samples", str(samples)]
            source = provenance(command=[*COMMAND, "draw", *chosen])
            rows = [row for name in models for row in rows_of(name) if row.method in methods]
            rows.sort(key=lambda row: _ORDER.index(row.method))  # of all models one method after the other
            draw_rows(rows, options.pictures, samples, source)
        elif options.step == "measure":
            out = options.out or RESULTS
            earlier = out if options.keep_others else None
            write_json(out, measure_rows(options.pictures, out.with_suffix(".csv"), models, samples, earlier))
        else:
            write_json(options.out or THRESHOLD_FILE, measure_threshold(options.samples or 2000))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
