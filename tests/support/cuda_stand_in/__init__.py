"""A stand-in for a GPU: libraries under the names of CUDA's, on which the real onnxruntime-gpu loads and runs.

Device memory is memory that only copies can reach, copies copy, and kernels are written down by name instead of being
run. So which nodes the CUDA provider takes, which kernels it dispatches them to, what it copies and waits for, and
whether a step can be captured as a CUDA graph is the real thing; numbers are not.
"""

from tests.support.cuda_stand_in.build import StandInError, stand_in_libraries
from tests.support.cuda_stand_in.journal import CAPABILITIES, JOURNAL, Event, read_journal

__all__ = ["CAPABILITIES", "JOURNAL", "Event", "StandInError", "read_journal", "stand_in_libraries"]
