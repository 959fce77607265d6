"""The web page: lays out and wires what `diffattn.jobs` does. Start it with `diffattn app`.

Every action is an endpoint of its own, here from Python:

    from gradio_client import Client

    client = Client("http://127.0.0.1:7860")
    status, pictures, files, code = client.predict(
        prompt="T-Rex", model="emoji-sd", acceleration="agent/fast", steps=25, guidance=None, width=None, height=None,
        seed=0, num_images=1, negative_prompt="", api_name="/generate",
    )
    chart, per_step = client.predict(api_name="/time_steps")  # of this client's latest run

The others are /compare, /show_pair, /stop, /describe_model and /estimate.
"""

import os
import threading
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported, which asks at once

import gradio as gr

from diffattn.jobs import Worker
from diffattn.webui import compare, generate, steps
from diffattn.webui.style import CSS, HEAD, THEME

__all__ = ["build", "launch"]

QUEUE = 64  # jobs that may wait
CACHE_SECONDS = 3600  # pictures are deleted from the server after so long


def build(worker: Worker) -> gr.Blocks:
    """The page over a worker; every action is a named endpoint too."""
    with gr.Blocks(
        title="diffattn", analytics_enabled=False, delete_cache=(CACHE_SECONDS // 4, CACHE_SECONDS), fill_width=True
    ) as page:
        gr.Markdown("# diffattn\nDiffusion models with linear-cost attention: draw, and compare with exact attention.")
        latest = gr.State(None)  # the trace of this visitor's latest run
        with gr.Tabs():
            with gr.Tab("Generate", id="generate"):
                drawn = generate.tab(page, worker, latest)
            with gr.Tab("Compare", id="compare"):
                compare.tab(page, worker)
            with gr.Tab("Time steps", id="steps"):
                steps.tab(latest, drawn)
    page.queue(max_size=QUEUE)
    return page


def launch(
    worker: Worker,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    auth: tuple[str, str] | None = None,
    wait: bool = True,
    warm_up: str | None = "emoji-sd",
    open_browser: bool = False,
) -> tuple[gr.Blocks, str]:
    """Serve the page, on this machine alone unless told otherwise.

    Args:
        worker: what runs the jobs.
        host: address to listen on.
        port: None: the first free one from 7860 on.
        share: a public link through gradio's servers.
        auth: name and password; needed with `share` and with a host other than loopback.
        wait: until interrupted.
        warm_up: a model to load at once.
        open_browser: show the page.

    Raises:
        ValueError: the page would be open to others without a password.
    """
    if (share or host not in ("127.0.0.1", "localhost", "::1")) and not (auth and all(auth)):
        raise ValueError("a page that others can reach needs --auth NAME:PASSWORD (--share, --listen)")
    page = build(worker)
    if warm_up in worker.models.names():
        threading.Thread(target=worker.warm_up, args=(warm_up,), name="diffattn-warm-up", daemon=True).start()
    options: dict[str, Any] = dict(theme=THEME, css=CSS, head=HEAD)
    _, address, _ = page.launch(
        server_name=host, server_port=port, share=share, auth=auth, allowed_paths=[], max_file_size="1mb",
        show_error=False, enable_monitoring=False, strict_cors=True, ssr_mode=False, pwa=False, mcp_server=False,
        run_history=False, footer_links=["api"], inbrowser=open_browser, quiet=not wait, prevent_thread_lock=not wait,
        **options,
    )  # fmt: skip
    return page, address
