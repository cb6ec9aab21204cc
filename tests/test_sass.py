"""The machine code of every kernel for every architecture: which matrix instructions it has, and that it does not spill.

No GPU is needed, but nvcc. Files are compiled once and kept in csrc/build/sass until a source changes.
"""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sass

from csrc import build
from sage_kernels import PV_MODES

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import sass_mix  # noqa: E402

needs_nvcc = pytest.mark.skipif(sass.missing() is not None, reason=str(sass.missing()))

QK = "IMMA.16832.S8.S8"
PV = {
    "fp16/fp32": "HMMA.16816.F32",
    "fp16/fp16+fp32": "HMMA.16816.F16",
    "fp16/fp16": "HMMA.16816.F16",
    "int8/int32": "IMMA.16832.U8.S8",
    "fp8/fp32+fp32": "QMMA.16832.F32.E4M3.E4M3",
    "fp8/fp32+fp16": "QMMA.16832.F16.E4M3.E4M3",  # SageAttention2++
    "fp8/fp32": "QMMA.16832.F32.E4M3.E4M3",
}
WGMMA_PV = {
    "fp16/fp32": "HGMMA.64x{}x16.F32",
    "int8/int32": "IGMMA.64x{}x32.U8.S8",
    "fp8/fp32+fp32": "QGMMA.64x{}x32.F32.E4M3.E4M3",
    "fp8/fp32+fp16": "QGMMA.64x{}x32.F16.E4M3.E4M3",
    "fp8/fp32": "QGMMA.64x{}x32.F32.E4M3.E4M3",
}
HEAD_DIMS = [(64, 64), (128, 96), (128, 128), (256, 256)]


@pytest.fixture(scope="module", params=build.ARCHS)
def machine_code(request):
    """An architecture and all its kernels by file; those of attention are in instantiations/."""
    cuda = build.cuda_version(build.find_nvcc())
    if cuda < build.ARCHS[request.param]:
        pytest.skip("this nvcc, of CUDA %d.%d, is too old for %s" % (*cuda, request.param))
    sources = [path for path in build.sources(build.CSRC) if path.suffix == ".cu"]
    with ThreadPoolExecutor(build.bounded_jobs(None, build.cores(), build.free_memory())) as pool:
        cubins = list(pool.map(lambda source: sass.compile_to_cubin(source, request.param), sources))
    return request.param, {source: sass.read(cubin) for source, cubin in zip(sources, cubins)}


def attention_kernels(machine_code):
    return [kernel for kernels in machine_code[1].values() for kernel in kernels if kernel.template]


def has_mode(mode, arch):
    """params.h, has_mode."""
    return float(arch) >= {"int8": 7.5, "fp16": 8.0, "fp8": 8.9}[mode.split("/")[0]]


@needs_nvcc
@pytest.mark.timeout(1800)
def test_every_kernel_is_there(machine_code):
    arch, files = machine_code
    assert all(files.values()), f"a file without kernels for {arch}"
    found = {kernel.template for kernel in attention_kernels(machine_code)}
    assert found == {(mode, *dims, masked) for mode in PV_MODES for dims in HEAD_DIMS for masked in (False, True)}
    for kernel in attention_kernels(machine_code):
        instructions = list(kernel)
        if has_mode(kernel.template[0], arch):
            assert kernel.main_loops, f"{kernel} for {arch} has no loop with its matrix instructions"
        else:
            work = [i.text for i in instructions if i.name not in ("EXIT", "BRA", "NOP", "MOV", "IMAD", "LDC")]
            assert not work, f"{kernel} for {arch} should be empty"


@needs_nvcc
@pytest.mark.timeout(1800)
def test_wgmma(machine_code):
    """Of 9.0 alone; the kernels are empty for others."""
    arch, files = machine_code
    kernels = [kernel for kernels in files.values() for kernel in kernels if kernel.wgmma]
    dims = [(dim, v_dim) for dim, v_dim in HEAD_DIMS if dim <= 128]
    assert {kernel.wgmma for kernel in kernels} == {
        (mode, *sizes, masked) for mode in WGMMA_PV for sizes in dims for masked in (False, True)
    }
    for kernel in kernels:
        mode, _, v_dim, _ = kernel.wgmma
        expected = {"IGMMA.64x128x32.S8.S8", WGMMA_PV[mode].format(v_dim)}
        loops = [sass.matrix_kinds(loop) for loop in kernel.main_loops]
        count = 2 if arch == "9.0" else 0  # one for tiles of which everything may be seen
        assert loops == [expected] * count, f"{kernel} for {arch}"
        assert arch == "9.0" or len(list(kernel)) < 50, f"{kernel} for {arch} should be empty"


@needs_nvcc
@pytest.mark.timeout(1800)
def test_matrix_instructions(machine_code):
    arch, _ = machine_code
    for kernel in attention_kernels(machine_code):
        mode = kernel.template[0]
        if not has_mode(mode, arch):
            continue
        expected = {QK, PV[mode]}
        if arch == "7.5":  # smaller ones
            shorter = {"IMMA.16832": "IMMA.8816", "HMMA.16816": "HMMA.1688"}
            expected = {shorter[name[:10]] + name[10:] for name in expected}
        if mode.startswith("fp8") and arch in ("9.0", "10.0"):  # 8-bit only with wgmma or tcgen05: unpacked
            expected = {QK, "HMMA.16816.F16" if mode == "fp8/fp32+fp16" else "HMMA.16816.F32"}
        for loop in kernel.main_loops:
            assert sass.matrix_kinds(loop) == expected, f"{kernel} for {arch}"


