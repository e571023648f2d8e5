"""The command line."""

import pytest

from companion.cli.main import main


@pytest.mark.parametrize("name", ["mini-dit", "mini-edm2", "mini-sd", "mini-sd-v", "mini-flow"])
def test_training_a_mini_needs_its_parts(tmp_path, capsys, name):
    assert main(["train", name, "--runs", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {name} needs ") and "run python -m companion train autoencoder first" in message
    assert message.count("\n") == 1


def test_mini_sd_v_needs_mini_sd(tmp_path, capsys):
    for part in ("autoencoder", "scene-classifier"):
        (tmp_path / part).mkdir()
    assert main(["train", "mini-sd-v", "--out", str(tmp_path)]) == 2
    assert "run python -m companion train mini-sd first" in capsys.readouterr().err


def test_unknown_models_are_listed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "mini-dot"])
    assert stopped.value.code == 2
    assert "choose from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("mini-adm", "scene-classifier"),
        ("mini-adm-noisy", "mini-adm"),
        ("mini-adm-resnet-calibrated", "mini-adm-resnet"),
        ("mini-adm-noisy-calibrated", "mini-adm-noisy"),
    ],
)
def test_mini_adm_and_its_classifiers_need_one_another(tmp_path, capsys, name, needed):
    assert main(["train", name, "--runs", str(tmp_path)]) == 2
    assert f"run python -m companion train {needed} first" in capsys.readouterr().err
