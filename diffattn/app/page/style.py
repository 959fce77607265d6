"""The look of the page, and its few lines of script. Uses system fonts and loads nothing from elsewhere."""

import gradio as gr

THEME = gr.themes.Soft(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "Consolas", "monospace"]
).set(
    block_label_background_fill="transparent", block_label_background_fill_dark="transparent",
    block_label_text_color="*neutral_700", block_label_text_color_dark="*neutral_200",
    block_title_background_fill="transparent", block_title_background_fill_dark="transparent",
    block_title_text_color="*neutral_700", block_title_text_color_dark="*neutral_200", block_title_padding="0",
    block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
    body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
    button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700", button_primary_background_fill_hover_dark="*primary_800",
    checkbox_label_background_fill_selected="*primary_700", checkbox_label_background_fill_selected_dark="*primary_700",
    checkbox_label_border_color_selected="*primary_700", checkbox_label_border_color_selected_dark="*primary_700",
    link_text_color="*primary_700", link_text_color_dark="*primary_300",
)  # fmt: skip

CSS = """
body:not(.dark) { --color-accent: var(--primary-700); }
.gradio-container .cm-line span, .gradio-container .json-node span { color: inherit !important; }
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
.diffattn-split { display: grid !important; grid-template: "ask result" auto "rest result" 1fr / minmax(0, 2fr)
  minmax(0, 3fr); gap: 1rem !important; align-items: start; }
.diffattn-split > * { min-width: 0 !important; width: 100%; }
.diffattn-ask { grid-area: ask; }
.diffattn-result { grid-area: result; }
.diffattn-rest { grid-area: rest; }
.diffattn-stage { min-height: 1.6rem; }
.diffattn-stage p { margin: 0 0 .4rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.diffattn-line { margin: 0; overflow-wrap: anywhere; font-size: .9rem; }
.diffattn-preview { width: 100%; border-radius: 8px; }
.diffattn-result:has(.diffattn-preview) .diffattn-pictures { display: none !important; }
.diffattn-result:not(:has(.diffattn-busy)) .diffattn-stop { display: none !important; }
.diffattn-result:has(#gallery img, .diffattn-preview) #first { display: none !important; }
.diffattn-result:has(#first):not(:has(#gallery img)) #gallery { display: none !important; }
.diffattn-filled:not(:has(.file-preview)) { display: none !important; }
.diffattn-result:not(:has(#gallery img)) .diffattn-after { display: none !important; }
#gallery .grid-container:not(:has(> :nth-child(2))) { grid-template-columns: minmax(0, 1fr) !important; }
[data-testid=status-tracker]:has(.error) { display: none !important; }
.diffattn-bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); margin-bottom: .6rem; }
.diffattn-bar div { height: 100%; border-radius: 4px; background: var(--color-accent); transition: width .2s; }
.diffattn-pictures .grid-wrap { max-height: none !important; }
.diffattn-slider { position: relative; overflow: hidden; border-radius: 8px; touch-action: pan-y; }
.diffattn-slider img { display: block; width: 100%; margin: 0; }
.diffattn-slider img.after { position: absolute; inset: 0; height: 100%; clip-path: inset(0 0 0 var(--at)); }
.diffattn-slider i { position: absolute; top: 0; bottom: 0; left: var(--at); width: 3px; margin-left: -1.5px;
  background: #fff; box-shadow: 0 0 4px #000; pointer-events: none; }
.diffattn-slider i::after { content: "⇔"; position: absolute; top: 50%; left: 50%; transform: translate(-50%, -50%);
  background: #fff; color: #111; border-radius: 50%; width: 2rem; height: 2rem; line-height: 2rem; text-align: center;
  font-style: normal; box-shadow: 0 0 4px #000; }
.diffattn-slider span { position: absolute; top: .5rem; padding: .1rem .5rem; border-radius: 4px; background: #000c;
  color: #fff; font-size: .85rem; pointer-events: none; }
.diffattn-slider .left { left: .5rem; } .diffattn-slider .right { right: .5rem; }
.diffattn-slider input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0;
  cursor: ew-resize; }
.diffattn-slider:focus-within { outline: 3px solid var(--color-accent); outline-offset: 2px; }
.diffattn-verdict { display: flex; flex-wrap: wrap; gap: 1rem 2rem; margin-bottom: .6rem; }
.diffattn-card { display: flex; flex-direction: column; }
.diffattn-card strong { font-size: 1.7rem; line-height: 1.2; }
.diffattn-card span { font-size: .85rem; }
.diffattn-small { font-size: .8rem; margin: .3rem 0 0; }
.diffattn-examples button, .diffattn-examples td { cursor: pointer; }
.diffattn-table { overflow-x: auto; font-size: .85rem; }
.diffattn-table table { border-collapse: collapse; border: 0 !important; width: 100%;
  font-variant-numeric: tabular-nums; }
.diffattn-table thead, .diffattn-table tbody, .diffattn-table tr { border: 0 !important; }
.diffattn-table th, .diffattn-table td { padding: .35rem .5rem; text-align: left; white-space: nowrap;
  border: 0; border-bottom: 1px solid var(--border-color-primary); }
.diffattn-table th { white-space: normal; vertical-align: bottom; }
.diffattn-results h2 { font-size: 1.1rem; margin: 1rem 0 .4rem; }
.diffattn-stop { min-height: 2.75rem; }
.diffattn-chart { width: 100%; min-width: 560px; max-width: 1000px; }
.diffattn-scroll { overflow-x: auto; }
.diffattn-panels { display: flex; flex-wrap: wrap; gap: 1rem; overflow-x: auto; }
.diffattn-panel { flex: 1 1 460px; min-width: 440px; max-width: 640px; }
.diffattn-legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; }
.diffattn-legend svg { display: inline; vertical-align: -2px; }
@media (max-width: 768px) {
  .diffattn-split { grid-template: "ask" auto "result" auto "rest" auto / minmax(0, 1fr); }
  .diffattn-split > * { overflow-x: hidden; }
}
"""

