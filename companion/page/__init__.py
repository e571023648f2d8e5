"""The demo's page, in Gradio: its controls, what it shows while it samples, and its error messages.

The page samples nothing itself: a tab reads its controls into settings and shows what
`companion.evaluation.comparison.side_by_side` yields.
"""

import logging
import traceback
from collections.abc import Sequence
from typing import Any

from companion.extras import need

need("demo", __name__)

import gradio as gr
from gradio.tunneling import CURRENT_TUNNELS
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from companion.page.classifier_tab import classifier_tab
from companion.page.explore_tab import EXPLORE_TAB, explore_tab
from companion.page.guidance_tab import guidance_tab
from companion.page.listeners import Listeners, allowed_hosts
from companion.page.models import CLASSIFIER_TAB, Models
from companion.page.queue import LONGEST_QUEUE, Queue
from companion.page.requests import NOT_UNDERSTOOD, refusing
from companion.page.sweep_tab import sweep_tab
from companion.page.updates import sentence

__all__ = ["Models", "build_page", "serve"]

_log = logging.getLogger(__name__)

_HOUR = 3600  # seconds

_INTRODUCTION = """
<h1>CFG and REG, side by side</h1>
<p>Classifier-free guidance (<b>CFG</b>) moves a picture along Δ, towards what you asked for. A large guidance scale
breaks shapes and colours. Rectified gradient guidance (<b>REG</b>) multiplies Δ by K, the derivative of the model's
estimate of the finished picture. K is small at high noise and where the model is already certain, so REG guides less
there. Both sides start from the same noise.</p>
<p>Papers: <a href="https://arxiv.org/abs/2501.18865" target="_blank" rel="noopener">REG, ICML 2025</a> ·
<a href="https://arxiv.org/abs/2511.05844" target="_blank" rel="noopener">calibration and regularization, 2025</a></p>
"""

_CSS = """
.gradio-container { max-width: 1500px !important; margin: 0 auto !important; }
#head h1 { font-size: 1.5rem; margin: 0; }
#head p { margin: .25rem 0 0; color: var(--body-text-color-subdued); max-width: 62rem; line-height: 1.45; }
#head a { color: var(--link-text-color); white-space: nowrap; }
.introduction p { margin: .1rem 0 .3rem; color: var(--body-text-color-subdued); max-width: 62rem; line-height: 1.45; }
.tab-container { flex-wrap: wrap !important; height: auto !important; }
.title { font-weight: 600; margin: 0 0 .3rem; }
.title span { font-weight: 400; color: var(--body-text-color-subdued); }
.pictures .grid-wrap { min-height: 0 !important; max-height: none !important; padding: 0; overflow: visible; }
.pictures .grid-container { grid-template-columns: repeat(auto-fill, minmax(min(104px, 45%), 1fr)) !important;
  grid-template-rows: none; grid-auto-rows: auto; gap: 8px; }
.pictures .gallery-item, .pictures .thumbnail-item { height: auto; aspect-ratio: auto; overflow: visible; }
.pictures .thumbnail-item { display: flex; flex-direction: column; background: none; box-shadow: none; }
.pictures .thumbnail-item img { aspect-ratio: 1; height: auto; }
.pictures .caption-label { position: static; max-width: none; white-space: normal; overflow-wrap: anywhere;
  border: 0; background: none; font-size: .75rem; line-height: 1.25; padding: 3px 4px; opacity: 1 !important; }
.pictures .empty { min-height: 9rem; }
.status { padding: .5rem .75rem; border-radius: 8px; border-left: 4px solid var(--border-color-primary);
  background: var(--background-fill-secondary); min-height: 2.4rem; overflow-wrap: anywhere; }
.status.busy { border-left-color: #0072b2; }
.status.done { border-left-color: #009e73; }
.status.error { border-left-color: #d55e00; font-weight: 600; }
.bar { height: 8px; border-radius: 4px; overflow: hidden; background: var(--border-color-primary); }
.bar > div { height: 100%; background: #0072b2; }
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
#explore-see p { margin: 0; max-width: 62rem; line-height: 1.45; min-height: 2.9em; }
.explored { width: 100%; max-width: 620px; height: auto; background: white; border-radius: 6px; }
footer { opacity: .7; }
"""

# Gradio moves a number typed beyond a slider's range into it without a word when its box loses the focus. Here the
# number stays in its box, as it does in every other one, beside the sentence about it.
_KEEP_TYPED_NUMBERS = """
() => document.addEventListener("blur", (event) => {
  if (event.target.matches?.("input[data-testid=number-input]")) event.stopImmediatePropagation();
}, true)
"""


class _Page(gr.Blocks):
    """Gradio's page, which answers a call that it cannot understand in one sentence and prints no traceback about it.

    A tab's runs say themselves what is wrong (`running`). What fails here are the values of a call: too few, of other
    types, or of an event that no program can cause.
    """

    def close(self, verbose: bool = True) -> None:
        super().close(verbose)
        for tunnel in CURRENT_TUNNELS:  # of a public link, a process of its own
            tunnel.kill()

    async def process_api(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return await super().process_api(*args, **kwargs)
        except gr.Error as error:
            error.print_exception = False
            raise
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} in {place.filename}, line {place.lineno}"
            _log.warning("a call failed: %s: %s", where, sentence(error))
            raise gr.Error(NOT_UNDERSTOOD, print_exception=False) from None


def build_page(models: Models, queue: Queue | None = None) -> gr.Blocks:
    """The page, ready to be served.

    Args:
        models: to choose from.
        queue: of all the page's runs.
    """
    queue = queue or Queue()
    with _Page(title="CFG and REG, side by side", analytics_enabled=False, delete_cache=(_HOUR, _HOUR)) as page:
        gr.HTML(_INTRODUCTION, elem_id="head", padding=False)
        with gr.Tabs():
            with gr.Tab("CFG and REG"):
                guidance_tab(page, models, queue)
            with gr.Tab(EXPLORE_TAB) as exploring:
                explore_tab(exploring)
            with gr.Tab("Scale sweep"):
                sweep_tab(page, models, queue)
            with gr.Tab(CLASSIFIER_TAB):
                classifier_tab(page, models, queue)
        page.load(js=_KEEP_TYPED_NUMBERS)
    return page


def serve(models: Models, *, host: str, port: int, share: bool = False, hosts: Sequence[str] = ()) -> Any:
    """Build the page and serve it from threads of its own; returns it with its `local_url`, and its `share_url` if any.

    Args:
        models: to choose from.
        host, port: where to listen.
        share: also make a public link.
        hosts: host names to serve, besides this machine's own; requests under other names are refused.

    Raises:
        OSError: the port is in use.
    """
    listeners = Listeners()
    page = build_page(models, Queue(listeners.unheard))
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "DejaVu Sans", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    page.queue(api_open=False, max_size=LONGEST_QUEUE, default_concurrency_limit=8)
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        theme=gr.themes.Default(
            primary_hue="blue", neutral_hue="slate", font=sans, font_mono=mono, spacing_size="sm"
        ).set(body_text_color_subdued="*neutral_500"),  # Gradio's own grey has a contrast of 2.6 on white; this 4.8
        css=_CSS,
        footer_links=["api"],
        max_file_size="1mb",  # the page takes no files
        state_session_capacity=1000,
        app_kwargs={
            "middleware": [
                Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts(host, *hosts, share=share)),
                Middleware(listeners.middleware),
                Middleware(refusing),
            ]
        },
    )
    return page
