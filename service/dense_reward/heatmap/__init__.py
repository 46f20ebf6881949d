"""Token rewards -> pictures: HTML, SVG and terminal. Pure, without I/O.

Must not know models, tokenizers or HTTP.
"""

from dense_reward.heatmap.ansi import render_ansi
from dense_reward.heatmap.html import render_html, render_html_document
from dense_reward.heatmap.palette import DEFAULT_PALETTE, PALETTES
from dense_reward.heatmap.rows import (
    HEAD_MEANING,
    HEAD_UNIT,
    MEANINGS,
    Heatmap,
    HeatmapAlternative,
    HeatmapRow,
    build,
    shared_scale,
)
from dense_reward.heatmap.style import palette_variables
from dense_reward.heatmap.svg import render_svg

__all__ = [
    "DEFAULT_PALETTE",
    "HEAD_MEANING",
    "HEAD_UNIT",
    "MEANINGS",
    "PALETTES",
    "Heatmap",
    "HeatmapAlternative",
    "HeatmapRow",
    "build",
    "palette_variables",
    "render_ansi",
    "render_html",
    "render_html_document",
    "render_svg",
    "shared_scale",
]
