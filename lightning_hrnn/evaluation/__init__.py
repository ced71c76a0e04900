"""How we know: runs side by side, reports, plots."""

from lightning_hrnn.evaluation.report import Report, environment

__all__ = ["Report", "environment"]
