"""`python -m companion card`: samples and figures of an embedded model's card."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from companion.cli import card
from companion.cli.main import main
from companion.minis.shipping import WEIGHTS


def test_sheet_shows_every_sample_in_its_place():
    values = torch.linspace(-1, 1, 12).view(12, 1, 1, 1).expand(12, 3, 5, 4)
    sheet = np.asarray(card.sample_sheet(values))
    assert sheet.shape == (2 * 5 + card.GAP, 10 * 4 + 9 * card.GAP, 3)
    assert abs(int(sheet[0, 9 * (4 + card.GAP), 0]) - round((9 / 11) * 255)) <= 1
    assert (sheet[5 + card.GAP :, 2 * (4 + card.GAP) :] == 255).all()  # the last row is not full


def test_card_gets_samples_and_share_with_its_interval(tmp_path, monkeypatch):
    shutil.copy(WEIGHTS / "mini-edm2" / "README.md", tmp_path)
    monkeypatch.setitem(card.SETTINGS, "mini-edm2", card.Setting(2.0, 2, call={"guidance_reference": "null_label"}))
    before = (tmp_path / "README.md").read_text()
    for _ in range(2):  # the second time replaces what the first has written
        path = card.update_card("mini-edm2", tmp_path, measure=10, samples=10)
    text = path.read_text()
    assert text.count("## Samples") == 1 and "![10 samples](samples.png)" in text
    assert Image.open(tmp_path / "samples.png").size[0] == 10 * 64 + 9 * card.GAP
    found = re.findall(r"\| 10 samples, .*? \| (.*?) % \| (.*?) % to (.*?) % \|", text)
    assert len(found) == 2
    for share, low, high in found:
        interval = binomtest(round(float(share) / 10), 10).proportion_ci(method="wilson")
        assert (float(low), float(high)) == pytest.approx((100 * interval.low, 100 * interval.high), abs=0.06)
    rest = re.sub(r"## Samples\n.*?(?=## )", "", text, flags=re.DOTALL)
    assert rest == re.sub(r"## Samples\n.*?(?=## )", "", before, flags=re.DOTALL)


@pytest.mark.parametrize("name", card.SETTINGS)
def test_every_pipelines_card_shows_samples(name):
    folder = WEIGHTS / name
    assert "](samples.png)" in (folder / "README.md").read_text()
    assert Image.open(folder / "samples.png").size == (10 * 64 + 9 * card.GAP, 4 * 64 + 3 * card.GAP)


def test_negative_number_is_refused(capsys):
    assert main(["card", "mini-dit", "--measure", "-1"]) == 2
    assert "--measure must be at least 0" in capsys.readouterr().err
