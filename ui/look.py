"""The studio's own look: a theme, and what the theme cannot say in CSS. Nothing is fetched from anywhere."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

CSS = Path(__file__).parent / "studio.css"
SCRIPT = Path(__file__).parent / "studio.js"
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Consolas", "monospace"]


def head() -> str:
    """The rules for phones once more: the library makes those it is given as `css` hold inside a page alone, and not
    for the navigation above."""
    return f"<style>{CSS.read_text().partition('/* on a phone */')[2]}</style>"


PLUM = gr.themes.Color(
    name="plum",
    c50="#f7f2fb", c100="#ede2f6", c200="#dac6ec", c300="#c1a0dd", c400="#a675cb", c500="#8a50b5",
    c600="#733d9c", c700="#5f317f", c800="#4c2965", c900="#3b214e", c950="#231230",
)  # fmt: skip
PAPER = gr.themes.Color(
    name="paper",
    c50="#faf7f2", c100="#f3efe9", c200="#e5dfd6", c300="#cfc6ba", c400="#9d9489", c500="#70685f",
    c600="#575049", c700="#3f3a36", c800="#292624", c900="#1d1b1a", c950="#141213",
)  # fmt: skip


def theme() -> gr.themes.Base:
    return gr.themes.Base(
        primary_hue=PLUM, secondary_hue=PLUM, neutral_hue=PAPER, font=FONTS, font_mono=MONO,
        radius_size=gr.themes.sizes.radius_lg, spacing_size=gr.themes.sizes.spacing_md,
    ).set(
        body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_900", body_text_color_dark="*neutral_100",
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        block_background_fill="white", block_background_fill_dark="#1e1b1c",
        block_border_width="1px", block_border_color="*neutral_200", block_border_color_dark="*neutral_800",
        block_label_background_fill="transparent", block_label_background_fill_dark="transparent",
        block_label_text_color="*neutral_600", block_label_text_color_dark="*neutral_300",
        block_label_border_width="0px", block_shadow="none", block_title_text_weight="600",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
        input_background_fill="*neutral_50", input_background_fill_dark="*neutral_950",
        input_border_width="1px", input_border_color="*neutral_300", input_border_color_dark="*neutral_700",
        input_border_color_focus="*primary_500", input_border_color_focus_dark="*primary_400",
        input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600", button_primary_background_fill_dark="*primary_500",
        button_primary_background_fill_hover="*primary_700", button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white", button_primary_text_color_dark="white",
        button_secondary_background_fill="*neutral_100", button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover="*neutral_200",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_border_color="*neutral_200", button_secondary_border_color_dark="*neutral_700",
        panel_background_fill="transparent", panel_background_fill_dark="transparent",
        slider_color="*primary_600", slider_color_dark="*primary_400",
        checkbox_background_color_selected="*primary_600", checkbox_background_color_selected_dark="*primary_500",
    )  # fmt: skip
