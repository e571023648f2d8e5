"""Formulas as MathML, which browsers draw themselves: the site loads no script for them and nothing from elsewhere."""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

_SPELLINGS = (
    (re.compile(r"\\(big|Big|bigg|Bigg)(?![A-Za-z])"), r"\\\1l"),
    (
        re.compile(r"\\(bar|hat|tilde|vec|dot|overline|widehat|widetilde)(?![A-Za-z])\s*(\\[A-Za-z]+|\w|\{[^{}]*\})"),
        r"{\\\1{\2}{}}",
    ),
    (re.compile(r"\\dots(?![A-Za-z])"), r"\\ldots"),
    (re.compile(r"\\([dt]?frac)\s*(\w)\s*(\w)"), r"\\\1{\2}{\3}"),
)
"""What docutils does not read, or draws wrongly (the t of an accented α_t below α) -> the same as it reads it."""


def mathml(tex: str, *, block: bool = False) -> str:
    """A formula's MathML element.

    Raises:
        docutils.utils.math.MathError: a command that docutils does not know.
    """
    for pattern, spelling in _SPELLINGS:
        tex = pattern.sub(spelling, tex)
    return str(tex2mathml(tex, as_block=block))


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(f'<span class="inline-formula">{mathml(node.astext())}</span>')
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{mathml(node.astext(), block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))  # type: ignore[arg-type]
    return {"parallel_read_safe": True, "parallel_write_safe": True}
