"""Optional dependencies: what a part of the package needs beyond the core, and the command that installs it."""

import importlib.util

EXTRAS = {
    "tables": ("matplotlib", "scipy", "seaborn", "torchmetrics"),
    "demo": ("gradio", "starlette"),
    "notebooks": ("IPython", "ipywidgets"),
}
"""Extra of pyproject.toml -> the modules it brings that this package imports."""


class MissingExtraError(ModuleNotFoundError):
    """A part of the package was imported without its optional dependencies."""


def need(extra: str, part: str) -> None:
    """Check that an extra's modules can be imported; it imports none of them.

    Args:
        extra: a key of `EXTRAS`.
        part: what needs the extra: the importing module's `__name__`.

    Raises:
        MissingExtraError: some are not installed; one sentence with the command that installs them.
    """
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f'{part} needs {", ".join(missing)}: in the repository\'s folder, run pip install -e ".[{extra}]"',
            name=missing[0],
        )
