"""What nvcc made of the kernels: the machine code of the main loop, found by control flow.

`compile_to_cubin` and `read` give a file's kernels. A kernel's main loops are its innermost loops that hold every kind of
matrix instruction it has (QK's and PV's). `Loop.fast_path` is one way once through the loop: of all ways that hold the most
matrix instructions and asynchronous copies, the shortest. That is a whole tile that hides nothing, as every way through
hide() is longer than the one around it; in which no row's maximum moved, where the code branches on that; and which the next
tile's copies are part of, where every thread starts some. A way through a loop within, such as the wait for a copy, is one
turn of it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from csrc import build  # noqa: E402
from sage_kernels.config import PV_MODES  # noqa: E402

CUBINS = build.BUILD_DIR / "sass"
MATRIX = ("IMMA", "HMMA", "QMMA", "OMMA", "IGMMA", "HGMMA", "QGMMA")  # those with a G are wgmma
ASYNC_COPIES = ("LDGSTS",)
SPILLS = ("LDL", "STL")
LABEL = re.compile(r"\.L_x_\d+")


def find_nvdisasm() -> str | None:
    """The one of the package nvidia-cuda-nvdisasm, else of the PATH."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob("cu*/bin/nvdisasm*")):
            if not os.access(path, os.X_OK):  # pip keeps no modes of a wheel's data
                path.chmod(0o755)
            return str(path)
    return shutil.which("nvdisasm")


def missing() -> str | None:
    """Why machine code cannot be made or read here, or None."""
    try:
        build.find_nvcc()
        build.find_host_compiler()
    except build.BuildError as reason:
        return str(reason)
    if find_nvdisasm() is None:
        return "nvdisasm was not found: pip install -r tests/requirements.txt"
    return None


# ---- compiling


def key_of(source: Path, arch: str, nvcc: str) -> str:
    """Changes with the file, any header, the compiler and the architecture."""
    headers = [path for path in build.CSRC.rglob("*.*h") if path.suffix in (".h", ".cuh")]
    total = hashlib.sha256(f"{build.code_name(arch)} {build.cuda_version(nvcc)}".encode())
    for path in [source, *sorted(path for path in headers if build.BUILD_DIR not in path.parents)]:
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:16]


