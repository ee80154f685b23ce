"""Makes the plugins known to TensorRT, process-wide as its registry is.

    with register(flavor, ("RollingAttention",), compute_capability="8.9") as plugins:
        ... parse, build ...
        plugins.raise_failure()         # after every call of the library, and most of all after one that failed

Parsing and loading look plugins up by name, so they must be registered before an engine is loaded too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from runtime.errors import BackendError
from runtime.kernels.cuda.device_launcher import DeviceLauncher
from runtime.kernels.cuda.launch import DeviceLimits, Kernel
from runtime.tensorrt.flavor import Flavor
from runtime.tensorrt_plugins.callbacks import PreparingLauncher, Shared
from runtime.tensorrt_plugins.creators import NAMESPACE, plugin_creators
from runtime.tensorrt_plugins.planned import planned_device

Launchers = Callable[[int], PreparingLauncher]


@dataclass(slots=True)
class _Entry:
    """A creator in the library's registry, which keeps its address only."""

    creator: Any
    terms: tuple[DeviceLimits | None, Launchers]
    shared: Shared
    users: int = 1


_entries: dict[tuple[str, str], _Entry] = {}
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Registration:
    """Plugins that are registered until `deregister`; to be held as long as an engine with them is in use."""

    flavor: Flavor
    names: tuple[str, ...]
    shared: tuple[Shared, ...]

    def raise_failure(self) -> None:
        """Raise BackendError for what a plugin of these could not tell through the library, and forget it.

        Returns if nothing failed. To be called after a call of the library, even one that seems to have gone well.
        """
        for shared in self.shared:
            shared.failures.raise_first()

    @property
    def kernels(self) -> frozenset[Kernel]:
        """All that the engines built so far may launch."""
        return frozenset(kernel for shared in self.shared for kernel in shared.kernels)

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        deregister(self)


def register(
    flavor: Flavor,
    names: Iterable[str],
    *,
    compute_capability: str | None = None,
    launchers: Launchers = DeviceLauncher,
) -> Registration:
    """Register plugins by name (`creators.OPERATIONS`); those that are registered on the same terms are shared.

    compute_capability: of the GPU to build engines for, such as "8.9"; None where engines are only run. launchers: what
    launches kernels on a stream of that address.

    Raises BackendError for an unknown name, for a GPU that there are no kernels for, and if a plugin of that name is
    registered already on other terms or by somebody else.
    """
    planned = None if compute_capability is None else planned_device(compute_capability)
    terms, asked, shared = (planned, launchers), tuple(dict.fromkeys(names)), Shared(launchers)
    creators = plugin_creators(flavor, asked, planned, shared)
    used: list[str] = []
    with _lock:
        try:
            for name in asked:
                _use(flavor, name, _Entry(creators[name], terms, shared))
                used.append(name)
        except BackendError:
            _leave(flavor, used)
            raise
        every = dict.fromkeys(id(_entries[flavor.name, name].shared) for name in asked)
        known = {id(entry.shared): entry.shared for entry in _entries.values()}
        return Registration(flavor, asked, tuple(known[key] for key in every))


def deregister(registration: Registration) -> None:
    """Undo one `register`: the plugins go when nobody else has registered them too."""
    with _lock:
        _leave(registration.flavor, registration.names)


def _use(flavor: Flavor, name: str, entry: _Entry) -> None:
    known = _entries.get((flavor.name, name))
    if known is not None and known.terms == entry.terms:
        known.users += 1
        return
    if known is not None or not flavor.trt.get_plugin_registry().register_creator(entry.creator, NAMESPACE):
        raise BackendError(
            f"{flavor.name} has a plugin {NAMESPACE}.{name} already, made for something else. Build engines in a "
            "process of their own."
        )
    _entries[flavor.name, name] = entry


def _leave(flavor: Flavor, names: Iterable[str]) -> None:
    for name in names:
        entry = _entries.get((flavor.name, name))
        if entry is None:
            continue
        entry.users -= 1
        if entry.users == 0:
            flavor.trt.get_plugin_registry().deregister_creator(entry.creator)
            del _entries[flavor.name, name]
