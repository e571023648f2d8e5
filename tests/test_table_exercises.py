"""What notebooks 08, 09, 12, 14, 15 and 17 say in their texts and solutions, computed from the stored figures."""

import json
from pathlib import Path

import pytest
import scipy.stats

from companion.evaluation.metrics.figures import Figure
from companion.evaluation.studies.ceilings import read_ceilings
from companion.evaluation.studies.classifier_table import label_of
from companion.evaluation.studies.gradient_norms import norm_summary
from companion.evaluation.studies.gradient_study import read_gradients
from companion.evaluation.studies.validity_rows import rows_of
from companion.evaluation.studies.verdict import METRICS, counted, differences, equal_strength, read_study
from companion.evaluation.tables.paired import compared_counts
from companion.evaluation.tables.published import published
from companion.evaluation.tables.results import read_cells
from companion.evaluation.tables.text import METRICS as TABLE_METRICS
from companion.evaluation.tables.text import less, lines_of, verdict
from companion.files import read_json

NOTEBOOKS = Path("notebooks")


def text(number: str) -> str:
    [path] = NOTEBOOKS.glob(f"{number}_*.ipynb")
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def pairs(name: str) -> dict[str, dict[str, dict]]:
    """What was found for the pairs of a table: label -> metric -> figure."""
    return {each["label"]: each["figures"] for each in read_json(NOTEBOOKS / f"results/{name}-paired.json")}


def shown(figures: dict[str, dict], metric: str) -> str:
    """A difference as the tables show it."""
    _, digits, factor, _ = TABLE_METRICS[metric]
    said = difference(figures, metric).scaled(factor).text(digits)
    return said if said.startswith("-") else f"+{said}"


def difference(figures: dict[str, dict], metric: str) -> Figure:
    return Figure.from_json(figures[metric])


def signed(gap: Figure) -> str:
    return f"{gap.value:+.2f} ± {gap.high - gap.value:.2f}"


def is_decided(figures: dict[str, dict], metric: str) -> bool:
    return bool(figures[metric]["p_value_holm"] < 0.05)


def line_of(name: str, model: str, guidance: str, method: str, scale: float) -> dict[str, Figure]:
    lines = lines_of(read_cells(NOTEBOOKS / "results" / f"{name}-mini.json"))
    [line] = [
        each for each in lines
        if (*each.group, each.method, each.row["guidance_scale"]) == (model, guidance, method, scale)
    ]  # fmt: skip
    return line.figures


def test_08_reg_at_a_larger_scale() -> None:
    reg, cfg = (line_of("imagenet", "mini-edm2", "vanilla", *which) for which in (("REG", 3.0), ("CFG", 2.0)))
    said = text("08")
    assert f"REG at 3: FID {reg['fid'].text()}, IS {reg['inception_score'].text()}." in said
    assert f"CFG at 2: FID {cfg['fid'].text()}, IS {cfg['inception_score'].text()}." in said
    fid, score = (less(reg[name], cfg[name]) for name in ("fid", "inception_score"))
    assert f"FID is {fid.text()}, undecided; in IS +{score.text()}, REG higher" in said
    assert fid.low < 0 < fid.high and score.low > 0


def sample_by_sample(kind: str) -> list[dict]:
    """Comparisons of notebook 08's cells whose label has this."""
    return [entry for entry in read_json(NOTEBOOKS / "results/imagenet-mini-paired.json") if kind in entry["label"]]


def decided(entries: list[dict], name: str) -> list[tuple[float, float]]:
    """Guidance scale and difference of those that Holm's method decides."""
    found = [(entry["label"].split("scale ")[1].split(",")[0], entry["figures"][name]) for entry in entries]
    return [(float(scale), figure["value"]) for scale, figure in found if figure["p_value_holm"] < 0.05]


def test_08_what_more_steps_do() -> None:
    longer, said = sample_by_sample("CFG, as many evaluations minus CFG"), text("08")
    scores, distances = ([value for _, value in decided(longer, name)] for name in ("inception_score", "fid"))
    ends = f"by {min(scores):.2f} to {max(scores):.2f}"
    assert f"rises in {len(scores)} of {len(longer)} rows, {ends}. FID is decided in one row, interval" in said
    [only] = [entry["figures"]["fid"] for entry in longer if entry["figures"]["fid"]["p_value_holm"] < 0.05]
    assert distances == [only["value"]] and min(scores) > 0
    assert f"guidance ({only['value']:.2f} ± {only['high'] - only['value']:.2f})" in said
    assert [value > 0 for _, value in decided(longer, "kid")] == [True, True] and "KID is worse in two" in said


