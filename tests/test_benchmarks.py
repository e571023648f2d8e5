"""`python -m benchmarks`: runs what is asked for, reports what failed."""

from pathlib import Path

import pytest

from benchmarks import __main__ as runner


@pytest.fixture
def measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two measurements in a folder of their own, one of which breaks."""
    (tmp_path / "bench_good.py").write_text("def main():\n    print('| a table |')\n")
    (tmp_path / "bench_bad.py").write_text("def main():\n    raise RuntimeError('out of luck')\n")
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    monkeypatch.setattr("benchmarks.__path__", [str(tmp_path)])


@pytest.mark.usefixtures("measurements")
def test_one_failure_neither_hides_nor_stops_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["bad", "good"]) == 1
    printed = capsys.readouterr()
    assert "| a table |" in printed.out
    assert "out of luck" in printed.err
    assert printed.err.endswith("failed: bad\n")


@pytest.mark.usefixtures("measurements")
def test_a_name_selects(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["good"]) == 0
    printed = capsys.readouterr().out
    assert "## Good" in printed
    assert "## Bad" not in printed
    assert '"versions"' in printed


@pytest.mark.usefixtures("measurements")
def test_an_unknown_name_gets_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runner.main(["speed"])
    assert "unknown measurement speed; known are bad, good" in capsys.readouterr().err


def test_without_names_the_page_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(runner.page, "main", lambda *given: asked.append(given))
    assert runner.main(["--note", "Quiet.", "--rounds", "3"]) == 0
    assert asked == [("Quiet.", 3, ["minis", "scaled", "optimum"])]