def compile_to_cubin(source: Path, arch: str, folder: Path = CUBINS) -> Path:
    """The cubin of one file for one architecture; beside it (.txt) what ptxas says of registers. Kept until a source changes."""
    nvcc = build.find_nvcc()
    name = f"{source.stem}-{arch}"
    cubin = folder / f"{name}-{key_of(source, arch, nvcc)}.cubin"
    if not cubin.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = cubin.with_suffix(f".{os.getpid()}.tmp")
        command = [nvcc, "-ccbin", build.find_host_compiler(), "-std=c++17", "-O3", f"-arch=sm_{build.code_name(arch)}"]
        done = subprocess.run(
            [*command, "-cubin", "-Xptxas=-v", str(source), "-o", str(temporary)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for {arch}:\n{done.stdout}{done.stderr}")
        cubin.with_suffix(".txt").write_text(done.stdout + done.stderr, encoding="utf-8")
        os.replace(temporary, cubin)
        for old in [*folder.glob(f"{name}-*.cubin"), *folder.glob(f"{name}-*.txt")]:
            if old.stem != cubin.stem:
                old.unlink(missing_ok=True)
    return cubin


# ---- reading


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: IMMA.16832.S8.S8
    text: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


@dataclass
class Block:
    """Instructions that are run one after the other."""

    label: str | None
    instructions: list[Instruction] = field(default_factory=list)
    after: list[int] = field(default_factory=list)  # blocks that may follow


@dataclass
class Loop:
    head: int
    blocks: dict[int, Block]

    def __iter__(self) -> Iterator[Instruction]:
        for block in self.blocks.values():
            yield from block.instructions

    @cached_property
    def fast_path(self) -> list[Instruction]:
        """The module's docstring says which way through the loop this is."""
        best: dict[int, tuple[tuple[int, int], list[int]]] = {}
        order = _in_order(self.head, self._ways)
        for at in reversed(order):
            wanted = sum(i.name in MATRIX + ASYNC_COPIES for i in self.blocks[at].instructions)
            ways = [best[to] for to in self._ways(at) if to in best]
            if self.head in self.blocks[at].after:
                ways.append(((0, 0), []))
            if ways:
                (held, length), path = max(ways)
                best[at] = (held + wanted, length - len(self.blocks[at].instructions)), [at, *path]
        return [i for at in best[self.head][1] for i in self.blocks[at].instructions]

    def _ways(self, at: int) -> list[int]:
        """Where to from here within one turn: not back, neither in this loop nor in one within."""
        return [to for to in self.blocks[at].after if to in self.blocks and (at, to) not in self._back]

    @cached_property
    def _back(self) -> set[tuple[int, int]]:
        return _back_edges(
            self.head, {at: [to for to in b.after if to in self.blocks] for at, b in self.blocks.items()}
        )


@dataclass
class Kernel:
    symbol: str
    registers: int
    spilled: int  # bytes stored and loaded
    blocks: list[Block] = field(repr=False)

    @cached_property
    def template(self) -> tuple[str, int, int, bool] | None:
        """Mode, head_dim, head_dim of V and whether there is a mask, of an attention_mma; else None."""
        return self._arguments("attention_mma")

    @cached_property
    def wgmma(self) -> tuple[str, int, int, bool] | None:
        """The same of an attention_wgmma."""
        return self._arguments("attention_wgmma")

    def _arguments(self, name: str) -> tuple[str, int, int, bool] | None:
        found = re.search(name + r"ILNS_4ModeE(\d+)ELi(\d+)ELi(\d+)ELb([01])E", self.symbol)
        return (PV_MODES[int(found[1])], int(found[2]), int(found[3]), found[4] == "1") if found else None

    def __str__(self) -> str:
        arguments = self.template or self.wgmma
        if arguments is None:
            return self.symbol
        mode, dim, v_dim, masked = arguments
        return (
            ("wgmma " if self.wgmma else "")
            + f"{mode} {dim}"
            + (f"/{v_dim}" if v_dim != dim else "")
            + (" masked" if masked else "")
        )

    def __iter__(self) -> Iterator[Instruction]:
        for block in self.blocks:
            yield from block.instructions

    def after(self, opcode: str) -> tuple[Instruction, list[Instruction]]:
        """The first instruction that begins with this, and all that may follow it."""
        here, at, given = next(
            (number, at, i)
            for number, block in enumerate(self.blocks)
            for at, i in enumerate(block.instructions)
            if i.opcode.startswith(opcode)
        )
        reached = _in_order(here, lambda number: self.blocks[number].after)
        rest = [i for number in reached if number != here for i in self.blocks[number].instructions]
        return given, self.blocks[here].instructions[at + 1 :] + rest

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops: those of one head are one."""
        after = {at: block.after for at, block in enumerate(self.blocks)}
        before: dict[int, list[int]] = {}
        for at, targets in after.items():
            for to in targets:
                before.setdefault(to, []).append(at)
        bodies: dict[int, set[int]] = {}
        for tail, head in _back_edges(0, after):
            body = bodies.setdefault(head, {head})
            stack = [tail]
            while stack:
                at = stack.pop()
                if at not in body:
                    body.add(at)
                    stack += before.get(at, [])
        return [Loop(head, {at: self.blocks[at] for at in sorted(body)}) for head, body in bodies.items()]

    @cached_property
    def main_loops(self) -> list[Loop]:
        """The innermost loops that hold every kind of matrix instruction this kernel has."""
        kinds = matrix_kinds(self)
        found = [loop for loop in self.loops if kinds and kinds == matrix_kinds(loop)]
        return [a for a in found if not any(b is not a and b.blocks.keys() <= a.blocks.keys() for b in found)]


def matrix_kinds(instructions: Iterable[Instruction]) -> set[str]:
    return {i.opcode for i in instructions if i.name in MATRIX}


def read(cubin: Path) -> list[Kernel]:
    """The kernels of a cubin of compile_to_cubin."""
    nvdisasm = find_nvdisasm()
    assert nvdisasm is not None
    text = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    usage = _usage(cubin.with_suffix(".txt").read_text(encoding="utf-8"))
    kernels = []
    for part in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.M)[1:]:
        symbol = part[: part.index(",")]
        kernels.append(Kernel(symbol, *usage[symbol], _blocks(part)))
    return kernels


def _usage(said: str) -> dict[str, tuple[int, int]]:
    """Registers and spilled bytes of each kernel, from ptxas -v."""
    found = {}
    for part in said.split("Compiling entry function '")[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert spills and registers
        found[part[: part.index("'")]] = int(registers[1]), int(spills[1]) + int(spills[2])
    return found


def _blocks(text: str) -> list[Block]:
    """Cut at labels and behind whatever may jump, and joined by where it may go."""
    blocks = [Block(None)]
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            blocks.append(Block(label[1]))
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            blocks[-1].instructions.append(Instruction(found[1], line.split("*/", 1)[1].strip()))
            if _jumps(blocks[-1].instructions[-1]):
                blocks.append(Block(None))
    at = {block.label: index for index, block in enumerate(blocks) if block.label}
    reconverge: dict[str, str] = {}  # barrier register -> where threads that meet there go on
    for index, block in enumerate(blocks):
        following = index + 1 < len(blocks)
        for i in block.instructions:
            if i.name == "BSSY":
                reconverge[i.text.split()[1].rstrip(",")] = LABEL.findall(i.text)[0]
        last = block.instructions[-1] if block.instructions else None
        if last is not None and _jumps(last):
            targets = LABEL.findall(last.text)
            if last.name == "BSYNC":
                targets.append(reconverge[last.text.rstrip(" ;").split()[-1]])
            block.after = [at[target] for target in targets if target in at]
            following = following and not _always(last)
        if following and index + 1 not in block.after:
            block.after.append(index + 1)
    return blocks


def _jumps(i: Instruction) -> bool:
    if i.name in ("EXIT", "RET", "BSYNC", "BRX", "BRXU", "JMX", "KILL"):
        return True
    return i.name != "BSSY" and bool(LABEL.search(i.text))


def _always(i: Instruction) -> bool:
    """Whether nothing falls through: no predicate before it, and for a branch none in its operands."""
    if i.text.startswith("@") or i.name in ("CALL", "BSYNC"):
        return False
    if i.name in ("EXIT", "RET", "BRX", "BRXU", "JMX", "KILL"):
        return True
    return bool(re.match(r"(BRA|JMP)\s+`?\(", i.text))


def _in_order(start: int, ways: Callable[[int], list[int]]) -> list[int]:
    """Reverse postorder: every block before those it leads to."""
    seen, done = {start}, []
    stack = [(start, iter(ways(start)))]
    while stack:
        at, rest = stack[-1]
        to = next((to for to in rest if to not in seen), None)
        if to is None:
            done.append(at)
            stack.pop()
        else:
            seen.add(to)
            stack.append((to, iter(ways(to))))
    return done[::-1]


def _back_edges(start: int, after: dict[int, list[int]]) -> set[tuple[int, int]]:
    """Edges to a block that every way to their beginning passes."""
    order = _in_order(start, lambda at: after[at])
    before: dict[int, list[int]] = {at: [] for at in order}
    for at in order:
        for to in after[at]:
            before[to].append(at)
    passed = {at: set(order) for at in order}
    passed[start] = {start}
    changed = True
    while changed:
        changed = False
        for at in order[1:]:
            new = set.intersection(*(passed[b] for b in before[at])) | {at}
            changed = changed or new != passed[at]
            passed[at] = new
    return {(at, to) for at in order for to in after[at] if to in passed[at]}
