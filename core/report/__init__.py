"""Reports: one self-contained HTML file with facts, curves, tables and overlay panels."""

from __future__ import annotations

from .building import REPORT_NAME, build_report, evaluation_sections, overall_score
from .curves import curves
from .page import Section, escape, fact_list, folded, paragraphs, render_page, write_page
from .panels import gallery, overlay_panel
from .tables import case_table, comparison_table, dot_plot, result_table, simple_table, summary_table

__all__ = [
    "REPORT_NAME",
    "Section",
    "build_report",
    "case_table",
    "comparison_table",
    "curves",
    "dot_plot",
    "escape",
    "evaluation_sections",
    "fact_list",
    "folded",
    "gallery",
    "overall_score",
    "overlay_panel",
    "paragraphs",
    "render_page",
    "result_table",
    "simple_table",
    "summary_table",
    "write_page",
]