def test_08_compares_sample_by_sample() -> None:
    rectified, ones, said = sample_by_sample("REG minus"), sample_by_sample("REG, ones minus"), text("08")
    counts, number = compared_counts(rectified), len(rectified)
    fid, kid, recall = counts["FID"], counts["KID"], counts["recall"]
    worse, better = f"worse with REG in {fid['worse']} of {number} rows", f"better in {fid['better']}"
    assert f"FID is {worse}, all at scale 2 or less, and {better}, all at 2.5 or more" in said
    assert all((value < 0) == (scale >= 2.5) for scale, value in decided(rectified, "fid"))
    assert f"is better in {kid['better']} of {number} rows and worse in none" in said and kid["worse"] == 0
    assert f"Recall is better in {recall['better']} and worse in {recall['worse']}" in said
    assert f"Inception score is worse in {counts['IS']['worse']} of {number} and better in none" in said
    assert counts["IS"]["better"] == 0
    [top] = [entry["figures"]["fid"] for entry in rectified if "scale 4" in entry["label"]]
    assert f"(`mini-dit` at 4: {top['value']:.2f} ± {top['high'] - top['value']:.2f})" in said
    assert f"At 4 REG's is lower by {-top['value']:.2f} ± {top['high'] - top['value']:.2f}" in said
    halves = [(e["figures"]["fid"]["high"] - e["figures"]["fid"]["low"]) / 2 for e in rectified]
    assert said.count(f"± {min(halves):.2f} to {max(halves):.2f}") == 2
    alone = {cell.name: cell.figures["fid"] for cell in read_cells(NOTEBOOKS / "results/imagenet-mini.json")}
    apart = [less(alone[entry["first"]], alone[entry["second"]]) for entry in rectified]
    wider = [(each.high - each.low) / (2 * half) for each, half in zip(apart, halves, strict=True)]
    assert f"has an interval {min(wider):.1f} to {max(wider):.1f} times as wide" in said
    for name, heading in (("FID", "worse"), ("IS", "worse"), ("precision", "worse"), ("class agreement, %", "worse")):
        assert compared_counts(ones)[name][heading] == len(ones) == 4
    assert compared_counts(ones)["recall"]["better"] == 4
    at_two = [entry for entry in rectified if "scale 2," in entry["label"] and "interval" not in entry["label"]]
    assert decided(at_two, "fid") == []


def test_08_and_09_quote_the_ceilings() -> None:
    perfect = read_ceilings(NOTEBOOKS / "results/ceilings.json")["through the autoencoder"]
    tables = {name: lines_of(read_cells(NOTEBOOKS / f"results/{name}-mini.json")) for name in ("imagenet", "coco")}
    best = {
        name: max((line.figures[name] for line in tables["imagenet"]), key=lambda each: sign * each.value)
        for name, sign in (("fid", -1), ("inception_score", 1), ("precision", 1))
    }
    ceiling, least = (
        [each["fid"].text(), each["inception_score"].text(), each["precision"].text(3)] for each in (perfect, best)
    )
    quoted = (
        f"FID {ceiling[0]}, IS {ceiling[1]} and precision {ceiling[2]}; the best rows have {least[0]}, {least[1]} and "
        f"{least[2]}. Recall is close to its ceiling, {perfect['recall'].value:.3f}"
    )
    assert quoted in text("08")
    guided = [line.figures for line in tables["coco"] if line.method != "no guidance"]
    fid, score = ([figures[name].value for figures in guided] for name in ("fid", "clip_score"))
    assert f"FID {perfect['fid'].text()}, the guided rows {min(fid):.2f} to {max(fid):.2f}" in text("09")
    said = f"{perfect['clip_score'].text()} (after the autoencoder); the guided rows have {min(score):.2f} to"
    assert f"{said} {max(score):.2f}" in text("09")


def test_09_compares_picture_by_picture() -> None:
    found, said = pairs("coco-mini"), text("09")
    for model in ("mini-sd", "mini-sd-v"):
        at = {scale: found[f"{model}, vanilla, scale {scale}, seed 0: REG minus CFG"] for scale in (3, 6)}
        assert all(is_decided(at[6], metric) for metric in at[6]) and len(at[6]) == 5
        assert {verdict(metric, difference(at[6], metric)) for metric in at[6]} == {"better"}
        assert is_decided(at[3], "clip_score") and is_decided(at[3], "recall") and not is_decided(at[3], "fid")
        for scale in at:
            assert all(shown(at[scale], metric) in said for metric in ("clip_score", "recall"))
        assert shown(at[6], "fid") in said


