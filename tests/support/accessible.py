"""What keeps a page from being read: contrast too low, things without a name. Computed in the page itself.

These are the rules of axe-core that the page could break (color-contrast, image-alt, button-name, label, link-name,
svg-img-alt, document-title, html-has-lang, scrollable-region-focusable), written from their definitions.
"""

from typing import Any

SCRIPT = r"""
() => {
  const problems = [], canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  canvas.canvas.width = canvas.canvas.height = 1;
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => top.slice(0, 3).map((c, i) => c * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = (c) => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = c.slice(0, 3).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const background = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const style = getComputedStyle(e);
      if (style.backgroundImage.includes("gradient")) return null;
      const colour = rgba(style.backgroundColor);
      if (colour[3]) layers.push(colour);
      if (colour[3] === 1) break;
    }
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]);
  };
  const opacity = (element) => {
    let found = 1;
    for (let e = element; e; e = e.parentElement) found *= Number(getComputedStyle(e).opacity);
    return found;
  };
  const shown = (element) => {
    const box = element.getBoundingClientRect();
    return element.checkVisibility({checkVisibilityCSS: true}) && box.width > 1 && box.height > 1;
  };
  const where = (e) => `${e.tagName.toLowerCase()}#${e.id}.${String(e.className.baseVal ?? e.className).slice(0, 60)}`;
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, text = texts.currentNode.textContent.trim();
    if (!text || !shown(element) || element.closest("script, style, title, :disabled, [aria-disabled=true]")) continue;
    const style = getComputedStyle(element), below = background(element), seen = opacity(element);
    if (!below || !seen) continue;
    const colour = rgba(element.closest("svg") ? style.fill : style.color);
    colour[3] *= seen * (element.closest("svg") ? Number(style.fillOpacity) : 1);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const got = ratio(over(colour, below), below);
    const said = `contrast ${got.toFixed(2)}: "${text.slice(0, 40)}" in ${where(element)}`;
    if (got < (large ? 3 : 4.5)) problems.push(said);
  }
  const texted = (id) => document.getElementById(id)?.textContent.trim();
  const named = (e) => (e.getAttribute("aria-label") || e.textContent || e.title || e.alt || "").trim()
    || [...(e.labels || [])].some((label) => label.textContent.trim())
    || (e.getAttribute("aria-labelledby") || "").split(" ").some(texted)
    || [...e.querySelectorAll("img[alt], svg[aria-label]")].length;
  const used = "button, a[href], input:not([type=hidden]), textarea, select, [role=button], [role=img]";
  for (const e of document.querySelectorAll(used))
    if (shown(e) && !e.closest("[aria-hidden=true]") && !named(e)) problems.push(`no name: ${where(e)}`);
  for (const e of document.querySelectorAll("img"))
    if (!e.hasAttribute("alt")) problems.push(`no alternative text: ${where(e)}`);
  for (const e of document.querySelectorAll("*")) {
    const style = getComputedStyle(e), scrolls = ["auto", "scroll"];
    const wide = scrolls.includes(style.overflowX) && e.scrollWidth > e.clientWidth + 14;
    const high = scrolls.includes(style.overflowY) && e.scrollHeight > e.clientHeight + 14;
    const inside = "a[href], button, input, textarea, select, [tabindex]";
    if ((wide || high) && shown(e) && e !== document.documentElement && e !== document.body)
      if (!e.matches(inside) && !e.querySelector(inside)) problems.push(`the keyboard cannot scroll ${where(e)}`);
  }
  if (!document.title) problems.push("no title");
  if (!document.documentElement.lang) problems.push("no language");
  if (!document.querySelector("meta[name=description]")?.content) problems.push("no description");
  return [...new Set(problems)];
}
"""


def problems(page: Any) -> list[str]:
    """One line for everything that is shown now and cannot be read or named."""
    return page.evaluate(SCRIPT)
