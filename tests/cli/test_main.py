"""The command line."""

import os
import runpy
import sys

import pytest
import torch
from safetensors.torch import load_file

from companion.cli.main import COMMANDS, main
from companion.cli.train import CONTINUED
from companion.minis import adm, edm2, recipes, text_conditional
from companion.minis.shipping import WEIGHTS


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


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_file_and_its_help(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith(f"usage: python -m companion {command} ") and COMMANDS[command] in shown


def test_unknown_commands_are_refused_with_the_known_ones(capsys):
    for given in (["paint"], []):
        with pytest.raises(SystemExit) as stopped:
            main(given)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(line in shown for line in COMMANDS.values())


def test_only_denoisers_are_continued_from_the_package(tmp_path, capsys):
    assert main(["train", "mini-clip", "--from-shipped", "--runs", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: --from-shipped continues mini-adm, mini-dit, ")
    assert main(["train", "mini-dit", "--first-scene", "-1", "--runs", str(tmp_path)]) == 2
    assert "--first-scene must be an integer from 0 to 1,000,000,000,000, got -1" in capsys.readouterr().err


@pytest.mark.parametrize("name", CONTINUED)
def test_training_goes_on_from_the_shipped_weights(tmp_path, monkeypatch, name):
    """What each recipe is given to start from, against the shipped folder's own tensors."""
    given = []

    def spy(model, *_):
        given.append({key: value.clone() for key, value in model.state_dict().items()})
        raise KeyboardInterrupt

    for recipe in (adm, edm2, recipes, text_conditional):
        monkeypatch.setattr(recipe, "train", spy)
    assert main(["train", name, "--from-shipped", "--runs", str(tmp_path)]) == 130  # stopped before the first step
    part = "transformer" if name in ("mini-dit", "mini-flow") else "unet"
    shipped = load_file(WEIGHTS / name / part / "diffusion_pytorch_model.safetensors")
    found = {key.rpartition("denoiser.")[2]: value for key, value in given[0].items() if "denoiser." in key}
    assert set(shipped) <= set(found)
    for key, value in shipped.items():
        assert torch.equal(value.float(), found[key].float()), key


def test_unknown_models_are_listed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "mini-dot"])
    assert stopped.value.code == 2
    assert "choose from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("scene-regressor", "autoencoder"),
        ("mini-adm", "scene-classifier"),
        ("mini-adm-noisy", "mini-adm"),
        ("mini-adm-resnet-calibrated", "mini-adm-resnet"),
        ("mini-adm-noisy-calibrated", "mini-adm-noisy"),
    ],
)
def test_models_need_others(tmp_path, capsys, name, needed):
    assert main(["train", name, "--runs", str(tmp_path)]) == 2
    assert f"run python -m companion train {needed} first" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_gets_no_traceback(monkeypatch, capfd):
    """Standard output is a pipe that nobody reads any more, as behind `head`."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "argv", ["companion", "table", "imagenet", "--list"])
    with os.fdopen(writing, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("companion", run_name="__main__")
        output.flush()  # as the interpreter does when it ends
    assert ended.value.code == 0 and capfd.readouterr().err == ""