def test_09_compares_independent_runs() -> None:
    said = text("09")
    for guidance in ("linear", "cosine"):
        reg, cfg = (line_of("coco", "mini-sd", guidance, method, 3.0) for method in ("REG", "CFG"))
        score, fid = (less(reg[name], cfg[name]) for name in ("clip_score", "fid"))
        assert f"{score.text()} ({guidance})" in said and f"{fid.text()}" in said
        assert verdict("clip_score", score) == "better" and verdict("fid", fid) == "undecided"
    reg, cfg = (line_of("coco", "mini-sd", "vanilla", *which) for which in (("REG", 6.0), ("CFG", 3.0)))
    gaps = {name: less(reg[name], cfg[name]) for name in ("fid", "clip_score")}
    assert f"{signed(gaps['fid'])} in FID and {signed(gaps['clip_score'])} in CLIP score: both undecided" in said
    assert {verdict(name, gap) for name, gap in gaps.items()} == {"undecided"}
    for method in ("CFG", "REG"):
        three, six = (line_of("coco", "mini-sd", "vanilla", method, scale)["clip_score"] for scale in (3.0, 6.0))
        assert f"by {signed(less(six, three))}" in said
    none = line_of("coco", "mini-sd", "unguided", "no guidance", 1.0)["clip_score"].value
    assert f"by {cfg['clip_score'].value - none:.2f}. REG adds" in said


def test_12_quotes_the_stored_gradients() -> None:
    study, said = read_gradients(NOTEBOOKS / "results/gradient_norms.json"), text("12")
    negative = (study.error.along < 0).double().mean(dim=1)
    assert f"At the first step {100 * float(negative[0]):.1f} % of the cosines are negative" in said
    assert negative[study.error.timesteps.index(500) :].max() == 0 and "From $t = 500$ on no cosine is negative" in said
    found = norm_summary(study.clean)
    soft, hard = (100 * found[name][3] for name in ("Softplus(3)", "raw"))
    assert (
        f"With Softplus alone the gradient vanishes in {soft:.0f} % of the pictures; with ReLU in {hard:.0f} %" in said
    )
    assert found["Softplus(3)"][5] < found["raw"][4], "the intervals do not overlap"


BASE = "off the shelf [ECD]"


def test_14_quotes_the_ceiling() -> None:
    said, cells = text("14"), read_cells(NOTEBOOKS / "results/imagenet128-mini.json")
    [perfect] = read_ceilings(NOTEBOOKS / "results/ceilings.json", "32x32").values()
    fid = min((cell.figures["fid"] for cell in cells), key=lambda each: each.value)
    precision = max((cell.figures["precision"] for cell in cells), key=lambda each: each.value)
    real = f"FID {perfect['fid'].text()} and precision {perfect['precision'].text(3)}"
    assert f"{real}; the best rows have {fid.text()} and {precision.text(3)}." in said


def test_14_the_remedies() -> None:
    found, said = pairs("imagenet128-mini"), text("14")
    calibrated = "off the shelf, calibrated"
    remedies = ("Jensen-Shannon", "reverse KL", calibrated, "Jensen-Shannon, calibrated")
    against = {name: found[f"{name} minus {BASE}"] for name in remedies}
    halves = [each["fid"]["high"] - each["fid"]["value"] for each in against.values()]
    assert f"with intervals of ± {min(halves):.2f} to {max(halves):.2f}" in said
    for each in against.values():
        assert f"{shown(each, 'fid')}" in said and not is_decided(each, "fid")
    assert is_decided(against[calibrated], "recall")
    assert f"Calibration raises recall by {shown(against[calibrated], 'recall')[1:]}" in said
    assert is_decided(against["reverse KL"], "kid") and is_decided(against["reverse KL"], "recall")
    assert not any(is_decided(against["Jensen-Shannon"], metric) for metric in against["Jensen-Shannon"])
    unguided = found[f"unguided minus {BASE}"]
    assert f"lowers the FID by {shown(unguided, 'fid')[1:]}" in said and is_decided(unguided, "fid")
    before, after = (float(row[2]) for row in published("cal_smooth_ece").rows)
    assert f"({before} - {after}) / {before} = {100 * (before - after) / before:.1f} %" in said


