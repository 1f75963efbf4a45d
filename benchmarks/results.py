"""Result files: ``{"kind": str, "header": {...}, "rows": [...], ...}`` as JSON."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def header(device: str, arguments: list[str]) -> dict[str, Any]:
    """What is measured with what, and when. Initialises no device."""
    import torch

    import gatefuse
    from gatefuse.fusion_pass import GateFusionPass

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    query = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return {
        "device": _output(*query) if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "gatefuse": gatefuse.__version__,
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "sources": GateFusionPass().uuid(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "arguments": arguments,
    }


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except OSError:
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def new_path(directory: Path, kind: str) -> Path:
    """A fresh file name; creates the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f"{kind}-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}.json"


def write(path: Path, content: dict[str, Any]) -> None:
    """Write whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
