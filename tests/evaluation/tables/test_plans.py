"""What tables hold: every guidance with its fair comparisons, the most valuable cells first."""

import pytest

from companion.evaluation.tables.plans import REG, UNGUIDED, mini_coco, mini_imagenet


@pytest.mark.parametrize("plan", [mini_imagenet(), mini_coco()])
def test_every_guidance_is_compared_at_equal_steps_and_evaluations(plan):
    names = [name for _, _, name in plan.cells()]
    assert len(names) == len(set(names))
    guidances = {(row.model, row.guidance, row.guidance_scale) for row in plan.rows if row.guidance != UNGUIDED}
    for model, guidance, scale in guidances:
        rows = [r for r in plan.rows if (r.model, r.guidance, r.guidance_scale) == (model, guidance, scale)]
        everyday, more, rectified, *others = rows
        assert (everyday.product, more.product, rectified.product) == ("none", "none", REG)
        assert more.equal_evaluations and not everyday.equal_evaluations and not rectified.equal_evaluations
        assert everyday.steps == rectified.steps < more.steps
        assert {row.steps for row in others} <= {everyday.steps} and not {"none", REG} & {r.product for r in others}
        assert len({(row.weight, row.reference) for row in rows}) == 1
    assert sum(row.guidance == UNGUIDED for row in plan.rows) == len({row.model for row in plan.rows})


def test_the_middle_scales_come_first():
    rows = mini_imagenet().rows
    first = rows[: 1 + 5 * 3]
    assert {row.model for row in first} == {"mini-edm2"} and {row.guidance_scale for row in first} == {1.0, 2.0}
    assert {row.guidance for row in first} == {UNGUIDED, "vanilla", "autoguidance", "interval", "linear", "cosine"}
    assert {row.reference for row in first if row.guidance == "autoguidance"} == {"guide"}
    assert {row.guidance for row in rows if row.model == "mini-dit"} == {
        UNGUIDED, "vanilla", "interval", "linear", "cosine"}  # fmt: skip
