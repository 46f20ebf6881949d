"""The stylesheet of HTML heatmaps: one constant text per palette, so that a security policy can allow its hash.

Knows nothing of tokens. Colours are the classes c0 (lowest) to c64, numbered by `palette.level`.
"""

import base64
import hashlib
from functools import cache

from dense_reward.heatmap.palette import PALETTES, STEPS, Colour, Palette, swatches

_LAYOUT = """
.dr-heatmap{--page:#fff;--text:#1b1f24;--dim:#5b6470;--line:#dfe3e8;--card:#fff;--shade:0 6px 24px #0003;
margin:0;padding:1.1rem 1.3rem 1.3rem;background:var(--page);color:var(--text);border-radius:8px;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;text-align:left}
.dr-heatmap+.dr-heatmap{border-top:1px solid var(--line);border-radius:0}
.dr-heatmap *{box-sizing:border-box}
.dr-heatmap p{margin:0}
.dr-heatmap figcaption{display:flex;flex-wrap:wrap;gap:.6rem 2.5rem;align-items:flex-start;
padding-bottom:.9rem;border-bottom:1px solid var(--line)}
.dr-heatmap .about{flex:1 1 22rem}
.dr-heatmap .signal{font-weight:650;font-size:1.05em}
.dr-heatmap .dim,.dr-heatmap .ticks,.dr-heatmap .stats,.dr-heatmap .prompt{color:var(--dim)}
.dr-heatmap .about .dim,.dr-heatmap .ticks,.dr-heatmap .note{font-size:.87em}
.dr-heatmap .scale{flex:0 1 23rem;min-width:13rem}
.dr-heatmap .bar{height:.8rem;border-radius:3px;border:1px solid var(--line);
-webkit-print-color-adjust:exact;print-color-adjust:exact;forced-color-adjust:none}
.dr-heatmap .ticks{display:flex;justify-content:space-between;font-variant-numeric:tabular-nums}
.dr-heatmap .row{padding-top:1rem}
.dr-heatmap .row+.row{margin-top:1.1rem;border-top:1px solid var(--line)}
.dr-heatmap .head{display:flex;flex-wrap:wrap;gap:.1rem 1.4rem;align-items:baseline;margin-bottom:.5rem}
.dr-heatmap .title{font-weight:650;overflow-wrap:anywhere}
.dr-heatmap .stats{display:flex;flex-wrap:wrap;gap:0 1.1rem;font-size:.87em;font-variant-numeric:tabular-nums}
.dr-heatmap .stats b{font-weight:600;color:var(--text)}
.dr-heatmap .mono,.dr-heatmap .prompt,.dr-heatmap .tokens{
font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono","Liberation Mono",monospace}
.dr-heatmap .prompt{font-size:14px;line-height:1.6;white-space:break-spaces;overflow-wrap:anywhere;
margin:0 0 .45rem;padding-left:.7rem;border-left:3px solid var(--line)}
.dr-heatmap .tokens{font-size:14.5px;line-height:1.45}
.dr-heatmap .t{display:inline;cursor:default;outline:none;anchor-scope:--dr-token}
.dr-heatmap .b{display:inline-block;max-width:100%;margin:1px .5px;padding:1px 1px;border-radius:3px;vertical-align:top;
white-space:break-spaces;overflow-wrap:anywhere;direction:ltr;unicode-bidi:isolate;
-webkit-print-color-adjust:exact;print-color-adjust:exact;forced-color-adjust:none}
.dr-heatmap .low .b{position:relative;z-index:1;outline:2px solid var(--text)}
.dr-heatmap .t:hover .b,.dr-heatmap .t:focus .b{position:relative;z-index:2;box-shadow:0 0 0 2px var(--dim)}
.dr-heatmap .none{color:var(--dim);font-style:italic}
.dr-heatmap .tip{display:none;position:fixed;z-index:9;left:12px;right:12px;bottom:12px;max-width:24rem;
padding:.6rem .75rem;pointer-events:none;background:var(--card);color:var(--text);border:1px solid var(--line);
border-radius:8px;box-shadow:var(--shade);font:13px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.dr-heatmap .t:hover .tip,.dr-heatmap .t:focus .tip{display:block}
.dr-heatmap:has(.t:hover) .t:focus:not(:hover) .tip{display:none}
@supports (position-area:block-end) and (anchor-scope:--dr-token){
.dr-heatmap .t:hover .b:first-child,.dr-heatmap .t:focus .b:first-child{anchor-name:--dr-token}
.dr-heatmap .tip{position-anchor:--dr-token;position-area:block-end span-inline-end;inset:auto;margin:6px;
width:max-content;position-try-fallbacks:flip-inline,flip-block,flip-block flip-inline}
}
.dr-heatmap .tip .mono{white-space:break-spaces}
.dr-heatmap .tip table{border-collapse:collapse;width:100%;margin:0;table-layout:auto;font-size:inherit}
.dr-heatmap .tip table tr{background:none;line-height:inherit}
.dr-heatmap .tip th{font-weight:400;color:var(--dim);text-align:left;padding:0 1rem 0 0}
.dr-heatmap .tip td{text-align:right;padding:0 0 0 1rem}
.dr-heatmap .tip td+td.dim{padding-left:.6rem}
.dr-heatmap .tip td[class^=v]{padding:0 .35rem 0 .5rem;border-left:.7rem solid transparent;background-clip:padding-box}
.dr-heatmap .tip td.mono{text-align:left;padding:0}
.dr-heatmap .tip .what{display:flex;justify-content:space-between;gap:1.2rem;margin-bottom:.35rem}
.dr-heatmap .tip .what .mono{font-weight:650;font-size:14px}
.dr-heatmap .tip .shown{font-weight:650}
.dr-heatmap .tip .shown th{font-weight:650;color:inherit}
.dr-heatmap .tip .others{margin-top:.45rem;border-top:1px solid var(--line)}
.dr-heatmap .tip .others tr:first-child th{padding-top:.35rem}
.dr-heatmap .tip .others th+th{text-align:right;padding:.35rem 0 0 1rem}
"""
_DARK_VARIABLES = (
    ".dr-heatmap{--page:#15181d;--text:#e8ebef;--dim:#9aa4b1;--line:#343a43;--card:#20242b;--shade:0 6px 28px #000a}"
)
_PAGE = "body{margin:0;background:#fff}"
_DARK_PAGE = "body{background:#15181d}"


