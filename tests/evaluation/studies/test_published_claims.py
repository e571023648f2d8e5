"""Published claims and the stored cells: signs and counts as the files have them."""

from pathlib import Path

from companion.evaluation.studies.published_claims import claims_markdown, outcome
from companion.evaluation.studies.verdict import counted, read_study
from companion.evaluation.tables.results import read_cells
from companion.files import read_json

RESULTS = Path("notebooks/results")


def test_outcomes_are_what_the_counts_say() -> None:
    def named(better: int, undecided: int, worse: int) -> str:
        return outcome({"better": better, "undecided": undecided, "worse": worse})

    assert named(0, 8, 0) == "undecided"
    assert named(3, 1, 0) == "found in 3 of 4, else undecided"
    assert named(4, 0, 0) == "found in all 4"
    assert named(0, 1, 7) == "not found: worse in 7 of 8"
    assert named(1, 1, 2) == "mixed: better in 1, worse in 2 of 4"


def test_every_line_has_its_published_sign() -> None:
    study = read_study(RESULTS / "validity.json")
    pairs = [read_json(RESULTS / f"{name}-mini-paired.json") for name in ("imagenet", "coco")]
    found = claims_markdown(study, *pairs, read_cells(RESULTS / "coco-mini.json"))
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in found.splitlines()}
    assert lines["SD 2.1, linear weights"][2] == "CLIP +0.22, FID -1.11"  # 31.62 - 31.40, 27.83 - 28.94
    assert lines["SD 2.1, cosine weights"][2] == "CLIP -0.24, FID -1.22"  # 31.48 - 31.72, 23.32 - 24.54
    assert lines["SD 2.1, cosine weights"][4].startswith("CLIP score: other sign")
    assert lines["class models: higher IS"][4].startswith("not found: worse in ")
    counts = counted(study, "attributes", "REG")
    text = lines["pictures show what was asked for"][3]
    assert f"attributes: {counts['better']} better, {counts['undecided']} undecided" in text
