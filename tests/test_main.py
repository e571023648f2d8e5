"""The command line."""

import pytest

from companion.__main__ import main


def test_training_mini_dit_needs_its_parts(tmp_path, capsys):
    assert main(["train", "mini-dit", "--runs", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: mini-dit needs ") and "run python -m companion train autoencoder first" in message
    assert message.count("\n") == 1


def test_unknown_models_are_listed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "mini-dot"])
    assert stopped.value.code == 2
    assert "choose from" in capsys.readouterr().err
