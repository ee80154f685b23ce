"""Every exception that Cierzo raises on purpose, on one page.

The text of each is one paragraph for a person: what was found, where, and the way out. The `cierzo` command prints
that paragraph without a traceback and exits with `exit_code`: 1 when parity fails, 2 for everything else.

    CierzoError
    ├── ConfigError            a config.json that cannot be represented exactly
    ├── CheckpointError        tensors missing, surplus, misshapen or damaged
    ├── ExportError            the request to export or its target folder
    │   ├── TraceError         the traced graph is not what the later stages rely on
    │   ├── FusionError        a fusion fired fewer times than its contract says
    │   └── ProofError         a rewrite changed the numbers
    ├── BundleError            a bundle that is damaged, incomplete or of another schema
    │   └── UnprovenError      no receipt of parity that fits, where one was asked for
    ├── BackendError           the engine asked for is not there or cannot run this bundle
    ├── SessionError           a request to a loaded session
    │   ├── InputError         token ids, shapes or sampling options
    │   └── ContextError       a full-attention buffer would overflow
    ├── TokenizerError         text in, text out
    └── ParityError            the engine does not compute the reference's function
"""

from __future__ import annotations


class CierzoError(Exception):
    """Root of the tree; `except CierzoError` catches everything that Cierzo refuses."""

    exit_code = 2


class ConfigError(CierzoError):
    """The checkpoint's config.json holds something that Cierzo cannot represent exactly."""


class CheckpointError(CierzoError):
    """The checkpoint's tensors are missing, surplus, misshapen, truncated or of an unknown kind."""


class ExportError(CierzoError):
    """An export was asked for that cannot be done as asked."""


class TraceError(ExportError):
    """The graph that came out of torch.export is not what the later stages rely on."""


class FusionError(ExportError):
    """A fusion matched a different number of times than the architecture says it must."""


class ProofError(ExportError):
    """A rewritten region computes something else than the region that it replaced."""


class BundleError(CierzoError):
    """A bundle is damaged, incomplete, or written by a schema that this version does not know."""


class UnprovenError(BundleError):
    """A proof of parity was asked for, and the bundle has no receipt that fits what is there."""


class BackendError(CierzoError):
    """The backend or device asked for is missing, or cannot run this bundle exactly."""


class SessionError(CierzoError):
    """A loaded session was asked for something that it cannot do."""


class InputError(SessionError, ValueError):
    """Token ids, shapes or options that a session cannot take."""


class ContextError(SessionError):
    """Feeding these tokens would run past the end of a full-attention buffer."""


class TokenizerError(CierzoError):
    """The tokenizer or the chat template cannot do what was asked."""


class ParityError(CierzoError):
    """The engine does not compute the reference's function within its error budget."""

    exit_code = 1
