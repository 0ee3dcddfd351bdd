"""Traces, byte budgets and a machine's speeds in, a schedule out: pure, no clock, no device, no files."""

from moec.compiler.schedule.analysis import Analysis, analyse
from moec.compiler.schedule.planner import plan, plan_analysed, plan_many
from moec.compiler.schedule.report import MemoryRow, memory_report

__all__ = ["Analysis", "MemoryRow", "analyse", "memory_report", "plan", "plan_analysed", "plan_many"]
