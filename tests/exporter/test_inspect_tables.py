"""How numbers and bytes are written for people."""

from __future__ import annotations

import pytest

from exporter.inspect_tables import count, size


@pytest.mark.parametrize(
    "number, text",
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 K"),
        (7_241_732_096, "7.24 B"),
        (140_620_634_112, "141 B"),
        (99_960, "100 K"),
        (999_999, "1.00 M"),
    ],
)
def test_counts(number: int, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize("nbytes, text", [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (32 * 2**30, "32.0 GiB")])
def test_sizes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text
