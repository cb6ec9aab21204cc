"""Gets the CUDA kernels for this machine: a wheel of an index, or a build; else it says what serves attention without.

    python install.py             does it, after a table of what this machine has
    python install.py --check     the table and the plan only; --json: the same for programs

Run it with the Python that runs ComfyUI, as ComfyUI-Manager does. Exit status: 0, also where other kernels have to serve; 1
for a failure, after which the pack is as it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

# Windows' portable Python leaves the script's own folder out.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from csrc import build, lock, nvrtc, pypi, wheels  # noqa: E402
from csrc.machine import NO_INDEX, Machine, Plan, misfit, plan, read_binary, read_cubins, table  # noqa: E402

CHANGES = ("download", "build", "nvrtc")  # plans that do something


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--check", action="store_true", help="say what this machine has and what would be done, and do nothing")
    add("--json", action="store_true", help="as --check, for programs")
    add("--index", help="the index of wheels: an address or a folder (default: SAGE_KERNELS_INDEX)")
    add("--no-download", action="store_true", help="take nothing from the network: build with what is here")
    add("--archs", help="build for these compute capabilities, such as 8.9,12.0 (default: those of the GPUs here)")
    add("--jobs", type=int, help="compilers at once (default: as many as cores and memory allow)")
    add("--nvcc", help="build with this nvcc (default: of CUDA_HOME, else of the PATH, else from PyPI)")
    add("--nvrtc", action="store_true", help="compile with torch's NVRTC: neither nvcc nor a C++ compiler is needed")
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
    if options.nvrtc and (options.nvcc or options.build_wheel):
        parser.error("--nvrtc compiles without nvcc, for this pack alone: give it without --nvcc and --build-wheel")
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
    wheel = wheel_for(machine, options)

    def decide(machine: Machine) -> Plan:
        return plan(machine, wheel, options.archs, options.must_build, not options.no_download, options.nvrtc)

    if options.json:
        todo = decide(machine)
        print(json.dumps({"machine": machine.as_json(), "plan": todo.as_json()}, indent=1))
        return int(todo.kind == "fail")
    say(table(machine))
    todo = decide(machine)
    if options.check or todo.kind not in CHANGES:
        return tell(todo)
    with lock.held(build.BUILD_DIR / "install.lock", say) as keep:
        # another install.py may have put one there by now
        binary, cubins = build.PACKAGE / build.binary_name(), build.PACKAGE / nvrtc.ARCHIVE
        machine = replace(machine, binary=read_binary(binary), cubins=read_cubins(cubins))
        todo = decide(machine)
        failed = tell(todo)
        if todo.kind not in CHANGES:
            return failed
        try:
            carry_out(machine, todo, options, keep)
        except build.BuildError as reason:
            unreachable = isinstance(reason, build.NothingToBuild)  # PyPI, which is no failure
            if options.must_build or not (unreachable or todo.kind == "build"):
                raise
            todo = decide(replace(machine, missing=(*machine.missing, str(reason))))
            if todo.kind == "fallback" and not unreachable:
                raise
            failed = tell(todo)
            if todo.kind == "nvrtc":  # which needs neither PyPI nor a C++ compiler
                carry_out(machine, todo, options, keep)
            return failed
    return 0


def carry_out(machine: Machine, todo: Plan, options: argparse.Namespace, keep: Sequence[int]) -> None:
    if not options.build_wheel:
        build.check_writable(build.PACKAGE)  # before minutes of building
    for left in build.PACKAGE.glob("_C*.tmp"):  # by a run that was killed
        left.unlink()
    if todo.wheel:
        say(f"Downloaded {wheels.install(todo.wheel, build.PACKAGE, say)}. Restart ComfyUI if it runs.")
        return
    if todo.kind == "nvrtc":
        assert machine.nvrtc is not None
        cubins = nvrtc.compile_all(machine.nvrtc, todo.archs, options.jobs, options.build_dir, say, keep)
        if not options.archs:  # those of other machines cannot be tried here
            nvrtc.verify(cubins, say)
        say(f"Compiled {build.put(cubins, build.PACKAGE / cubins.name)}. Restart ComfyUI if it runs.")
        return
    pypi.fetch_tools(say, keep)
    if todo.fetch_mb:
        pypi.fetch_nvcc(say, keep)
    binary = build_binary(machine, todo, options, keep)
    if options.build_wheel:
        wheels.build_wheel(binary, todo.archs, folder := Path(options.index or options.out or "dist"), say)
        if options.index:
            wheels.write_index(folder)
    else:
        say(f"Built {build.put(binary, build.PACKAGE / binary.name)}. Restart ComfyUI if it runs.")


def wheel_for(machine: Machine, options: argparse.Namespace) -> Callable[[], wheels.Candidate | str]:
    """Asks the index once, when first asked. One that cannot be read has no wheel for anybody: that is no failure."""

    @cache
    def ask() -> wheels.Candidate | str:
        if options.no_download:
            return "--no-download was given"
        try:
            index = wheels.configured_index(options.index)
            return wheels.find(index, machine) if index else NO_INDEX
        except wheels.WheelError as reason:
            return str(reason)

    return ask


def tell(todo: Plan) -> int:
    """Says the plan; the exit status if there is nothing to be done."""
    failed = todo.kind == "fail"
    print(f"Plan:         {todo.sentence}", file=sys.stderr if failed else sys.stdout, flush=True)
    return int(failed)


def build_binary(machine: Machine, todo: Plan, options: argparse.Namespace, keep: Sequence[int]) -> Path:
    """A binary that this Python can load, beside the objects: the pack's own is replaced only after it has been tried."""
    staging = options.build_dir.resolve() / "staging"
    staging.mkdir(parents=True, exist_ok=True)
    given = todo.archs, options.jobs, todo.nvcc, options.build_dir
    binary = build.build(*given, folder=build.CSRC, package=staging, say=say, keep=keep)
    built = read_binary(binary)
    # one for other machines has only to load
    reason = (built and built.problem) if options.must_build else misfit(machine, built)
    if reason:
        raise build.BuildError(f"{binary} was built and is of no use: {reason}")
    return binary


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a path may have letters that the console of Windows lacks
        stream.reconfigure(errors="replace")
    sys.exit(main())
