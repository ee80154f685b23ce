"""Plugins that run the nodes of the domain `cierzo` in TensorRT engines: `register` makes them known to the library.

What a node takes and gives is a `signature.py`, what it computes an `operation.py`; the kinds of nodes are in
rolling_attention.py, moe_gate.py and mixture_of_experts.py. Nothing of that knows TensorRT: its questions are answered
out of it in callbacks.py, its classes are made of these in creators.py, and its registry is in registration.py.
"""

from __future__ import annotations

from runtime.tensorrt_plugins.creators import OPERATIONS, plugin_creators
from runtime.tensorrt_plugins.planned import planned_device
from runtime.tensorrt_plugins.registration import Registration, deregister, register

__all__ = ["OPERATIONS", "Registration", "deregister", "planned_device", "plugin_creators", "register"]
