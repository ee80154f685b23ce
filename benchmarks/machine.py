"""The machine, as `cierzo bench` measures it too: see exporter/machine.py."""

from __future__ import annotations

from exporter.machine import MatmulPeak, ReadBandwidth, describe, memory_of, seconds

__all__ = ["MatmulPeak", "ReadBandwidth", "describe", "memory_of", "seconds"]
