"""The demo's page, in Gradio: what is asked, what is shown while it is made, and what is said when something is wrong.

The page samples nothing itself: a tab reads its controls into settings and shows what
`companion.evaluation.comparison.side_by_side` yields.
"""

from typing import Any

import gradio as gr

from companion.page.classifier_tab import classifier_tab
from companion.page.guidance_tab import guidance_tab, read
from companion.page.models import CLASSIFIER_TAB, Models
from companion.page.queue import Turns

__all__ = ["Models", "build_page", "read", "serve"]

_INTRODUCTION = """
<h1>REG, side by side</h1>
<p>Guidance pulls a picture towards what you asked for. <b>Rectified gradient guidance</b> (REG) multiplies that pull Δ
by K, the derivative of the model's own guess of the finished picture: where the model is already certain, it is pulled
less. Both sides start from the same noise.</p>
<p>Papers: <a href="https://arxiv.org/abs/2501.18865" target="_blank" rel="noopener">REG, ICML 2025</a> ·
<a href="https://arxiv.org/abs/2511.05844" target="_blank" rel="noopener">calibration and regularization, 2025</a></p>
"""

_CSS = """
.gradio-container { max-width: 1320px !important; margin: 0 auto !important; }
#head h1 { font-size: 1.5rem; margin: 0; }
#head p { margin: .25rem 0 0; color: var(--body-text-color-subdued); max-width: 62rem; line-height: 1.45; }
#head a { color: var(--link-text-color); white-space: nowrap; }
.introduction p { margin: .1rem 0 .3rem; color: var(--body-text-color-subdued); max-width: 62rem; line-height: 1.45; }
.tab-container { flex-wrap: wrap !important; height: auto !important; }
.title { font-weight: 600; margin: 0 0 .3rem; }
.title span { font-weight: 400; color: var(--body-text-color-subdued); }
.pictures .grid-wrap { min-height: 0 !important; max-height: none !important; padding: 0; }
.pictures .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(min(88px, 45%), 1fr)) !important; gap: 6px; }
.pictures .caption-label { font-size: .66rem; line-height: 1.2; padding: 1px 3px; left: 2px; right: auto; bottom: 2px;
  max-width: calc(100% - 4px); white-space: normal; overflow: visible; }
.pictures .empty { min-height: 9rem; }
.status { padding: .5rem .75rem; border-radius: 8px; border-left: 4px solid var(--border-color-primary);
  background: var(--background-fill-secondary); min-height: 2.4rem; overflow-wrap: anywhere; }
.status.busy { border-left-color: #0072b2; }
.status.done { border-left-color: #009e73; }
.status.error { border-left-color: #d55e00; font-weight: 600; }
.bar { height: 8px; border-radius: 4px; overflow: hidden; background: var(--border-color-primary); }
.bar > div { height: 100%; background: #0072b2; transition: width .15s linear; }
.steps { font-size: .85rem; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums;
  min-height: 1.4em; }
table.measured { width: 100%; font-variant-numeric: tabular-nums; margin: 0; }
table.measured, table.measured :is(tr, th, td) { border: 0 !important; text-align: left; }
table.measured :is(th, td) { padding: .25rem .5rem .25rem 0 !important; }
table.measured tr { border-bottom: 1px solid var(--border-color-primary) !important; }
.script .cm-gutters { display: none; }
table.measured tbody th { font-weight: 400; color: var(--body-text-color-subdued); }
table.measured td span { color: var(--body-text-color-subdued); }
.buttons button { min-width: 0; }
footer { opacity: .7; }
"""


def build_page(models: Models) -> gr.Blocks:
    """The page, ready to be served."""
    turns = Turns()
    with gr.Blocks(title="REG, side by side", analytics_enabled=False) as page:
        gr.HTML(_INTRODUCTION, elem_id="head", padding=False)
        with gr.Tabs():
            with gr.Tab("Guidance with and without REG"):
                guidance_tab(page, models, turns)
            with gr.Tab(CLASSIFIER_TAB):
                classifier_tab(page, models, turns)
    return page


def serve(page: gr.Blocks, *, host: str, port: int, share: bool = False) -> Any:
    """Serve the page from threads of its own; returns the page with its `local_url`, and its `share_url` if any.

    Raises:
        OSError: the port is in use.
    """
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "DejaVu Sans", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    page.queue(default_concurrency_limit=8)
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=sans, font_mono=mono, spacing_size="sm"),
        css=_CSS,
        footer_links=["api"],
    )
    return page
