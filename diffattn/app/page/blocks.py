"""Gradio's blocks, with errors and files from elsewhere handled differently."""

from collections.abc import Mapping
from typing import Any

import gradio as gr
from gradio_client.utils import is_file_obj_with_meta, is_http_url_like, traverse

from diffattn.app.page.shared import toast


class Page(gr.Blocks):
    """Blocks that show every error as a toast, and fetch nothing.

    Gradio itself logs other errors with their tracebacks, which contain the values that a component refused: what a
    visitor typed, or what a program sent. It also downloads a file that is given by its address, however large.
    """

    async def process_api(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in Gradio; see there."""
        try:
            return await super().process_api(*args, **kwargs)
        except gr.Error as error:
            if not error.print_exception:  # one of ours
                raise
            raise toast(error) from None
        except Exception as error:
            raise toast(error) from None

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        """As Gradio's; raises `ValueError` for a file on another server, and for what only a browser can do."""
        if block_fn.fn is None:
            raise ValueError("only a browser can do this")
        traverse(inputs, _refuse_remote, is_file_obj_with_meta)
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


def _refuse_remote(file: Mapping[str, Any]) -> Mapping[str, Any]:
    if is_http_url_like(file["path"]):
        raise ValueError("files are uploaded here, not fetched from elsewhere")
    return file
