"""Gets the CUDA kernels for this machine: a wheel of an index, or a build; else it says what serves attention without.

    python install.py             does it, after a table of what this machine has
    python install.py --check     the table and the plan only; --json: the same for programs

Run it with the Python that runs ComfyUI, as ComfyUI-Manager does. Exit status: 0, also where other kernels have to serve; 1
for a failure, after which the pack is as it was.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

# Windows' portable Python leaves the script's own folder out.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from csrc import build, lock, wheels  # noqa: E402
from csrc.machine import NO_INDEX, Machine, Plan, instead, misfit, plan, read_binary, table  # noqa: E402


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--check", action="store_true", help="say what this machine has and what would be done, and do nothing")
    add("--json", action="store_true", help="as --check, for programs")
    add("--index", help="the index of wheels: an address or a folder (default: SAGE_KERNELS_INDEX)")
    add("--no-download", action="store_true", help="build, also where a wheel fits")
    add("--archs", help="build for these compute capabilities, such as 8.9,12.0 (default: those of the GPUs here)")
    add("--jobs", type=int, help="compilers at once (default: as many as cores and memory allow)")
    add("--nvcc", help="build with this nvcc (default: of CUDA_HOME, else of the PATH)")
    add("--build-dir", type=Path, default=build.BUILD_DIR, help="where objects and the log are kept")
    add(
        "--build-wheel",
        action="store_true",
        help="build a wheel, not this pack's binary; with --index DIR into that index",
    )
    add("--out", type=Path, help="the folder of the wheel (default: dist)")
    options = parser.parse_args(arguments)
    if options.out and not options.build_wheel:
        parser.error("--out is the folder of a wheel: give it with --build-wheel")
    if options.out and options.index:
        parser.error("--out and --index both say where the wheel goes: give one of them")
    if options.build_wheel and "://" in (options.index or ""):
        parser.error(f"--index is {options.index} and a wheel can be put into a folder only: give its path")
    options.archs = options.archs.replace(" ", "").split(",") if options.archs else None
    options.must_build = bool(options.archs or options.nvcc or options.build_wheel)
    return options


def say(line: str) -> None:
    print(line, flush=True)  # the Manager shows lines as they come


def main(arguments: list[str] | None = None) -> int:
    options = options_of(arguments)
    try:
        return run(options)
    except (build.BuildError, wheels.WheelError) as reason:
        print(f"Nothing was installed: {reason}", file=sys.stderr)
    except OSError as error:
        print(f"Nothing was installed, as a file cannot be written: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("Interrupted. Nothing was installed; the next run goes on from here.", file=sys.stderr)
        return 130
    return 1


def run(options: argparse.Namespace) -> int:
    machine = Machine.look(options.nvcc)
    if options.json:
        todo = decide(machine, options)
        print(json.dumps({"machine": machine.as_json(), "plan": todo.as_json()}, indent=1))
        return int(todo.kind == "fail")
    say(table(machine))
    todo = decide(machine, options)
    if options.check or todo.kind not in ("download", "build"):
        return tell(todo)
    with lock.held(build.BUILD_DIR / "install.lock", say) as keep:
        # what another install.py has done by now
        todo = decide(replace(machine, binary=read_binary(build.PACKAGE / build.binary_name())), options)
        failed = tell(todo)
        if todo.kind not in ("download", "build"):
            return failed
        for left in build.PACKAGE.glob("_C*.tmp"):  # by a run that was killed
            left.unlink()
        if todo.wheel:
            say(f"Downloaded {wheels.install(todo.wheel, build.PACKAGE, say)}. Restart ComfyUI if it runs.")
            return 0
        install_tools(keep)
        binary = build_binary(machine, todo, options, keep)
        if options.build_wheel:
            wheels.build_wheel(binary, todo.archs, folder := Path(options.index or options.out or "dist"), say)
            if options.index:
                wheels.write_index(folder)
        else:
            say(f"Built {build.put(binary, build.PACKAGE / binary.name)}. Restart ComfyUI if it runs.")
    return 0


def decide(machine: Machine, options: argparse.Namespace) -> Plan:
    def wheel() -> wheels.Candidate | str:
        if options.no_download:
            return "--no-download was given"
        index = wheels.configured_index(options.index)
        return wheels.find(index, machine) if index else NO_INDEX

    try:
        return plan(machine, wheel, options.archs, options.must_build)
    except wheels.WheelError as reason:
        return Plan("fail", f"{reason}; or build with --no-download. {instead(machine)} until then.")


def tell(todo: Plan) -> int:
    """Says the plan; the exit status if there is nothing to be done."""
    failed = todo.kind == "fail"
    print(f"Plan:         {todo.sentence}", file=sys.stderr if failed else sys.stdout, flush=True)
    return int(failed)


def build_binary(machine: Machine, todo: Plan, options: argparse.Namespace, keep: Sequence[int]) -> Path:
    """A binary that this Python can load, beside the objects: the pack's own is replaced only after it has been tried."""
    staging = options.build_dir.resolve() / "staging"
    staging.mkdir(parents=True, exist_ok=True)
    given = todo.archs, options.jobs, machine.nvcc, options.build_dir
    binary = build.build(*given, folder=build.CSRC, package=staging, say=say, keep=keep)
    built = read_binary(binary)
    # one for other machines has only to load
    reason = (built and built.problem) if options.must_build else misfit(machine, built)
    if reason:
        raise build.BuildError(f"{binary} was built and is of no use: {reason}")
    return binary


def install_tools(keep: Sequence[int]) -> None:
    """What the build needs and this Python lacks, into a folder of the build, not into anybody's environment.

    The folder appears in one step: half of a package would be taken for the whole of it.
    """
    if not build.missing_tools():
        return
    shutil.rmtree(build.TOOLS, ignore_errors=True)
    importlib.invalidate_caches()
    missing = build.missing_tools()
    new = build.TOOLS.with_name("tools.new")
    shutil.rmtree(new, ignore_errors=True)
    say(f"Fetching {' and '.join(missing)} into {build.TOOLS}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if importlib.util.find_spec("pip") is None and (uv := shutil.which("uv")):  # environments that uv makes have no pip
        pip = [uv, "pip", "install", "--quiet", "--python", sys.executable]
    done = subprocess.run(
        [*pip, "--target", new, *missing], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        pass_fds=keep,
    )  # fmt: skip
    if done.returncode:
        said = done.stdout.strip().splitlines() or ["it said nothing"]
        raise build.BuildError(f"pip could not install {' and '.join(missing)}: {said[-1]}")
    new.rename(build.TOOLS)
    importlib.invalidate_caches()  # the folder may be new


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a path may have letters that the console of Windows lacks
        stream.reconfigure(errors="replace")
    sys.exit(main())
