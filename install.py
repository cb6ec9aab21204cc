"""Builds the CUDA kernels for the GPUs of this machine where it has an nvcc; else says what serves attention.

    python install.py [--archs 8.9,12.0] [--jobs N] [--nvcc PATH] [--build-dir DIR]

Run it with the Python that runs ComfyUI, as ComfyUI-Manager does. Exit status: 0, or 1 for a build that failed.
"""

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

# Windows' portable Python leaves the script's own folder out.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from csrc import build  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", help="compute capabilities, such as 8.9,12.0 (default: those of the GPUs here)")
    parser.add_argument("--jobs", type=int, help="compilers at once (default: as many as cores and memory allow)")
    parser.add_argument("--nvcc", help="the nvcc to use (default: of CUDA_HOME, else of the PATH)")
    parser.add_argument("--build-dir", type=Path, default=build.BUILD_DIR, help="where objects and the log are kept")
    options = parser.parse_args(arguments)
    archs = options.archs.replace(" ", "").split(",") if options.archs else None
    try:
        archs, nvcc = build.check_machine(archs, options.nvcc)
        install_tools()
        binary = build.build(archs, options.jobs, nvcc, options.build_dir)
    except build.NothingToBuild as reason:
        print(f"No CUDA kernels were built: {reason}. {served_without()}")
        return 1 if options.archs or options.nvcc else 0  # a failure only where a build was asked for
    except build.BuildError as reason:
        print(f"No CUDA kernels were built: {reason}", file=sys.stderr)
        return 1
    print(f"Built {binary}. Restart ComfyUI if it runs.")
    return 0


def install_tools() -> None:
    """What the build needs and this Python lacks, into a folder of the build, not into anybody's environment."""
    missing = build.missing_tools()
    if not missing:
        return
    print(f"Installing {' and '.join(missing)} into {build.TOOLS}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", build.TOOLS]
    done = subprocess.run(
        [*pip, *missing], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode:
        said = done.stdout.strip().splitlines() or ["it said nothing"]
        raise build.BuildError(f"pip could not install {' and '.join(missing)}: {said[-1]}")
    importlib.invalidate_caches()  # the folder may be new


def served_without() -> str:
    try:
        from sage_kernels import AttentionConfig, dispatch
    except ImportError as error:
        return f"This Python cannot run the pack ({error}): run install.py with the Python that runs ComfyUI."
    choice = dispatch.choose(dispatch.Request(AttentionConfig(strict=False), dispatch.default_device()))
    if choice.refusal:
        return f"ComfyUI's own attention stays in use, as Triton cannot serve it either: {choice.rejected['triton']}."
    return f"The {choice.backend} backend serves attention."


if __name__ == "__main__":
    sys.exit(main())