def test_14_k_makes_larger_scales_usable() -> None:
    found, said = pairs("imagenet128-mini"), text("14")
    for scale in (2, 4, 8):
        with_k = found[f"{BASE}, scale {scale}, rectified minus {BASE}, scale {scale}"]
        for metric in ("fid", "kid", "precision", "recall"):
            assert is_decided(with_k, metric) and verdict(metric, difference(with_k, metric)) == "better"
    two = found[f"{BASE}, scale 2, rectified minus {BASE}, scale 2"]
    gains = [shown(two, metric)[1:] for metric in ("fid", "precision", "recall")]
    assert "lowers FID by {} and raises precision by {} and recall by {}".format(*gains) in said
    one = found[f"{BASE}, rectified minus {BASE}"]
    assert not is_decided(one, "fid") and is_decided(one, "kid") and is_decided(one, "recall")
    best = found[f"{BASE}, scale 2, rectified minus {BASE}"]
    assert f"improves KID and recall ({shown(best, 'kid')} and {shown(best, 'recall')})" in said
    assert is_decided(best, "kid") and is_decided(best, "recall") and not is_decided(best, "fid")
    assert f"rises by {shown(found[f'{BASE}, scale 2 minus {BASE}'], 'fid')[1:]} without $K$" in said
    cells = {label_of(cell): cell.figures for cell in read_cells(NOTEBOOKS / "results/imagenet128-mini.json")}
    agreements = [each["agreement"] for name, each in cells.items() if name.startswith(BASE) and "recti" not in name]
    most, with_k = max(agreements, key=lambda each: each.value), cells[f"{BASE}, scale 4, rectified"]["agreement"]
    most_said, said_of_k = (each.scaled(100).text(1) for each in (most, with_k))
    assert f"agreement is {said_of_k} %, and without $K$ it is at most {most_said} % at any scale" in said
    assert less(with_k, most).low > 0


def test_15_and_17_mcnemar_by_hand() -> None:
    p_values = {changed: float(scipy.stats.binomtest(changed, changed).pvalue) for changed in (3, 5, 6)}
    assert p_values == pytest.approx({3: 0.25, 5: 0.0625, 6: 0.03125})
    assert "0.0625 for five, 0.031 for six" in text("15") and "= 0.25. Six, all one way, give p = 0.031" in text("17")


def test_12_fine_tuning_changes_fid_by() -> None:
    found, said = pairs("calibrated_guides"), text("12")
    printed, bins = (found[f"smooth ECE, by {name} minus standard"] for name in ("sample", "bin"))
    assert f"(`standard`) by {shown(printed, 'fid')}, and the loss by bins by {shown(bins, 'fid')}. Both" in said
    before, after = (float(row[2]) for row in published("cal_smooth_ece").rows)
    cells = {cell.settings["form"]: cell.figures for cell in read_cells(NOTEBOOKS / "results/calibrated_guides.json")}
    gain = cells["standard"]["fid"].value * (after / before - 1)
    assert f"is {gain:.2f} here and lies inside both intervals" in said
    assert all(each["fid"]["low"] < gain < 0 < each["fid"]["high"] for each in (printed, bins))
    tuned = [figures for label, figures in found.items() if label.endswith(" minus as trained")]
    rises, falls = ([abs(each[name]["value"]) for each in tuned] for name in ("agreement", "recall"))
    assert f"raise agreement by {100 * min(rises):.1f} to {100 * max(rises):.1f} points" in said
    assert f"lower recall by {min(falls):.2f} to {max(falls):.2f}" in said
    for each in tuned:
        assert is_decided(each, "agreement") and is_decided(each, "recall") and not is_decided(each, "fid")
        assert each["agreement"]["value"] > 0 > each["recall"]["value"]
    assert f"FID {shown(printed, 'fid')}, picture by picture" in Path("docs/paper_map.md").read_text()


def test_the_readme_has_the_figures_of_the_study() -> None:
    study = read_study(NOTEBOOKS / "results/validity.json")
    said = Path("README.md").read_text()
    for model in study.models:
        texts = []
        for metric, digits in (("residual", 1), ("recognised", 0)):
            [each] = [
                each for each in differences(study, metric, "REG")
                if (each.row.model, each.row.guidance_scale) == (model, 7.5)
            ]  # fmt: skip
            figure = each.figure.scaled(METRICS[metric].factor)
            value, low, high = figure.value, figure.low, figure.high
            text = f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
            texts.append(f"**{text}**" if each.verdict != "undecided" else text)
        assert f"| {model} | {' | '.join(texts)} |" in said
    recognised = [each.row.name for each in differences(study, "recognised", "REG") if each.verdict != "undecided"]
    assert recognised == ["mini-edm2/REG/12"], "README says where it is decided"


