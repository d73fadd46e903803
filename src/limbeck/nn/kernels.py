"""The one place that looks for optional accelerated kernels, and says what is in use."""

from __future__ import annotations

from importlib.util import find_spec

OPTIONAL_KERNELS = {"short_convolution": "causal_conv1d", "long_convolution": "flashfftconv", "recurrence": "fla"}


def active_kernels() -> dict[str, str]:
    """Which implementation does each job: always "torch" today.

    No optional package is called yet; those that are installed are named in `available_kernels`.
    """
    return dict.fromkeys(OPTIONAL_KERNELS, "torch")


def available_kernels() -> dict[str, bool]:
    """Whether each optional package can be imported here."""
    return {package: find_spec(package) is not None for package in OPTIONAL_KERNELS.values()}
