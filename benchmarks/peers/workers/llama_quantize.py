"""llama.cpp's quantiser: `llama_quantize plain.gguf out.gguf Q4_0`."""

from __future__ import annotations

import importlib
import sys


def main() -> int:
    """0, or what the quantiser returned."""
    llama = importlib.import_module("llama_cpp")
    source, target, kind = sys.argv[1:]
    parameters = llama.llama_model_quantize_default_params()
    parameters.nthread = 0  # as many as there are
    parameters.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}")
    return int(llama.llama_model_quantize(source.encode(), target.encode(), parameters))


if __name__ == "__main__":
    sys.exit(main())
