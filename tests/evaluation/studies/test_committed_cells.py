"""The committed cells are their plans': resumed, they stay, as long as the models' weights stay what they were."""

import pytest

from companion.evaluation.metrics.evaluators import REFERENCE_SEED
from companion.evaluation.sampling.settings import _digest
from companion.evaluation.studies.classifier_table import imagenet128
from companion.evaluation.studies.guidance_table import coco, imagenet
from companion.evaluation.tables.results import read_cells, same_settings
from companion.minis.scenes import SHAPES, scene
from tests.fork_server import ROOT

PLANS = {"imagenet-mini": imagenet(), "coco-mini": coco(), "imagenet128-mini": imagenet128()}


@pytest.mark.parametrize("name", PLANS)
def test_rows_and_settings(name):
    plan = PLANS[name]
    planned = {cell: (row, seed) for row, seed, cell in plan.cells()}
    conditions: tuple = tuple(range(len(SHAPES)))
    if name.startswith("coco"):
        conditions = tuple(scene(REFERENCE_SEED, i, 1).caption for i in range(plan.num_samples))
    cells = read_cells(ROOT / "notebooks" / "results" / f"{name}.json")
    assert cells and {cell.name for cell in cells} <= set(planned)
    for cell in cells:
        row, seed = planned[cell.name]
        stored, described = dict(cell.settings["row"]), row.described()
        drawn = plan.settings(row, seed, conditions)
        sampling = cell.settings["sampling"]
        if described.get("budget") is None:  # a budget's steps are counted on the loaded model
            assert stored["steps"] == described["steps"] == sampling["steps"]
        assert same_settings(stored | {"steps": 0}, described | {"steps": 0}), cell.name
        fields = ("model", "num_samples", "batch_size", "seed", "guidance_scale", "weight", "product", "image_format")
        for field in fields:
            assert sampling[field] == getattr(drawn, field), (cell.name, field)
        assert same_settings(sampling["call"], drawn.call)
        assert sampling["conditions"] == {"number": len(conditions), "sha256": _digest(list(conditions))}
        assert cell.settings["reference_samples"] == plan.reference_samples
