#!/usr/bin/env python3
"""Make .venv with MemServe and the SGLang build for this machine. Does nothing if .venv is up to date.

    python3 scripts/install.py             # detects a GPU
    python3 scripts/install.py --dev       # also installs the tools of tests and checks

With a GPU this is `pip install 'memserve[gpu]'`. Without one, it installs SGLang without its CUDA
dependencies and a CPU build of torch, about 2.7 GB in all. Needs only Python's standard library.
"""

import argparse
import ctypes.util
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
TORCH = "torch==2.13.0"
# The metadata of these packages requires CUDA packages, or a torch that does.
WITHOUT_DEPENDENCIES = [
    "sglang==0.5.23",
    "torchvision==0.28.0",
    "compressed-tensors==0.18.0",
    "xgrammar==0.2.7",
]
MOONCAKE = {
    "cpu": "mooncake-transfer-engine-non-cuda==0.3.13.post1",
    "gpu": "mooncake-transfer-engine==0.3.13.post1",
}
MOONCAKE_LIBRARIES = {"ibverbs": "libibverbs1", "rdmacm": "librdmacm1", "numa": "libnuma1"}
BROWSERS = ["chromium", "chromium-browser", "google-chrome", "chrome"]
FREE_GIB_NEEDED = {"cpu": 5, "gpu": 20}


class InstallError(Exception):
    """The text is a sentence that the user can act on."""


def main():
    options = parse()
    try:
        kind = options.kind or detect()
        venv = Path(os.path.abspath(options.venv))
        install = Installation(venv, kind, options)
        if install.is_current():
            return 0
        install.run()
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninstall: interrupted; run it again to continue", file=sys.stderr)
        return 130
    return 0


def parse():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--venv", default=str(ROOT / ".venv"), help="the environment (default: .venv in this project)"
    )
    parser.add_argument("--dev", action="store_true", help="also install the tools of tests and checks")
    parser.add_argument("--bench", action="store_true", help="also install the tools of the evaluation")
    parser.add_argument(
        "--mooncake", action="store_true", help="also install Mooncake's transfer engine, if possible"
    )
    parser.add_argument(
        "--browser", action="store_true", help="also install Chromium, for the tests of /ui, if possible"
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--cpu", dest="kind", action="store_const", const="cpu", help="install for a machine without a GPU"
    )
    choice.add_argument(
        "--gpu", dest="kind", action="store_const", const="gpu", help="install for a machine with a GPU"
    )
    parser.add_argument(
        "--torch-index",
        metavar="URL",
        default=os.environ.get("MEMSERVE_TORCH_INDEX"),
        help="package index with a CPU-only torch (or set MEMSERVE_TORCH_INDEX); on Linux the default index "
        "has torch with CUDA only, which works but is gigabytes larger",
    )
    return parser.parse_args()