@needs_nvcc
@pytest.mark.timeout(1800)
def test_nothing_spills_in_a_main_loop(machine_code):
    """Up to head_dim 128. At 256 the outputs alone are 128 registers a thread; docs/cuda.md says what that costs."""
    arch, _ = machine_code
    spills, wide = {}, 0
    for kernel in attention_kernels(machine_code):
        count = sum(i.name in sass.SPILLS for loop in kernel.main_loops for i in loop)
        few = 2 if kernel.template[-1] and arch == "9.0" else 0  # with a mask, where wgmma runs in its place
        if kernel.template[1] == 256:
            wide = max(wide, count)
        elif count > few:
            spills[f"{kernel} for {arch}"] = count
    assert not spills
    assert wide < 200, "at head_dim 256 it has become worse"


@needs_nvcc
@pytest.mark.timeout(1800)
def test_nothing_spills_in_a_loop_of_the_other_kernels(machine_code):
    """But those with wgmma and a mask, for which 240 registers a thread are some too few. What copies for wgmma is not counted:
    it has 24 registers and time."""
    arch, files = machine_code
    for kernels in files.values():
        for kernel in kernels:
            if kernel.template is None:
                loops = kernel.main_loops if kernel.wgmma else kernel.loops
                count = sum(i.name in sass.SPILLS for loop in loops for i in loop)
                few = 10 if kernel.wgmma and kernel.wgmma[-1] else 0
                assert count <= few, f"{kernel} for {arch} ({kernel.registers} registers)"


@needs_nvcc
@pytest.mark.timeout(1800)
def test_what_copies_for_wgmma_has_few_registers(machine_code):
    """It gives all but 24 of them to the others, whatever the compiler then uses."""
    arch, files = machine_code
    kernels = [kernel for kernels in files.values() for kernel in kernels if kernel.wgmma and arch == "9.0"]
    for kernel in kernels:
        given, follows = kernel.after("USETMAXREG.DEALLOC")
        used = {int(number) for i in follows for number in re.findall(r"\bR(\d+)\b", i.text)}
        assert "0x18" in given.text and len(follows) > 100 and max(used) < 24, f"{kernel} uses R{max(used)}"


# ---- the reader itself


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R4], [R2.64] ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3], R5 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/                   BSSY B0, `(.L_x_3) ;
        /*0050*/                   IMMA.16832.S8.S8 R8, R4.ROW, R6.COL, R8 ;
        /*0060*/               @P1 BRA `(.L_x_2) ;
        /*0070*/                   ISETP.GE.AND P2, PT, R3, R4, PT ;
        /*0080*/                   FSEL R8, R8, -INF , !P2 ;
        /*0090*/                   STL [R1], R8 ;
.L_x_2:
        /*00a0*/                   BSYNC B0 ;
.L_x_3:
        /*00b0*/                   MUFU.EX2 R8, R8 ;
        /*00c0*/                   HMMA.16816.F32 R12, R8, R6, R12 ;
        /*00d0*/               @P3 BRA `(.L_x_0) ;
        /*00e0*/                   STL [R1], R8 ;
        /*00f0*/                   EXIT ;
.L_x_4:
        /*0100*/                   BRA `(.L_x_4);
"""


def test_main_loop_and_its_fast_path():
    kernel = sass.Kernel("_ZN4sage13attention_mmaILNS_4ModeE0ELi128ELi96ELb1EEEv", 40, 8, sass._blocks(LISTING))
    assert kernel.template == ("fp16/fp32", 128, 96, True) and str(kernel) == "fp16/fp32 128/96 masked"
    (loop,) = kernel.main_loops
    assert len(kernel.loops) == 2, "one to wait in; what follows EXIT is never reached"
    assert [i.name for i in loop].count("STL") == 1, "the one behind the loop is not in it"
    assert [i.name for i in loop.fast_path] == ("LDGSTS SYNCS BRA BSSY IMMA BRA BSYNC MUFU HMMA BRA".split())


def test_a_kernel_without_matrix_instructions_has_no_main_loop():
    lines = [line for line in LISTING.splitlines() if "MMA" not in line]
    assert sass.Kernel("combine", 40, 0, sass._blocks("\n".join(lines))).main_loops == []


# ---- the tables of docs/cuda.md


def test_tables_are_of_the_newest_result():
    text = sass_mix.DOCUMENT.read_text(encoding="utf-8")
    assert sass_mix.with_tables(text, sass_mix.newest()) == text, "run python benchmarks/sass_mix.py --tables"


def test_clocks_of_matrix_instructions_are_those_of_the_peak_rates():
    clocks = {
        ("IMMA.16832.S8.S8", "8.0"): 8,
        ("HMMA.16816.F32", "8.0"): 8,
        ("IMMA.16832.U8.S8", "8.6"): 16,
        ("HMMA.16816.F32", "8.6"): 32,
        ("HMMA.16816.F16", "8.9"): 16,
        ("QMMA.16832.F32.E4M3.E4M3", "8.9"): 32,
        ("QMMA.16832.F16.E4M3.E4M3", "12.0"): 16,
    }
    assert {key: sass_mix.tensor_clocks(*key) for key in clocks} == clocks
