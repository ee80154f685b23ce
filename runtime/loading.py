"""Loading a bundle: read it, look for the proof that is asked for, open the engine, and put a session around it."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.backends import open_engine
from runtime.bundle import Progress
from runtime.parity_proof import open_bundle
from runtime.session import Session


def load(
    bundle: str | os.PathLike[str],
    *,
    backend: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    verify: bool = False,
    weights_folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    profile: str | os.PathLike[str] | None = None,
    engine: str | None = None,
    require_parity: bool | str = False,
    trust: str | os.PathLike[str] | None = None,
) -> Session:
    """Load the bundle in a folder.

    backend, device: None takes the defaults (`onnxruntime`, `cpu`). threads: None takes one per physical core.
    engine: which of the engines that `cierzo build` made, for a backend that runs those; None takes the one that fits.
    verify: also compare every file's hash with the manifest; `Session.unverified` names those that have none.
    weights_folder: where the files with weights lie, if not where the manifest says.
    progress: called with (stage, done, total) in bytes while hashes are compared, and while weights are brought to a
        device.
    profile: a folder, where the engine keeps a profile of every node of every step until `Session.end_profile`; this
        slows every node by about a microsecond. What ONNX Runtime writes there can be opened in Chrome's trace viewer.
    require_parity: refuse what has no receipt by `cierzo validate` that it computes the reference's function; "full"
        asks for one of the full suite. Every file is read, as by `verify`. Who writes to one
        while the session is open may still change what it computes.
    trust: PEM file of an ed25519 public key, by which the receipt must be signed.

    Side effect: the first ONNX Runtime session of a process makes the thread that opens it, and threads started from
    it later, flush denormal numbers to zero (float64 below 2.3e-308 becomes 0), for all of Python.

    Raises what `runtime.parity_proof.open_bundle` does (BundleError, UnprovenError, InputError), and BackendError (see
    `runtime.backends.open_engine`).
    """
    opened = open_bundle(
        bundle, require_parity, trust, backend, engine,
        verify=verify, weights_folder=weights_folder, progress=progress,
    )  # fmt: skip
    folder = None if profile is None else Path(profile)
    return Session(
        opened,
        open_engine(
            opened, backend=backend, device=device, threads=threads, profile=folder, engine=engine, progress=progress
        ),
    )
