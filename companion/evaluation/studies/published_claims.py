"""What remains of the REG paper's claims about pictures: row by row, published signs beside those measured here."""

from collections.abc import Mapping, Sequence
from typing import Any

from companion.evaluation.studies.verdict import Study, counted
from companion.evaluation.tables.paired import compared_counts
from companion.evaluation.tables.published import published
from companion.evaluation.tables.results import Cell
from companion.evaluation.tables.text import METRICS, less, lines_of, verdict
from companion.markdown import table

_AT_EQUAL_SCALE = "REG minus CFG"
"""How the label of such a pair ends."""


def outcome(counts: Mapping[str, int]) -> str:
    """A claim of "better", from the number of comparisons that are better, undecided and worse."""
    better, worse, number = counts["better"], counts["worse"], sum(counts.values())
    if not better and not worse:
        return "undecided"
    if better and worse:
        return f"mixed: better in {better}, worse in {worse} of {number}"
    if better == number:
        return f"found in all {number}"
    return f"found in {better} of {number}, else undecided" if better else f"not found: worse in {worse} of {number}"


def _text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items())


def _counts(compared: Sequence[Mapping[str, Any]], metric: str) -> dict[str, int]:
    """REG minus CFG at equal scale, sample by sample."""
    own = [entry for entry in compared if entry["label"].endswith(_AT_EQUAL_SCALE)]
    return compared_counts(own)[METRICS[metric][0]]


def claims_markdown(
    study: Study, imagenet: Sequence[Mapping[str, Any]], coco: Sequence[Mapping[str, Any]], cells: Sequence[Cell]
) -> str:
    """One line a claim: where it stands, what was published, what is found here, and the outcome.

    Args:
        study: of `verdict.read_study`.
        imagenet, coco: what `tables.paired.compared` found for pairs of notebook 08's and 09's cells.
        cells: of notebook 09; the published lines stand beside its rows with linear and cosine weights.
    """
    rows = []
    for claim, place, compared, metric, sign in (
        ("class models: lower FID", "Table 2", imagenet, "fid", "lower"),
        ("class models: higher IS", "Table 2", imagenet, "inception_score", "higher"),
        ("text models: lower FID", "Table 3", coco, "fid", "lower"),
        ("text models: higher CLIP score", "Table 3", coco, "clip_score", "higher"),
    ):
        counts = _counts(compared, metric)
        rows.append([claim, place, sign, f"{_text(counts)} (stored cells, equal scale)", outcome(counts)])
    rows += [_published_line(cells, guidance) for guidance in ("linear", "cosine")]
    for claim, metric in (
        ("pictures look better", "residual"),
        ("pictures look better", "valid"),
        ("pictures show what was asked for", "recognised"),
        ("pictures show what was asked for", "attributes"),
    ):
        counts = counted(study, metric, "REG")
        here = f"{metric}: {_text(counts)} (models and scales)"
        rows.append([claim, "Figures 8 to 10", "better", here, outcome(counts)])
    return table(["claim", "place", "published", "here, REG minus CFG", "outcome"], rows)


def _published_line(cells: Sequence[Cell], guidance: str) -> list[str]:
    """Stable Diffusion 2.1 under one weight over time, beside mini-sd's rows of the same weight as independent runs."""
    lines = {row[1]: row for row in published("reg_sd21").rows if row[0] == guidance}
    clip, fid = (float(lines["yes"][i]) - float(lines["no"][i]) for i in (2, 3))
    own = {line.method: line.figures for line in lines_of(cells) if line.group == ("mini-sd", guidance)}
    found = {name: less(own["REG"][name], own["CFG"][name]) for name in ("clip_score", "fid")}
    score, distance = found["clip_score"], found["fid"]
    outcomes = []
    for name, theirs in (("clip_score", clip), ("fid", fid)):
        sign = "same sign" if (found[name].value > 0) == (theirs > 0) else "other sign"
        undecided = verdict(name, found[name]) == "undecided"
        outcomes.append(f"{METRICS[name][0]}: {'undecided' if undecided else sign}")
    return [
        f"SD 2.1, {guidance} weights",
        "reply to reviewers",
        f"CLIP {clip:+.2f}, FID {fid:+.2f}",
        f"mini-sd: CLIP {score.value:+.2f} ± {score.high - score.value:.2f}, FID {distance.text()}",
        "; ".join(outcomes),
    ]
