"""Old public names: they go on working for one version, and warn with the new name."""

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def renamed_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` that finds old names.

    Args:
        module: the module's `__name__`.
        names: old name -> new name in the same module.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", names[name])
        return getattr(sys.modules[module], names[name])

    return get


class RenamedAttribute:
    """In a class body, `old = RenamedAttribute("old", "new")`: reading `old` warns and reads `new`."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:  # tools that list a class's attributes use none of them
            return self
        warn_renamed(f"{owner.__name__}.{self.old}", self.new)
        return getattr(instance, self.new)


class RenamedKeys(dict[str, Any]):
    """A table that also finds its rows by old names, given as old name -> new name."""

    def __init__(self, table: Mapping[str, Any], **names: str) -> None:
        super().__init__(table)
        self._names = names

    def __missing__(self, old: str) -> Any:
        if old not in self._names:
            raise KeyError(old)
        warn_renamed(repr(old), repr(self._names[old]))
        return self[self._names[old]]


def warn_renamed(old: str, new: str) -> None:
    """Warn the caller's caller that an old name was used."""
    warn_deprecated(old, f"it is now called {new}", level=4)


def warn_deprecated(old: str, instead: str, level: int = 3) -> None:
    """Warn the caller's caller, or one further up, that something old was used."""
    warnings.warn(f"{old} is deprecated: {instead}", DeprecationWarning, stacklevel=level)
