"""The web page: the layout and wiring for `diffattn.app.jobs`. Start it with `diffattn app`.

Every action is also an endpoint, called from Python like this:

    from gradio_client import Client

    client = Client("http://127.0.0.1:7860")
    status, pictures, files, code, records = client.predict(prompt="T-Rex", api_name="/generate")
    status, pictures, files, code, records = client.predict(
        prompt="T-Rex", model="emoji-sd", acceleration="agent/fast", steps=25, guidance=None, width=None, height=None,
        seed=0, num_images=1, negative_prompt="", recipe=None, api_name="/generate",
    )
    chart, per_step = client.predict("Generate", api_name="/time_steps")  # of this client's latest run

    status, shown, pair, figures, report, data, verdict = client.predict(
        prompt="T-Rex", model="emoji-sd", accelerations=["agent/fast"], steps=25, guidance=None, width=None,
        height=None, seed=0, num_images=2, negative_prompt="", recipe=None, api_name="/compare",
    )
    chart, per_step = client.predict("Compare: agent/fast", api_name="/time_steps")
    status, runs, results, files = client.predict(
        models=["emoji-sd"], accelerations=["agent/fast"], numbers="16, 64", samples=16, steps=20, guidance=None,
        prompts="T-Rex\ntent", extractor="automatic", against="automatic", seed=0, labels=[],
        axis="seconds per picture", api_name="/measure",
    )

    line, estimate = client.predict(model="emoji-sd", steps=25, api_name="/estimate")  # seconds, pictures, error
    line, estimate = client.predict(models=["emoji-sd"], samples=64, api_name="/estimate_measure")
    line, about = client.predict(model="emoji-sd", api_name="/describe_model")  # name, what, width, height, …
    line, answer = client.predict(api_name="/stop")  # stopped

The others are /show_pair, /show_runs and /load_runs, which answer with files.
"""

import os
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported: it reads this on import

import gradio as gr
from gradio.utils import get_upload_folder

from diffattn.app.jobs import Worker
from diffattn.app.page import compare, generate, quality, steps
from diffattn.app.page.blocks import Page
from diffattn.app.page.browser_runs import stored_in_browser
from diffattn.app.page.compare_this import compare_this
from diffattn.app.page.ending import GRACE_SECONDS, end, leave, terminated_like_interrupted
from diffattn.app.page.files import Files
from diffattn.app.page.guard import UPLOAD_BYTES, Access, believing, middleware
from diffattn.app.page.inputs import share
from diffattn.app.page.kept_settings import kept_in_browser
from diffattn.app.page.shared import WAITING
from diffattn.app.page.style import CSS, FOLD, HEAD, THEME

__all__ = ["Access", "build", "launch"]

SESSIONS = 1000  # open pages and programs whose pictures and runs are remembered
THREADS = 40  # besides waiting jobs, each of which holds one
WARM_UP = "diffattn-warm-up"  # name of the thread that loads the first model
CACHE_SECONDS = 3600  # after which pictures are deleted from the server


def build(worker: Worker, files: Files) -> gr.Blocks:
    """The page for a worker; every action is also a named endpoint."""
    with Page(
        title="diffattn", analytics_enabled=False, delete_cache=(CACHE_SECONDS // 4, CACHE_SECONDS), fill_width=True
    ) as page:
        gr.Markdown("# diffattn\nDiffusion models with linear-cost attention: draw, and compare with exact attention.")
        latest, traces = gr.State(None), gr.State({})  # of this visitor's latest runs, see `steps.tab`
        runs = stored_in_browser()
        kept = {name: kept_in_browser(name) for name in ("generate", "compare", "quality")}
        with gr.Tabs() as tabs:
            laid_out: dict[str, Any] = {"render_children": True}  # settings are restored and folded in hidden tabs too
            with gr.Tab("Generate", id="generate", **laid_out) as first:
                drawn = generate.tab(page, worker, files, latest, kept["generate"])
            with gr.Tab("Compare", id="compare", **laid_out) as second:
                compared = compare.tab(page, worker, files, traces, kept["compare"])
            with gr.Tab("Speed and FID", id="quality", **laid_out) as third:
                measured = quality.tab(page, worker, files, runs, kept["quality"], drawn.found.prompt)
            with gr.Tab("Time steps", id="steps", **laid_out) as fourth:
                steps.tab(worker, latest, traces, drawn.run, compared.run)
        compare_this(worker, files, drawn, compared, tabs)
        by_id = {"generate": first, "compare": second, "quality": third, "steps": fourth}
        share(by_id, drawn.found, compared.found, measured)
        page.load(None, None, None, js=FOLD, api_visibility="private")
    page.queue(max_size=WAITING)
    return page


def launch(
    worker: Worker,
    access: Access | None = None,
    *,
    port: int | None = None,
    wait: bool = True,
    warm_up: str | None = "emoji-sd",
    open_browser: bool = False,
) -> tuple[gr.Blocks, str]:
    """Serve the page.

    Args:
        worker: runs the jobs.
        access: who can reach the page; None: this machine only.
        port: None: the first free one from 7860 up.
        wait: block until interrupted, by Ctrl+C or SIGTERM; then delete the visitors' files and end the process.
        warm_up: a model to load right away.
        open_browser: open the page in a browser.

    Raises:
        OSError: the port is taken.
    """
    access = access or Access()
    files, names = Files(Path(get_upload_folder()), CACHE_SECONDS), access.names()
    page = build(worker, files)
    guard = middleware(names, access.from_outside, files.make_room)
    options: dict[str, Any] = dict(
        theme=THEME, css=CSS, head=HEAD, app_kwargs={"lifespan": files.lifespan, "middleware": guard}
    )
    files.open()
    try:
        with terminated_like_interrupted(wait):
            with believing(access.proxy):
                page.launch(
                    server_name=access.host, server_port=port, share=access.share, auth=access.auth, allowed_paths=[],
                    max_file_size=UPLOAD_BYTES, show_error=False, enable_monitoring=False, strict_cors=True,
                    ssr_mode=False, pwa=False, mcp_server=False, run_history=False, footer_links=["api"],
                    state_session_capacity=SESSIONS, max_threads=WAITING + THREADS, inbrowser=open_browser,
                    quiet=not wait, prevent_thread_lock=True,
                    **options,
                )  # fmt: skip
            names |= {urlsplit(page.share_url).hostname or ""} if page.share_url else set()
            page.app.uploaded_file_dir = str(files.folder)
            page.server.config.timeout_graceful_shutdown = GRACE_SECONDS
            if warm_up in worker.models.names():  # only now: a page that cannot be served leaves no thread behind
                threading.Thread(target=worker.warm_up, args=(warm_up,), name=WARM_UP, daemon=True).start()
            while wait and page.is_running:
                time.sleep(0.1)
    except BaseException as error:
        end(page, worker, files)
        if wait and isinstance(error, KeyboardInterrupt):
            leave()
        raise
    return page, page.local_url or ""
