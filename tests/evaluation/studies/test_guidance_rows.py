"""What tables hold: every guidance with its fair comparisons, the most valuable cells first."""

import pytest

from companion.evaluation.studies.classifier_table import imagenet128
from companion.evaluation.studies.guidance_rows import REG
from companion.evaluation.studies.guidance_table import coco, imagenet
from companion.evaluation.studies.guidance_variants import variants
from companion.evaluation.tables.options import TableOptions
from companion.evaluation.tables.text import UNGUIDED


@pytest.mark.parametrize("plan", [imagenet(), coco()])
def test_every_guidance_is_compared_at_equal_steps_and_evaluations(plan):
    names = [name for _, _, name in plan.cells()]
    assert len(names) == len(set(names))
    guidances = {(row.model, row.guidance, row.guidance_scale) for row in plan.rows if row.guidance != UNGUIDED}
    for model, guidance, scale in guidances:
        rows = [r for r in plan.rows if (r.model, r.guidance, r.guidance_scale) == (model, guidance, scale)]
        standard, more, rectified, *others = rows
        assert (standard.product, more.product, rectified.product) == ("none", "none", REG)
        assert more.equal_evaluations and not standard.equal_evaluations and not rectified.equal_evaluations
        assert standard.steps == rectified.steps < more.steps
        assert {row.steps for row in others} <= {standard.steps} and not {"none", REG} & {r.product for r in others}
        assert len({(row.weight, row.reference) for row in rows}) == 1
    assert sum(row.guidance == UNGUIDED for row in plan.rows) == len({row.model for row in plan.rows})


def test_the_middle_scales_come_first():
    rows = imagenet().rows
    first = rows[: 1 + 5 * 3]
    assert {row.model for row in first} == {"mini-edm2"} and {row.guidance_scale for row in first} == {1.0, 2.0}
    assert {row.guidance for row in first} == {UNGUIDED, "vanilla", "autoguidance", "interval", "linear", "cosine"}
    assert {row.reference for row in first if row.guidance == "autoguidance"} == {"guide"}
    assert {row.guidance for row in rows if row.model == "mini-dit"} == {
        UNGUIDED, "vanilla", "interval", "linear", "cosine"}  # fmt: skip


@pytest.mark.parametrize("profile", ["mini", "paper"])
def test_options_of_a_plan(profile):
    plan = coco(TableOptions(profile, num_samples=130, batch_size=3, seeds=2))
    assert (plan.num_samples, plan.batch_size, plan.seeds) == (130, 3, (0, 1))
    assert len(plan.names()) == 2 * len(plan.rows) == len(set(plan.names()))
    model = plan.rows[0].model
    assert {row.model for row in coco(TableOptions(profile, models=model)).rows} == {model}
    with pytest.raises(ValueError, match=r"models of this table are .*, got 'mini-dot'"):
        coco(TableOptions(profile, models="mini-dot"))
    with pytest.raises(ValueError, match=f"imagenet, profile {profile}, takes no --strength: leave it out"):
        imagenet(TableOptions(profile, strength=1.0))


def test_scenes_to_measure_against():
    """Of the embedded models only: the papers' references are files."""
    assert coco(TableOptions(reference_samples=150, num_samples=130)).reference_samples == 150
    assert imagenet128(TableOptions(reference_samples=150)).reference_samples == 150
    for make, table in ((coco, "coco, profile paper"), (variants, "variants, profile mini")):
        options = TableOptions("paper" if make is coco else "mini", reference_samples=150)
        with pytest.raises(ValueError, match=f"{table}, takes no --reference-samples: leave it out"):
            make(options)


@pytest.mark.parametrize("name", ["num_samples", "batch_size", "reference_samples", "seeds"])
def test_numbers_of_a_plan_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        TableOptions(**{name: 0})
