"""One look: a method's colour is its own, and everything that draws takes its colours from the style module."""

import ast
import colorsys
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from companion import plotting
from companion.exact.comparison import METHODS
from companion.exact.methods import ALL_METHODS
from companion.guidance.products import PRODUCT_TABLE

ROOT = Path(__file__).parent.parent
HUES = {"blue": (190, 240), "orange": (30, 45), "green": (150, 175), "purple": (275, 300)}
FAMILIES = {
    "blue": ("REG", "finite_difference", "jvp", "ones", "vjp", "diagonal", "auto"),
    "orange": ("CFG", "none", "interval"),
    "green": ("optimal",),
    "purple": ("covariance", *ALL_METHODS[2 + len(METHODS[1:]) :]),
}


def hue(colour: object) -> float:
    return 360 * colorsys.rgb_to_hsv(*to_rgb(colour))[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_hue(family: str) -> None:
    low, high = HUES[family]
    assert all(low < hue(plotting.COLOURS[name]) < high for name in FAMILIES[family])
    for name in ("target", "unguided"):  # black and grey have no hue
        red, green, blue = to_rgb(plotting.COLOURS[name])
        assert red == green == blue


def test_every_method_has_a_style_and_families_differ_in_colour_and_line() -> None:
    assert {*ALL_METHODS, *PRODUCT_TABLE, "unguided", "optimal", "target"} <= set(plotting.STYLES)
    leads = [plotting.STYLES[name] for name in ("target", "unguided", "optimal", "CFG", "REG", "covariance")]
    assert len({style.colour for style in leads}) == len(leads)
    assert len({str(style.line) for style in leads[1:]}) == len(leads) - 1
    ours = [plotting.STYLES[name] for name in ALL_METHODS if name not in ("jvp",)]
    assert len({(style.colour, str(style.line)) for style in ours}) == len(ours)


def test_other_series_borrow_no_method_s_colour() -> None:
    taken = {to_rgb(style.colour) for style in plotting.STYLES.values()}
    assert not taken & {to_rgb(colour) for colour in plotting.OTHER_COLOURS}
    plotting.set_style()
    cycle = {to_rgb(entry["color"]) for entry in plt.rcParams["axes.prop_cycle"]}
    assert not taken & cycle


def test_line_of_is_what_matplotlib_draws() -> None:
    figure, axis = plt.subplots()
    [line] = axis.plot([0, 1], [0, 1], **plotting.line_of("CFG"))
    assert to_rgb(line.get_color()) == to_rgb(plotting.COLOURS["CFG"])
    assert line.get_linestyle() == "--"
    plt.close(figure)
    with pytest.raises(ValueError, match=r"name must be one of .*got 'CGF'"):
        plotting.line_of("CGF")


def test_gallery_refuses_rows_of_different_lengths() -> None:
    picture = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match=r"equally many pictures, at least one each, got \[1, 2\]"):
        plotting.gallery({"a": [picture], "b": [picture, picture]})


def drawing_code() -> list[tuple[str, str]]:
    """Every module and notebook cell that draws, by its place."""
    modules = [*(ROOT / "companion").rglob("*.py"), ROOT / "demo.py"]
    found = [(str(path.relative_to(ROOT)), path.read_text()) for path in modules if path.name != "plotting.py"]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for number, cell in enumerate(json.loads(path.read_text())["cells"]):
            if cell["cell_type"] == "code":
                found.append((f"{path.name}, cell {number}", "".join(cell["source"])))
    return [(place, code) for place, code in found if re.search(r"plotting|matplotlib|plt\.|axis\.|axes\[", code)]


def borrowed(code: str) -> list[str]:
    """Colours that bypass the style module: seaborn's and matplotlib's palettes, and the methods' own, written out."""
    taken = {to_rgb(style.colour) for style in plotting.STYLES.values() if style.colour != "#000000"}
    found = []
    code = "\n".join(line for line in code.splitlines() if not line.startswith("%"))  # without IPython's commands
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and node.attr in ("PALETTE", "color_palette"):
            found.append(node.attr)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if re.fullmatch(r"C\d|tab:\w+", text) or (re.fullmatch(r"#[0-9a-fA-F]{6}", text) and to_rgb(text) in taken):
                found.append(text)
    return found


def test_nothing_draws_with_borrowed_colours() -> None:
    code = drawing_code()
    assert len(code) > 30
    assert {place: found for place, text in code if (found := borrowed(text))} == {}


def test_borrowing_is_noticed() -> None:
    assert borrowed('axis.plot(x, y, color="C0")') == ["C0"]
    assert borrowed("colour = plotting.PALETTE[1]") == ["PALETTE"]
    assert borrowed('axis.plot(x, y, color="#0173B2")') == ["#0173B2"]
    assert borrowed('axis.plot(x, y, **plotting.line_of("CFG"))') == []