def detect():
    """`gpu` if the NVIDIA driver lists a GPU, else `cpu`."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"], check=False, capture_output=True, text=True, timeout=30
        )
        found = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")]
    except (OSError, subprocess.TimeoutExpired):
        found = []
    return "gpu" if found else "cpu"


class Installation:
    """One virtual environment, with a record of its installation inside."""

    def __init__(self, venv, kind, options):
        self.venv, self.kind, self.options = venv, kind, options
        self.python = venv / "bin" / "python"
        self.log = venv / "install.log"
        self.record = venv / "memserve-install.json"
        self.started = time.monotonic()

    def wanted(self):
        """Inputs and kind of this installation, to compare with the record."""
        inputs = [Path(__file__), ROOT / "pyproject.toml", *sorted((ROOT / "scripts").glob("*-cpu.txt"))]
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in inputs)).hexdigest()
        return {"inputs": digest, "kind": self.kind, "root": str(ROOT)}

    def parts(self):
        return sorted(part for part in ("bench", "browser", "dev", "mooncake") if getattr(self.options, part))

    def extras(self):
        """The extras of pyproject.toml to install."""
        return [part for part in ("bench", "dev") if getattr(self.options, part)]

    def is_current(self):
        try:
            record = json.loads(self.record.read_text())
        except (OSError, ValueError):
            return False
        same = all(record.get(name) == value for name, value in self.wanted().items())
        return same and set(self.parts()) <= set(record["parts"]) and self.python.exists()

    def run(self):
        self.check_machine()
        what = "an NVIDIA GPU" if self.kind == "gpu" else "no GPU"
        print(f"install: {what} here; making {self.venv} (details in {self.log})", flush=True)
        if not self.python.exists():
            self.step("virtual environment", [sys.executable, "-m", "venv", str(self.venv)])
        if self.kind == "gpu":
            extras = ",".join(["gpu", *self.extras()])
            self.pip("SGLang for CUDA, and MemServe", "-e", f"{ROOT}[{extras}]")
        else:
            self.install_for_cpu()
        notes = self.install_mooncake() if self.options.mooncake else None
        if self.options.browser:
            self.install_browser()
        self.step(
            "checking that it imports", [str(self.python), "-c", "import sglang.srt.server_args, memserve"]
        )
        parts = set(self.parts())
        self.record.write_text(json.dumps({**self.wanted(), "parts": sorted(parts), "mooncake": notes}))
        print(f"install: done in {time.monotonic() - self.started:.0f} s", flush=True)

    def install_for_cpu(self):
        scripts = ROOT / "scripts"
        constraints = ["-c", str(scripts / "constraints-cpu.txt")]
        index = ["--extra-index-url", self.options.torch_index] if self.options.torch_index else []
        self.pip("torch for the CPU", TORCH, *constraints, *index)
        self.pip("SGLang without its CUDA dependencies", "--no-deps", *WITHOUT_DEPENDENCIES)
        self.pip("SGLang's dependencies", "-r", str(scripts / "requirements-cpu.txt"), *constraints)
        extras = f"[{','.join(self.extras())}]" if self.extras() else ""
        self.pip(f"MemServe{extras}", "-e", f"{ROOT}{extras}", *constraints)

    def install_mooncake(self):
        """Best effort: without it, only `--transfer mooncake` is missing. Returns the error, or None."""
        missing = [deb for lib, deb in MOONCAKE_LIBRARIES.items() if ctypes.util.find_library(lib) is None]
        try:
            if missing:
                self.install_packages("Mooncake needs", missing)
            self.pip("Mooncake's transfer engine", MOONCAKE[self.kind])
        except InstallError as error:
            print(f"install: going on without Mooncake: {error}", flush=True)
            return str(error)
        return None

    def install_browser(self):
        """Best effort: without it the tests of /ui in a browser are skipped."""
        if any(map(shutil.which, BROWSERS)):
            return
        try:
            self.install_packages("the tests of /ui need", ["chromium"])
        except InstallError as error:
            print(f"install: going on without a browser: {error}", flush=True)

    def install_packages(self, why, packages):
        """Install Debian packages, as root only: never ask for a password."""
        names = " ".join(packages)
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            raise InstallError(f"{why} {', '.join(packages)} (as root: apt-get install {names})")
        self.step("package lists", ["apt-get", "update", "-q"])
        command = ["apt-get", "install", "-qy", "--no-install-recommends", *packages]
        self.step(f"system packages {names}", command)

    def check_machine(self):
        if sys.version_info < OLDEST_PYTHON:
            have = platform.python_version()
            raise InstallError(f"this is Python {have}; run the script with Python 3.11 or newer")
        if platform.system() != "Linux":
            raise InstallError(
                f"{platform.system()} is not supported: SGLang's servers run on Linux (a container will do)"
            )
        parent = next(folder for folder in [self.venv, *self.venv.parents] if folder.exists())
        free = shutil.disk_usage(parent).free / 2**30
        need = FREE_GIB_NEEDED[self.kind]
        if free < need and not self.python.exists():
            raise InstallError(
                f"{parent} has {free:.1f} GiB free, {need} GiB are needed: make room, or use --venv"
            )

    def pip(self, title, *arguments):
        command = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
        self.step(title, command)

    def step(self, title, command):
        """Run one command, with its output in the log. Raises InstallError with the command's last error."""
        begun = time.monotonic()
        print(f"install: {title} …", end="", flush=True)
        self.venv.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            status = subprocess.run(
                command, check=False, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            ).returncode
        print(f" {time.monotonic() - begun:.0f} s", flush=True)
        if status != 0:
            lines = [line for line in self.log.read_text().splitlines() if line.strip()]
            errors = [
                line for line in lines[-60:] if "ERROR" in line or "Error" in line or line.startswith("E:")
            ]
            last = (errors or lines)[-1].strip()
            hint = ""
            if "No matching distribution" in last or "Connection" in last:
                hint = "; check the network and pip's index (PIP_INDEX_URL, --torch-index)"
            raise InstallError(f"{title} failed: {last}{hint} (whole output: {self.log})")


if __name__ == "__main__":
    sys.exit(main())
