"""Old public names work and warn with the new ones."""

import importlib
from pathlib import Path

import pytest

import companion
from companion import exact, plotting
from companion.evaluation.studies import reuse_errors
from companion.exact import comparison, methods
from companion.pipelines import configuration, levels
from companion.pipelines.configuration import RectifiedGuidanceConfig
from companion.pipelines.guider import settings


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (exact, "everyday_direction", "cfg_direction"),
        (exact, "MonteCarloGolden", "MonteCarloOptimum"),
        (exact, "monte_carlo_golden", "monte_carlo_optimum"),
        (methods, "WAYS", "ALL_METHODS"),
        (reuse_errors, "carry_results", "reuse_results"),
        (methods, "way", "method_direction"),
        (methods, "ways_to_guide", "method_chains"),
        (methods, "ways_on_grid", "method_fields"),
        (methods, "errors_of_ways", "method_errors"),
        (configuration, "SAMPLING_PRODUCTS", "PRESETS"),
        (levels, "UNDERSTOOD_SCHEDULERS", "SUPPORTED_SCHEDULERS"),
        (settings, "RECTIFIABLE_GUIDERS", "SUPPORTED_GUIDERS"),
    ],
)
def test_renamed_names_warn(module, old, new):
    with pytest.warns(DeprecationWarning, match=f"{old} is deprecated: it is now called {new}"):
        assert getattr(importlib.import_module(module.__name__), old) is getattr(module, new)


def test_renamed_attributes_warn():
    schedule, data = exact.linear_schedule(6, 0.02, 0.5), exact.toy("paper_1d")
    [found] = comparison.compare(data, [1.0], data.grid(64), schedule)
    with pytest.warns(DeprecationWarning, match=r"Comparison\.golden is deprecated: it is now called optimal"):
        assert found.golden is found.optimal
    with pytest.warns(DeprecationWarning, match=r"DDPMChain\.golden_direction .* optimal_direction"):
        assert found.chain.golden_direction == found.chain.optimal_direction
    error = exact.extrapolation_error(data.classes[0], data.unconditional, found.grid.points[:2], 0.8, 0.6, 1.0)
    with pytest.warns(DeprecationWarning, match=r"ExtrapolationError\.everyday .* cfg"):
        assert error.everyday is error.cfg


def test_a_renamed_colour_warns():
    with pytest.warns(DeprecationWarning, match="'golden' is deprecated: it is now called 'optimal'"):
        assert plotting.COLOURS["golden"] == plotting.COLOURS["optimal"]
    with pytest.raises(KeyError, match="silver"):
        _ = plotting.COLOURS["silver"]


def test_every_warning_of_an_old_name_comes_from_one_place():
    """And points to the line that uses the old name."""
    package = Path(companion.__file__).parent
    texts = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    assert {path.name for path, text in texts.items() if "DeprecationWarning" in text} == {"deprecation.py"}
    with pytest.warns(DeprecationWarning, match="is deprecated: ") as seen:
        _ = (
            companion.PaperModel,
            exact.everyday_direction,
            plotting.COLOURS["golden"],
            RectifiedGuidanceConfig("covariance"),
        )
    assert [warning.filename for warning in seen] == [__file__] * 4


def test_unknown_names_stay_unknown():
    with pytest.raises(AttributeError, match="no attribute 'goldener'"):
        _ = exact.goldener


def test_names_that_left_the_public_surface_work_and_warn():
    assert 20 <= len(companion.__all__) <= 27 and not set(companion._MOVED) & set(companion.__all__)
    for name, module in companion._MOVED.items():
        with pytest.warns(DeprecationWarning, match=rf"companion\.{name} is deprecated: import it from {module}"):
            assert getattr(companion, name) is getattr(importlib.import_module(module), name)
    for old, new in companion._RENAMED.items():
        with pytest.warns(DeprecationWarning, match=rf"companion\.{old} is deprecated: import {new} from companion"):
            assert getattr(companion, old) is getattr(importlib.import_module(companion._MOVED[new]), new)
    with pytest.raises(AttributeError, match="module 'companion' has no attribute 'everything'"):
        _ = companion.everything
