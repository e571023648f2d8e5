"""What remains of the REG paper's claims about pictures: row by row, published signs beside those measured here."""

from collections.abc import Mapping, Sequence
from typing import Any

from companion.evaluation.studies.verdict import Study, counted
from companion.evaluation.tables.paired import compared_counts
from companion.evaluation.tables.published import published
from companion.evaluation.tables.text import METRICS
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
    return f"found in {better} of {number}, else undecided" if better else f"not found: worse in {worse} of {number}"


def _text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items())


def _counts(compared: Sequence[Mapping[str, Any]], metric: str) -> dict[str, int]:
    """REG minus CFG at equal scale, sample by sample."""
    own = [entry for entry in compared if entry["label"].endswith(_AT_EQUAL_SCALE)]
    return compared_counts(own)[METRICS[metric][0]]


def claims_markdown(study: Study, imagenet: Sequence[Mapping[str, Any]], coco: Sequence[Mapping[str, Any]]) -> str:
    """One line a claim: where it stands, what was published, what is found here, and the outcome.

    Args:
        study: of `verdict.read_study`.
        imagenet, coco: what `tables.paired.compared` found for pairs of notebook 08's and 09's cells.
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


def _published_line(coco: Sequence[Mapping[str, Any]], guidance: str) -> list[str]:
    """Stable Diffusion 2.1 under one weight over time, beside the row of the same weight of mini-sd-v."""
    lines = {row[1]: row for row in published("reg_sd21").rows if row[0] == guidance}
    clip, fid = (float(lines["yes"][i]) - float(lines["no"][i]) for i in (2, 3))
    [own] = [
        entry["figures"]
        for entry in coco
        if entry["label"].startswith(f"mini-sd-v, {guidance}, ") and entry["label"].endswith(_AT_EQUAL_SCALE)
    ]
    here, outcomes = [], []
    for name, theirs in (("clip_score", clip), ("fid", fid)):
        heading, digits, _, _ = METRICS[name]
        ours = own[name]["value"]
        here.append(f"{heading} {ours:+.{digits}f} ± {own[name]['high'] - ours:.{digits}f}")
        sign = "same sign" if (ours > 0) == (theirs > 0) else "other sign"
        outcomes.append(f"{heading}: {sign if own[name]['p_value_holm'] < 0.05 else 'undecided'}")
    return [
        f"SD 2.1, {guidance} weights",
        "reply to reviewers",
        f"CLIP {clip:+.2f}, FID {fid:+.2f}",
        f"mini-sd-v: {', '.join(here)}",
        "; ".join(outcomes),
    ]
