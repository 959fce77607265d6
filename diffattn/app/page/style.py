"""The look of the page and its one keyboard shortcut. Uses system fonts and loads nothing from elsewhere."""

import gradio as gr

THEME = gr.themes.Soft(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "Consolas", "monospace"]
)

CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
.diffattn-stage { min-height: 2.2rem; }
.diffattn-stage p { margin: 0 0 .4rem; font-variant-numeric: tabular-nums; }
.diffattn-stage img { width: min(100%, 384px); border-radius: 8px; }
.diffattn-bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); margin-bottom: .6rem; }
.diffattn-bar div { height: 100%; border-radius: 4px; background: var(--color-accent); transition: width .2s; }
#gallery { max-width: 420px; }
.diffattn-split > * { min-width: 0 !important; }
@media (max-width: 768px) { .diffattn-split { flex-direction: column; max-width: 100%; }
  .diffattn-split > * { width: 100%; overflow-x: hidden; } }
.diffattn-table { overflow-x: auto; font-size: .85rem; }
.diffattn-table table { border-collapse: collapse; border: 0 !important; width: 100%;
  font-variant-numeric: tabular-nums; }
.diffattn-table thead, .diffattn-table tbody, .diffattn-table tr { border: 0 !important; }
.diffattn-table th, .diffattn-table td { padding: .35rem .5rem; text-align: left; white-space: nowrap;
  border: 0; border-bottom: 1px solid var(--border-color-primary); }
.diffattn-table th { white-space: normal; vertical-align: bottom; }
.diffattn-chart { width: 100%; min-width: 560px; max-width: 1000px; }
.diffattn-scroll { overflow-x: auto; }
.diffattn-panels { display: flex; flex-wrap: wrap; gap: 1rem; }
.diffattn-panel { flex: 1 1 320px; min-width: 0; max-width: 600px; }
.diffattn-legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; }
.diffattn-legend svg { display: inline; vertical-align: -2px; }
"""

# The page's frame, out of reach of `css`: as wide as the window, so that wide tables scroll within it.
HEAD = """<style>.gradio-container { width: 100% !important; }</style>
<script>
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  const shown = [...document.querySelectorAll(".diffattn-go")].find((button) => button.offsetParent);
  if (shown) { event.preventDefault(); event.stopPropagation(); document.activeElement?.blur(); shown.click(); }
}, true);
</script>"""
