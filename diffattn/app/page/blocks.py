"""Gradio's blocks, with errors handled differently."""

from typing import Any

import gradio as gr

from diffattn.app.page.shared import toast


class Page(gr.Blocks):
    """Blocks that show every error as a toast.

    Gradio itself logs other errors with their tracebacks, which contain the values that a component refused: what a
    visitor typed, or what a program sent.
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
