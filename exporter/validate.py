"""Holds a bundle's engine against the reference on the borders where engines go wrong; see `exporter.gate`."""

from __future__ import annotations

from exporter.gate.run import open_matching, validate
from exporter.validation_report import ValidationReport, render

__all__ = ["ValidationReport", "open_matching", "render", "validate"]
