"""What remains of the REG paper's claims about pictures: row by row, published signs beside those measured here."""

from collections.abc import Mapping, Sequence
from typing import Any

from companion.evaluation.metrics.figures import Figure
from companion.evaluation.studies.verdict import Study, counted
from companion.evaluation.tables.paired import compared_counts
from companion.evaluation.tables.published import published
from companion.evaluation.tables.results import Cell
from companion.evaluation.tables.text import METRICS, differences
from companion.markdown import table


def outcome(counts: Mapping[str, int]) -> str:
    """A claim of "better", from the number of comparisons that are better, undecided and worse."""
    better, worse, number = counts["better"], counts["worse"], sum(counts.values())
    if not better and not worse:
        return "undecided"
    if better and worse:
        return f"mixed: better in {better}, worse in {worse} of {number}"
    return f"found in {better} of {number}, else undecided" if better else f"not found: worse in {worse} of {number}"


def _text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items())


def _counts(cells: Sequence[Cell], compared: Sequence[Mapping[str, Any]], metric: str, second: str) -> dict[str, int]:
    """REG minus CFG at equal scale: sample by sample where that was stored, the other models as independent runs."""
    own = [entry for entry in compared if entry["label"].endswith("REG minus CFG")]
    counts = compared_counts(own).get(METRICS[metric][0], {"better": 0, "undecided": 0, "worse": 0})
    models = {entry["first"].split(",")[0] for entry in own}
    for each in differences([cell for cell in cells if cell.name.split(",")[0] not in models], second):
        if each["against"] == "CFG":
            counts[each["verdicts"][metric]] += 1
    return counts


def claims_markdown(
    study: Study, imagenet: Sequence[Cell], coco: Sequence[Cell], compared: Sequence[Mapping[str, Any]]
) -> str:
    """One line a claim: where it stands, what was published, what is found here, and the outcome.

    Args:
        study: of `verdict.read_study`.
        imagenet, coco: the cells of notebooks 08 and 09.
        compared: what `tables.paired.compared` found for pairs of notebook 08's cells.
    """
    rows = []
    for claim, place, cells, pairs, metric, second, sign in (
        ("class models: lower FID", "Table 2", imagenet, compared, "fid", "inception_score", "lower"),
        ("class models: higher IS", "Table 2", imagenet, compared, "inception_score", "inception_score", "higher"),
        ("text models: lower FID", "Table 3", coco, (), "fid", "clip_score", "lower"),
        ("text models: higher CLIP score", "Table 3", coco, (), "clip_score", "clip_score", "higher"),
    ):
        counts = _counts(cells, pairs, metric, second)
        rows.append([claim, place, sign, f"{_text(counts)} (stored cells, equal scale)", outcome(counts)])
    rows += [_published_line(coco, guidance) for guidance in ("linear", "cosine")]
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


def _published_line(coco: Sequence[Cell], guidance: str) -> list[str]:
    """Stable Diffusion 2.1 under one weight over time, beside mini-sd's row of the same weight."""
    lines = {row[1]: row for row in published("reg_sd21").rows if row[0] == guidance}
    clip, fid = (float(lines["yes"][i]) - float(lines["no"][i]) for i in (2, 3))
    [own] = [
        each
        for each in differences(coco, "clip_score")
        if (each["guidance"], each["against"], each["model"]) == (guidance, "CFG", "mini-sd")
    ]
    score: Figure = own["clip_score"]
    same = (score.value > 0) == (clip > 0)
    decided = "" if own["verdicts"]["clip_score"] != "undecided" else ", undecided"
    ending = f"CLIP score: {'same' if same else 'other'} sign{decided}; FID {own['verdicts']['fid']}"
    return [
        f"SD 2.1, {guidance} weights",
        "reply to reviewers",
        f"CLIP {clip:+.2f}, FID {fid:+.2f}",
        f"mini-sd: CLIP {score.value:+.2f} ± {score.high - score.value:.2f}, FID {own['fid'].text()}",
        ending,
    ]