FOLD = "() => diffattnFold()"
"""Folds the settings away on a narrow window, where the result comes first."""

# The page's frame, out of reach of `css`: as wide as the window, so that wide tables scroll within it. And the tabs,
# which are measured before `css` is there: on a phone they must leave room for each other.
HEAD = """<meta name="description" content="Diffusion models with linear-cost attention: draw, and compare with exact \
attention.">
<style>
.gradio-container { width: 100% !important; }
@media (max-width: 768px) {
  .gradio-container > .main { padding: 1rem .75rem !important; }
  .gradio-container .tab-container button { padding: 0 .3rem !important; font-size: .8rem !important; }
}
</style>
<script>
let diffattnTab = "generate";
const diffattnTouched = new WeakSet();  // settings that the visitor has opened or closed
function diffattnFold() {
  if (window.innerWidth > 768) return;
  for (const button of document.querySelectorAll(".diffattn-settings > button.open"))
    if (!diffattnTouched.has(button)) button.click();
}
document.addEventListener("click", (event) => {
  const button = event.isTrusted && event.target.closest?.(".diffattn-settings > button");
  if (button) diffattnTouched.add(button);
}, true);
function diffattnSwitch(to, values) {
  const left = diffattnTab, [models, prompts, first, which] = values.slice(6);
  let [prompt, model, seed] = left === "compare" ? values.slice(3, 6) : values.slice(0, 3);
  diffattnTab = to;
  for (const wait of [0, 200, 800]) setTimeout(diffattnFold, wait);  // a tab is laid out when it is first shown
  if (left === "quality") {
    model = models.includes(model) || !models.length ? model : models[0];
    seed = first;
  }
  const measured = models.includes(model) || !model ? models : [model];
  const shared = [prompt, model, seed];
  return [...shared, ...shared, measured, which === "shared" ? prompt : prompts, seed, which];
}
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  const shown = [...document.querySelectorAll(".diffattn-go")].find((button) => button.offsetParent);
  if (shown) { event.preventDefault(); event.stopPropagation(); document.activeElement?.blur(); shown.click(); }
}, true);
document.addEventListener("click", (event) => {
  const go = event.target.closest?.(".diffattn-go");
  if (!go || window.innerWidth > 768) return;
  go.closest(".diffattn-split")?.querySelector(".diffattn-result")?.scrollIntoView({behavior: "smooth"});
}, true);
</script>"""