@cache
def stylesheet(palette: Palette) -> str:
    """The rules for heatmaps of this palette, for light and dark surroundings. All selectors begin with .dr-heatmap."""
    dark = _DARK_VARIABLES + _colours(palette, dark=True)
    return f"{_LAYOUT}{_colours(palette, dark=False)}\n@media (prefers-color-scheme:dark){{{dark}}}\n"


@cache
def page_stylesheet(palette: Palette) -> str:
    """The stylesheet of a whole document, which also sets the background of the page."""
    return f"{stylesheet(palette)}{_PAGE}\n@media (prefers-color-scheme:dark){{{_DARK_PAGE}}}\n"


def style_source(palette: Palette) -> str:
    """The Content-Security-Policy source that allows only this palette's `page_stylesheet` as an inline style."""
    digest = hashlib.sha256(page_stylesheet(palette).encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@cache
def palette_variables() -> str:
    """The colours of all palettes as custom properties, for a page that draws tokens itself.

    Below an element with data-palette=NAME, `--c0` to `--c64` are the fills, `--i0` to `--i64` the inks on them, and
    `--bar` is the gradient of the scale. Classes c0 to c64 use them.
    """
    classes = "".join(f".c{step}{{background:var(--c{step});color:var(--i{step})}}\n" for step in range(2 * STEPS + 1))
    return "".join(map(_variables, PALETTES.values())) + classes


def _variables(palette: Palette) -> str:
    pairs = list(zip(swatches(palette, dark=False), swatches(palette, dark=True), strict=True))
    fills = "".join(f"--c{step}:{_either(light.fill, dark.fill)};" for step, (light, dark) in enumerate(pairs))
    inks = "".join(f"--i{step}:{_either(light.ink, dark.ink)};" for step, (light, dark) in enumerate(pairs))
    stops = ",".join(f"var(--c{step})" for step in range(0, 2 * STEPS + 1, 4))
    return f'[data-palette="{palette.name}"]{{{fills}{inks}--bar:linear-gradient(90deg,{stops})}}\n'


def _either(light: Colour, dark: Colour) -> str:
    return light.hex if light == dark else f"light-dark({light.hex},{dark.hex})"


def _colours(palette: Palette, *, dark: bool) -> str:
    colours = swatches(palette, dark=dark)
    figure = f".dr-heatmap.dr-{palette.name}"  # a notebook is one page, with heatmaps of several palettes
    classes = (
        f"{figure} .c{step} .b,{figure} .v{step}{{background:{one.fill.hex};color:{one.ink.hex}}}"
        for step, one in enumerate(colours)
    )
    stops = ",".join(colour.hex for colour in (palette.dark if dark else palette.light))
    return "".join(classes) + f"{figure} .bar{{background:linear-gradient(90deg,{stops})}}"
