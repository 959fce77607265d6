"""Gradio's blocks, but for what they do with errors."""

from typing import Any

import gradio as gr

from diffattn.app.page.shared import toast


class Page(gr.Blocks):
    """Blocks whose errors are all toasts.

    Gradio prints others to the log with their tracebacks, and with the values that a component refused: what a visitor
    typed, or what a program sent.
    """

    async def process_api(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As Gradio's; see there."""
        try:
            return await super().process_api(*args, **kwargs)
        except gr.Error as error:
            if not error.print_exception:  # one of ours
                raise
            raise toast(error) from None
        except Exception as error:
            raise toast(error) from None
