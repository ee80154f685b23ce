"""The machine's limits, measured in a process of their own: what they take is not counted among an engine's memory."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType

from exporter import machine
from runtime.errors import CierzoError

BANDWIDTH, FLOAT_PEAK, INT8_PEAK = "bandwidth", "float_peak", "int8_peak"
_REPEATS = 3
"""A limit is what the machine can do, so each answer is the best of a few."""

_SETTLE_SECONDS = 0.05
"""In which the threads of a BLAS fall asleep, before an answer lets the engine go on."""


class MachineLimits:
    """Measures one limit at a time, when asked. To be used in a `with` statement.

    threads: how many the limits are for. bandwidth_bytes, matmul_size, int8_rounds: how much work a measurement is.
    """

    def __init__(
        self,
        threads: int,
        *,
        bandwidth_bytes: int = machine.BANDWIDTH_BYTES,
        matmul_size: int = machine.MATMUL_SIZE,
        int8_rounds: int = machine.INT8_ROUNDS,
    ) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit the engine's threads and memory
        self._connection, other = context.Pipe()
        sizes = (threads, bandwidth_bytes, matmul_size, int8_rounds)
        self._process = context.Process(target=_serve, args=(other, *sizes), daemon=True)
        self._process.start()
        other.close()

    def __enter__(self) -> MachineLimits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join()

    def measure(self, limit: str) -> float | None:
        """Bytes (BANDWIDTH) or operations (FLOAT_PEAK, INT8_PEAK) a second; None where it cannot be measured."""
        try:
            self._connection.send(limit)
            answer: float | None = self._connection.recv()
        except (EOFError, OSError) as error:
            raise CierzoError(
                "The process that measures the machine's limits has ended, most likely for lack of memory: it takes "
                "about 0.7 GB. Free some memory and run the command again."
            ) from error
        return answer


def _serve(connection: Connection, threads: int, bandwidth_bytes: int, matmul_size: int, int8_rounds: int) -> None:
    """Answers until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command ends this process when it is interrupted
    limits: dict[str, Callable[[], float | None]] = {
        BANDWIDTH: machine.ReadBandwidth(threads, bandwidth_bytes),
        FLOAT_PEAK: machine.MatmulPeak(threads, matmul_size),
        INT8_PEAK: machine.Int8Peak(threads, int8_rounds),
    }
    while True:
        try:
            limit = connection.recv()
        except EOFError:
            return
        answers = [answer for _ in range(_REPEATS) if (answer := limits[limit]()) is not None]
        time.sleep(_SETTLE_SECONDS)
        connection.send(max(answers, default=None))
