"""Running bundles: `load` one, feed tokens, generate.

    from runtime import load
    session = load("bundle")
    for token_id in session.generate([1, 5, 7], max_new_tokens=20):
        print(token_id)

Needs numpy; the engine (onnxruntime), tokenizers and jinja2 are imported when they are first used. Never torch.
"""

from runtime.bundle import Bundle, read_bundle
from runtime.errors import (
    BackendError,
    BundleError,
    CierzoError,
    ContextError,
    InputError,
    SessionError,
    TokenizerError,
    UnprovenError,
)
from runtime.generate import GenerationResult, TextStream, generate_text
from runtime.loading import load
from runtime.sampling import SamplingOptions
from runtime.session import Session

__all__ = [
    "BackendError",
    "Bundle",
    "BundleError",
    "CierzoError",
    "ContextError",
    "GenerationResult",
    "InputError",
    "SamplingOptions",
    "Session",
    "SessionError",
    "TextStream",
    "TokenizerError",
    "UnprovenError",
    "generate_text",
    "load",
    "read_bundle",
]
