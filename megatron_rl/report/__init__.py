"""Reports: one self-contained HTML page per comparison, and the same numbers as rows for a terminal table."""

from megatron_rl.report.page import build_report, keep_current
from megatron_rl.report.runs import summarise

__all__ = ["build_report", "keep_current", "summarise"]
