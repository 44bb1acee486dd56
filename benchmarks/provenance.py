"""What a result is recorded with: device, versions, commit, sources."""

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cpuinfo
import torch

from benchmarks.cases import Case
from benchmarks.timing import Comparison, nvidia_smi

ROOT = Path(__file__).parents[1]

#: What a result depends on: where any of it changes, the case is measured again.
SOURCES = (
    "lct_core/**/*.py",
    "plugins/lct_plugins/*.py",
    "benchmarks/cases.py",
    "benchmarks/gate.py",
    "benchmarks/harness.py",
    "benchmarks/timing.py",
)

#: Distributions whose versions are recorded where they are installed.
PACKAGES = (
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "xformers",
    "magi-attention",
    "nvidia-cudnn-frontend",
    "nvidia-cutlass-dsl",
)


def record(
    name: str,
    *,
    device: str,
    shape: Mapping[str, Any],
    warmup: int,
    rounds: int,
    times: Mapping[str, Mapping[str, float]],
    comparisons: Sequence[Comparison],
    **more: Any,
) -> dict[str, Any]:
    """One measurement with everything that it depends on."""
    return {
        "name": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(device),
        "versions": versions(device),
        "source": source(),
        "device": device,
        "shape": dict(shape),
        "warmup": warmup,
        "rounds": rounds,
        "times": {contender: dict(values) for contender, values in times.items()},
        "comparisons": [comparison.as_dict() for comparison in comparisons],
        **more,
    }


def write(measurement: Mapping[str, Any], folder: Path) -> None:
    """Write a record to ``folder/<name>.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{measurement['name']}.json").write_text(json.dumps(measurement, indent=2) + "\n")


def standing(case: Case, folder: Path) -> dict[str, Any] | None:
    """What is on record of a case, if it was measured on this machine with these versions and this source."""
    path = folder / f"{case.name}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    same = {"machine": machine(case.device), "versions": versions(case.device), "shape": case.shape}
    alike = all(found[key] == value for key, value in same.items())
    return found if alike and found["source"].get("digest") == source()["digest"] else None


def machine(device: str) -> dict[str, Any]:
    """What it is measured on."""
    return {**_cpu(), **(_gpu() if device == "cuda" else {})}


@cache
def versions(device: str) -> dict[str, str]:
    """Of all software that a rate depends on; a package that runs from its source tree has no version."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "lct-core": _version("lct-core")}
    if device == "cuda":
        found |= {"cudnn": str(torch.backends.cudnn.version())}
    others = {name: _version(name) for name in PACKAGES}
    return {name: number or "source tree" for name, number in found.items()} | {n: v for n, v in others.items() if v}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


@cache
def _cpu() -> dict[str, Any]:
    return {
        "cpu": cpuinfo.get_cpu_info().get("brand_raw", platform.machine()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": sys.platform,
    }


@cache
def _gpu() -> dict[str, str]:
    try:
        driver = _output(*nvidia_smi("driver_version"))
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {"gpu": torch.cuda.get_device_name(), "driver": driver, "cuda": str(torch.version.cuda)}


@cache
def source() -> dict[str, Any]:
    """The commit, whether the tree differs from it, results aside, and a digest of what a result depends on.

    Where there is no repository, the digest says alone which source it was.
    """
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    found = {"commit": None, "dirty": None, "digest": digest.hexdigest()}
    try:
        changed = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
        return found | {"commit": _output("git", "rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return found


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
