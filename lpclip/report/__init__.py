"""What people look at: tables for the terminal, pictures for MLflow and the README, a page for the browser."""

from lpclip.report.evaluation_figures import (
    corruption_figure,
    effective_robustness_figure,
    ood_figure,
    risk_coverage_figure,
    severity_figures,
)
from lpclip.report.page import Example, Picture, Section, render_page
from lpclip.report.style import COLOURS, MORE_COLOURS, colours, png, save
from lpclip.report.tables import table
from lpclip.report.training_figures import (
    comparison_figure,
    confusion_matrix_figure,
    reliability_figure,
    rounds_figure,
)

__all__ = [
    "COLOURS",
    "MORE_COLOURS",
    "Example",
    "Picture",
    "Section",
    "colours",
    "comparison_figure",
    "confusion_matrix_figure",
    "corruption_figure",
    "effective_robustness_figure",
    "ood_figure",
    "png",
    "reliability_figure",
    "render_page",
    "risk_coverage_figure",
    "rounds_figure",
    "save",
    "severity_figures",
    "table",
]