def test_17_says_what_the_study_has() -> None:
    study = read_study(NOTEBOOKS / "results/validity.json")
    verdicts: dict[str, dict[tuple[str, float], float]] = {}
    for metric, about in METRICS.items():
        verdicts[metric] = {}
        for each in differences(study, metric, "REG"):
            assert each.verdict != "worse", each.row.name
            if each.verdict == "better":
                verdicts[metric][each.row.model, each.row.guidance_scale] = about.factor * each.figure.value
    residual, pairs = verdicts["residual"], {each.figure.samples for each in differences(study, "residual", "REG")}
    assert pairs == {240}
    large, small = ([gap for (_, scale), gap in residual.items() if (scale > 4) == above] for above in (True, False))
    assert len(large) == 10 and round(max(large)) == -6 and round(min(large)) == -24
    assert len(small) == 6 and round(max(small)) == -1 and round(min(small)) == -4
    undecided = {(name, scale) for name in study.models for scale in study.scales(name, "CFG")} - set(residual)
    assert undecided == {("mini-dit", 2.0), ("mini-dit", 4.0), ("mini-flow", 2.0), ("mini-edm2", 2.0)}
    gaps = {(each.row.model, each.row.guidance_scale): each.figure for each in differences(study, "residual", "REG")}
    assert round(1000 * min(gaps[each].low for each in undecided), 1) == -3.9
    assert round(1000 * max(gaps[each].high for each in undecided), 1) == 0.8
    valid, middle = verdicts["valid"], {("mini-sd", 4.0), ("mini-sd-v", 4.0)}
    four = [name for name in study.models if name != "mini-flow"]
    assert set(valid) == middle | {(name, scale) for name in four for scale in (7.5, 12.0)}
    assert {round(valid[each]) for each in middle} == {7}
    large = [gap for each, gap in valid.items() if each not in middle]
    assert (round(min(large)), round(max(large))) == (6, 18)
    texts = ("mini-sd", "mini-sd-v", "mini-flow")
    assert set(verdicts["clip_score"]) == {(name, scale) for name in texts for scale in (4.0, 7.5, 12.0)}
    assert {round(gap) for gap in verdicts["law_distance"].values()} == {-3, -2} and len(verdicts["law_distance"]) == 9
    assert {each: round(gap) for each, gap in verdicts["attributes"].items()} == {("mini-flow", 12.0): 10}
    assert list(verdicts["recognised"]) == [("mini-edm2", 12.0)] and not verdicts["kid"]
    strength = {model: equal_strength(study, model, "REG", resamples=200) for model in study.models}
    assert {model for model, each in strength.items() if each.verdict != "undecided"} == {"mini-sd", "mini-sd-v"}
    assert all(-2.5 < 1000 * strength[model].difference.value < -1.5 for model in ("mini-sd", "mini-sd-v"))
    auto = {
        (each.row.model, each.row.guidance_scale): each.verdict for each in differences(study, "residual", "REG, auto")
    }
    assert {place for place, verdict in auto.items() if verdict == "better"} == (set(residual) | {("mini-dit", 4.0)})
    assert "worse" not in auto.values()
    strength = {model: equal_strength(study, model, "REG, auto", resamples=200) for model in study.models}
    assert {model for model, each in strength.items() if each.verdict == "better"} == {"mini-sd"}
    falls = {
        method: [
            max(scores) - scores[-1]
            for model in texts
            for scores in [[study.figure(row, "clip_score").value for row in rows_of(model) if row.method == method]]
        ]
        for method in ("CFG", "REG")
    }
    assert [round(fall) for fall in (min(falls["CFG"]), max(falls["CFG"]))] == [4, 10]
    assert [round(fall) for fall in (min(falls["REG"]), max(falls["REG"]))] == [2, 3]
    for metric, factor, lost in (("residual", 1000, 4), ("clip_score", 1, -2)):
        worse = [each for each in differences(study, metric, "REG, ones") if each.verdict == "worse"]
        assert [each.row.name for each in worse] == ["mini-flow/REG, ones/2"]
        assert round(factor * worse[0].figure.value) == lost
    damped = [each.figure.value for each in differences(study, "residual", "REG, ones") if each.verdict == "better"]
    assert [round(1000 * end) for end in (min(damped), max(damped))] == [-27, -9]
    for metric in METRICS:
        counts = counted(study, metric, "interval")
        assert (counts["better"], counts["worse"]) == (int(metric == "residual"), 0)
    for each in differences(study, "residual", "covariance"):
        of_reg = gaps[each.row.model, each.row.guidance_scale]
        apart = each.figure.low > of_reg.high or each.figure.high < of_reg.low
        assert each.row.guidance_scale < 5 or not apart
