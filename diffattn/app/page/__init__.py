"""The web page: the layout and wiring for `diffattn.app.jobs`. Start it with `diffattn app`.

Every action is also an endpoint, called from Python like this:

    from gradio_client import Client

    client = Client("http://127.0.0.1:7860")
    status, pictures, files, code = client.predict(
        prompt="T-Rex", model="emoji-sd", acceleration="agent/fast", steps=25, guidance=None, width=None, height=None,
        seed=0, num_images=1, negative_prompt="", recipe=None, api_name="/generate",
    )
    chart, per_step = client.predict("Generate", api_name="/time_steps")  # of this client's latest run

    status, slider, pair, figures, report = client.predict(
        prompt="T-Rex", model="emoji-sd", accelerations=["agent/fast"], steps=25, guidance=None, width=None,
        height=None, seed=0, num_images=2, negative_prompt="", recipe=None, api_name="/compare",
    )
    chart, per_step = client.predict("Compare: agent/fast", api_name="/time_steps")
    status, runs, results, files = client.predict(
        models=["emoji-sd"], accelerations=["agent/fast"], numbers="16, 64", samples=16, steps=20, guidance=None,
        prompts="T-Rex\ntent", extractor="automatic", against="automatic", seed=0, labels=[],
        axis="seconds per picture", api_name="/measure",
    )

The others are /show_pair, /show_runs, /load_runs, /stop, /describe_model, /estimate and /estimate_measure.
"""

import os
import threading
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported: it reads this on import

import gradio as gr
from gradio.utils import get_upload_folder

from diffattn.app.jobs import Worker
from diffattn.app.page import compare, generate, quality, steps
from diffattn.app.page.browser_runs import stored_in_browser
from diffattn.app.page.files import Files
from diffattn.app.page.shared import WAITING
from diffattn.app.page.style import CSS, HEAD, THEME

__all__ = ["build", "launch"]

THREADS = 40  # besides waiting jobs, each of which holds one
WARM_UP = "diffattn-warm-up"  # name of the thread that loads the first model
CACHE_SECONDS = 3600  # after which pictures are deleted from the server


def build(worker: Worker, files: Files) -> gr.Blocks:
    """The page for a worker; every action is also a named endpoint."""
    with gr.Blocks(
        title="diffattn", analytics_enabled=False, delete_cache=(CACHE_SECONDS // 4, CACHE_SECONDS), fill_width=True
    ) as page:
        gr.Markdown("# diffattn\nDiffusion models with linear-cost attention: draw, and compare with exact attention.")
        latest, traces = gr.State(None), gr.State({})  # of this visitor's latest runs, see `steps.tab`
        runs = stored_in_browser()
        with gr.Tabs():
            with gr.Tab("Generate", id="generate"):
                drawn = generate.tab(page, worker, files, latest)
            with gr.Tab("Compare", id="compare"):
                compared = compare.tab(page, worker, files, traces)
            with gr.Tab("Speed and FID", id="quality"):
                quality.tab(page, worker, files, runs)
            with gr.Tab("Time steps", id="steps"):
                steps.tab(latest, traces, drawn, compared)
    page.queue(max_size=WAITING)
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
    """Serve the page, by default to this machine only.

    Args:
        worker: runs the jobs.
        host: address to listen on.
        port: None: the first free one from 7860 up.
        share: a public link through gradio's servers.
        auth: name and password; needed with `share` and with a host other than loopback.
        wait: block until interrupted.
        warm_up: a model to load right away.
        open_browser: open the page in a browser.

    Raises:
        ValueError: the page would be open to others without a password.
        OSError: the port is taken.
    """
    if (share or host not in ("127.0.0.1", "localhost", "::1")) and not (auth and all(auth)):
        raise ValueError("a page that others can reach needs --auth NAME:PASSWORD (--share, --listen)")
    files = Files(Path(get_upload_folder()), CACHE_SECONDS)
    page = build(worker, files)
    options: dict[str, Any] = dict(theme=THEME, css=CSS, head=HEAD, app_kwargs={"lifespan": files.lifespan})
    try:
        page.launch(
            server_name=host, server_port=port, share=share, auth=auth, allowed_paths=[], max_file_size="1mb",
            show_error=False, enable_monitoring=False, strict_cors=True, ssr_mode=False, pwa=False, mcp_server=False,
            run_history=False, footer_links=["api"], max_threads=WAITING + THREADS, inbrowser=open_browser,
            quiet=not wait, prevent_thread_lock=True, **options,
        )  # fmt: skip
        if warm_up in worker.models.names():  # only now, so that a page that cannot be served leaves no thread behind
            threading.Thread(target=worker.warm_up, args=(warm_up,), name=WARM_UP, daemon=True).start()
        if wait:
            page.block_thread()
    except KeyboardInterrupt:  # during start-up; `block_thread` handles its own
        if not wait:
            raise
        page.close(verbose=False)
    finally:
        if wait:
            worker.close()
    return page, page.local_url or ""
