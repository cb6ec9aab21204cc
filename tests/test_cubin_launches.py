"""Cubins where there is no `_C`: when cuda.py takes them, and what they ask of the driver, which is a made-up one."""

import json
import math
import re
import threading
import zipfile
from ctypes import c_uint64

import pytest
from fake_driver import CONTEXTS, ILLEGAL_ADDRESS, FakeDriver, argument
from small_cubins import compiler, small_cubins  # noqa: F401 (fixtures)

from csrc import build, nvrtc
from sage_kernels import cubin_call, cubin_layout, cubins, cuda, cuda_driver
from sage_kernels.sources import source_hash

# ---- archives that cuda.py meets


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package without `_C` in tmp_path."""
    monkeypatch.setattr(cuda, "PACKAGE", tmp_path)
    monkeypatch.setattr(cuda_driver, "library", FakeDriver)
    monkeypatch.setattr(cuda, "_compiled", lambda: "the CUDA binary is not built")
    cuda.binary.cache_clear()
    yield tmp_path / "_C.cubins"
    cuda.binary.cache_clear()


def write_archive(path, **changes):
    about = {"facts": {"params.h": dict.fromkeys(cubin_layout.PARAMS, 1)}, "kernels": {}}
    manifest = dict(source_hash=source_hash(), layout=cubin_layout.digest(), cuda=13000, archs={"9.0": about}) | changes
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", json.dumps(manifest))


def test_cubins_where_there_is_no_binary(package, monkeypatch):
    assert cuda.binary() == "the CUDA binary is not built"
    cuda.binary.cache_clear()
    write_archive(package)
    assert isinstance(cuda.binary(), cubins.Cubins) and cuda.binary().ARCHS == ("9.0",)
    assert nvrtc.read(package) == (["9.0"], 13000, source_hash())
    cuda.binary.cache_clear()
    monkeypatch.setattr(cuda, "_compiled", lambda: math)
    assert cuda.binary() is math, "_C comes first"


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(source_hash="0" * 16), "built from other sources than these: run .* install.py in .* again"),
        (dict(layout="other"), "_C.cubins was made for another version of these files: run .* install.py in .* again"),
        (dict(cuda=14000), "the GPU driver supports CUDA 13.0 and the CUDA binary needs 14.0"),
    ],
    ids=["stale", "another layout", "too new"],
)
def test_cubins_that_do_not_fit(package, changes, words):
    write_archive(package, **changes)
    assert re.search(words, cuda.binary()), cuda.binary()


def test_cubins_that_are_broken(package):
    write_archive(package)
    whole = package.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"x" * 100):
        package.write_bytes(content)
        cuda.binary.cache_clear()
        assert "_C.cubins cannot be read" in cuda.binary() and "install.py" in cuda.binary()
        with pytest.raises(build.BuildError, match="cannot be read"):
            nvrtc.read(package)


# ---- launches


def fields(**changes):
    d = changes.get("head_dim", 64)
    given = dict(
        batch=1, heads=4, kv_heads=2, nq=300, nk=1100, head_dim=d, dim=cubin_call.padded_head_dim(d),
        v_dim=cubin_call.padded_v_dim(d), mode="int8/int32", dtype="bfloat16", q_block=16, q_sub=8, k_sub=4,
        is_causal=True, smooth_k=True, smooth_v=False, rotate=True, return_lse=True, sm_scale=0.1, q_factor=0.144,
        v_max=127.0, p_max_log2=8.0, cu_q=0, cu_k=0, splits=1, device=0, stream=77,
    )  # fmt: skip
    return given | changes


@pytest.fixture
def driver(monkeypatch):
    fake = FakeDriver(capabilities=((9, 0), (9, 0), (8, 9), (7, 5)))
    monkeypatch.setattr(cuda_driver, "library", lambda: fake)
    return fake


VIEW = (1 << 20, 4096, 2048, 64)


def test_a_launch(driver, small_cubins):  # noqa: F811
    """Of stats: the memory that is cleared, the kernel of this dtype, its grid, and the job it gets."""
    made = small_cubins(("8.9", "9.0"))
    call = made.Call(**fields())
    driver.keep = None

    def look(function, *rest):
        driver.keep = argument(rest[-2][0], cubin_layout.StatsJob)
        return 0

    driver.cuLaunchKernel = look
    made.stats(call, VIEW, (VIEW[0] + 2, *VIEW[1:]), 1 << 16)
    clear = next(entry for entry in driver.log if entry[0] == "cuMemsetD8Async")
    job = driver.keep
    assert clear[2:] == (1 << 16, 0, job.stats.zeroed, 77) and job.stats.bad == 1 << 16
    assert job.chunks == call.chunks == 18 and job.chunk == 64 and job.call.nk == 1100
    assert (job.k.view.data, job.k.view.b, job.k.view.h, job.k.view.n, job.k.wide) == (*VIEW, True)
    assert job.v.view.data == VIEW[0] + 2 and not job.v.wide
    places = [getattr(job.stats, name) for name in ("bad", "arrived", "v_sums", "k_mean", "v_mean", "v_scale")]
    assert places == sorted(places) and job.stats.bytes == call.bytes()[0]


def test_a_kernel_is_loaded_once(driver, small_cubins):  # noqa: F811
    made = small_cubins(("8.9", "9.0"))
    call = made.Call(**fields())
    threads = [threading.Thread(target=made.stats, args=(call, VIEW, VIEW, 1 << 16)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [entry[0] for entry in driver.log]
    assert names.count("cuModuleLoadData") == 1 and names.count("cuLaunchKernel") == 8
    function, blocks, count, shared_bytes, stream = driver.launches()[0][2:7]
    assert (blocks, count, shared_bytes, stream) == (2 * call.chunks, 256, 0, 77)
    symbol = next(entry for entry in driver.log if entry[0] == "cuModuleGetFunction")
    assert b"stats_kernel" in symbol[3] and symbol[4] == function
    limit = next(entry for entry in driver.log if entry[0] == "cuFuncSetAttribute")
    assert limit[3:] == (cuda_driver.MAX_DYNAMIC_SHARED_SIZE_BYTES, 0)
    order = [name for name in names if name in ("cuThreadExchangeStreamCaptureMode", "cuModuleLoadData")]
    assert order[:3] == ["cuThreadExchangeStreamCaptureMode", "cuModuleLoadData", "cuThreadExchangeStreamCaptureMode"]


def test_an_archive_that_is_replaced_while_it_is_in_use(driver, small_cubins, tmp_path):  # noqa: F811
    """The kernels go with the names that were read with them."""
    path = tmp_path / "_C.cubins"
    path.write_bytes(small_cubins(("9.0",)).path.read_bytes())
    made = cubins.Cubins(path)
    write_archive(path)
    made.stats(made.Call(**fields()), VIEW, VIEW, 1 << 16)
    (loaded,) = (entry for entry in driver.log if entry[0] == "cuModuleLoadData")
    assert loaded[2].startswith(b"\x7fELF")


def test_another_device(driver, small_cubins):  # noqa: F811
    """Its context is current while it is used, and only then; each has code of its own."""
    made = small_cubins(("8.9", "9.0"))
    for device, context in ((0, CONTEXTS), (1, CONTEXTS + 1), (2, CONTEXTS + 2), (1, CONTEXTS + 1)):
        driver.log.clear()
        made.stats(made.Call(**fields(device=device)), VIEW, VIEW, 1 << 16)
        used = [entry for entry in driver.log if "Exchange" not in entry[0]]
        assert used and {entry[1] for entry in used} == {context} and driver.current == CONTEXTS
    with pytest.raises(ValueError, match="device 3 has compute capability 7.5; this binary has kernels for 8.9,9.0"):
        made.stats(made.Call(**fields(device=3)), VIEW, VIEW, 1 << 16)
    with pytest.raises(ValueError, match="device is 4; CUDA devices here: 4"):
        made.stats(made.Call(**fields(device=4)), VIEW, VIEW, 1 << 16)
    with pytest.raises(ValueError, match="wgmma is 1; device 2 or this binary"):
        made.attention(made.Call(**fields(device=2, wgmma=1)), *[1 << 16] * 4, None, 1 << 16, VIEW, 1 << 16)
    assert made.Call(**fields(device=1)).wgmma and not made.Call(**fields(device=2)).wgmma


def test_wgmma_rounds_fp8_at_half_the_factor(driver, small_cubins):  # noqa: F811
    """As in bindings.cpp, which does not tell."""
    made = small_cubins(("9.0",))
    for mode, factor in (("fp8/fp32+fp16", 7.0), ("fp8/fp32", 8.0), ("int8/int32", 8.0)):
        assert made.Call(**fields(mode=mode, wgmma=1)).fields.p_max_log2 == factor
        assert made.Call(**fields(mode=mode, wgmma=0)).fields.p_max_log2 == 8.0


def test_combine_follows_split_attention(driver, small_cubins, monkeypatch):  # noqa: F811
    made = small_cubins(("8.9",))
    monkeypatch.setattr(made, "_launch", lambda call, kernel, blocks, *args: asked.append((kernel, blocks, args)))
    asked = []
    call = made.Call(**fields(device=2, splits=3, head_dim=128))
    made.attention(call, 1 << 16, 1 << 17, 1 << 18, 1 << 19, None, 1 << 20, VIEW, 512)
    (attend, blocks, args), (combine, more, last) = asked
    rows = made._facts["tiles.h"][cubin_layout.tile(3, 128, "rows()")]
    assert attend == "attention_mma<Mode::int8_int32, 128, 128, false>" and blocks == 4 * 3 * -(-300 // rows)
    assert combine == "combine" and more == -(-4 * 300 * 16 // 256)
    assert [type(x).__name__ for x in args] == (
        ["Call", "QCodes", "KCodes", "VCodes", "Stats", "Mask", "Partials", "View", c_uint64.__name__]
    )
    assert [type(x).__name__ for x in last] == ["Call", "QCodes", "Stats", "Partials", "View", c_uint64.__name__]
    assert args[-1].value == 512 and args[6].out == 1 << 20 and args[1].lse_shift
    made.attention(call, 1 << 16, 1 << 17, 1 << 18, 1 << 19, ("bool", 4096, 0, 0, 0, 1), 1 << 20, VIEW, 512)
    assert asked[2][0] == "attention_mma<Mode::int8_int32, 128, 128, true>"


@pytest.mark.parametrize("heads, nq, shares, programs", [(4, 300, 10, 40), (4, 4096, 16, 64), (64, 4096, 16, 128)])
def test_programs_of_exact(driver, small_cubins, monkeypatch, heads, nq, shares, programs):  # noqa: F811
    """One for each share of a head's queries, but no more than run at once: they take one share after another."""
    made, asked = small_cubins(("9.0",)), []
    monkeypatch.setattr(made, "_launch", lambda call, kernel, blocks, job: asked.append((kernel, blocks, job)))
    made.exact(made.Call(**fields(heads=heads, nq=nq)), VIEW, VIEW, VIEW, None, 1 << 16, VIEW, 512)
    [(kernel, blocks, job)] = asked
    assert kernel == "exact_kernel<DType::bf16>" and blocks == programs
    assert (job.shares, job.all_shares, job.bad) == (shares, heads * shares, 1 << 16)


@pytest.mark.parametrize(
    "changes, mask, blocks",
    [
        (dict(nq=12800, is_causal=False), None, 132),
        (dict(nq=4096, is_causal=False), None, 4 * 32),
        (dict(nq=12800, is_causal=True), None, 132),
        (dict(nq=12800, is_causal=False, splits=2), None, 800),
        (dict(nq=12800, is_causal=False), ("bool", 4096, 0, 0, 0, 1), 400),
        (dict(nq=12800, is_causal=False, cu_q=4096, cu_k=8192), None, 400),
        (dict(nq=12800, is_causal=False, wgmma=0), None, 4 * -(-12800 // 64)),
    ],
    ids=["all stay", "too few", "causal", "split", "mask", "packed", "mma.sync"],
)
def test_blocks_that_stay(driver, small_cubins, monkeypatch, changes, mask, blocks):  # noqa: F811
    """attention_wgmma has one for each of the 132 multiprocessors, where it is known how query blocks differ in length."""
    made, asked = small_cubins(("9.0",)), []
    monkeypatch.setattr(made, "_launch", lambda call, kernel, blocks, *args: asked.append(blocks))
    made.attention(made.Call(**fields(**changes)), *[1 << 16] * 4, mask, 1 << 20, VIEW, 512)
    assert asked[0] == blocks and len(asked) == changes.get("splits", 1)  # what combines two parts is the second launch


def test_errors_name_the_kernel_and_the_shape(driver, small_cubins):  # noqa: F811
    made = small_cubins(("9.0",))
    call = made.Call(**fields())
    words = r"failed for q \[1, 4, 300, 64\], k and v \[1, 2, 1100, 64\]: CUDA_ERROR_ILLEGAL_ADDRESS, an illegal memory"
    for what, name in (("cuMemsetD8Async", "cuMemsetD8Async"), ("cuLaunchKernel", "stats_kernel")):
        driver.fail = {what: ILLEGAL_ADDRESS}
        with pytest.raises(RuntimeError, match=f"{name} {words}"):
            made.stats(call, VIEW, VIEW, 1 << 16)
    driver.fail = {"cuModuleLoadData": 1}
    with pytest.raises(RuntimeError, match="loading 9.0-stats failed on device 0: CUDA_ERROR_OTHER"):
        small_cubins(("9.0",)).stats(call, VIEW, VIEW, 1 << 16)
    driver.fail = {}
    huge = made.Call(**fields(batch=1 << 15, heads=1 << 15, kv_heads=1 << 15, nk=1))
    with pytest.raises(ValueError, match=r"too many blocks for one launch: q \[32768, 32768, 300, 64\]"):
        made.attention(huge, *[1 << 16] * 4, None, 0, VIEW, 512)


def test_verify_loads_everything_for_the_gpus_here(driver, small_cubins, monkeypatch):  # noqa: F811
    made = small_cubins(("8.9", "9.0"))
    made.load_all()
    loaded = [entry[1] for entry in driver.log if entry[0] == "cuModuleLoadData"]
    assert loaded == [CONTEXTS, CONTEXTS, CONTEXTS + 1, CONTEXTS + 1, CONTEXTS + 2, CONTEXTS + 2]
    driver.fail = {"cuModuleGetFunction": 500}
    monkeypatch.setattr(nvrtc._alone("cuda_driver"), "library", lambda: driver)
    with pytest.raises(build.BuildError, match="is of no use: .*combine.* failed on device 0"):
        nvrtc.verify(made.path)


def test_every_mode_and_head_dim_has_its_kernels(small_cubins):  # noqa: F811
    """By the numbers alone: what the launches ask for is what `units` compiles."""
    made = small_cubins(("8.9", "9.0"))
    for arch in made.ARCHS:
        kernels = set().union(*(kernels for _, kernels in cubin_layout.units(made._archs[arch]["facts"]).values()))
        for mode in made.modes(arch):
            for d in (64, 96, 128, 256):
                for wgmma in (False, True):
                    try:
                        call = made.Call(**fields(mode=mode, head_dim=d, wgmma=wgmma))
                    except ValueError:
                        assert wgmma and (d == 256 or mode.startswith("fp16/fp16"))
                        continue
                    if wgmma and arch != "9.0":
                        continue
                    assert set(call.kernels.values()) <= kernels
                    for parts in ((True, True, True), (True, False, False), (False, False, True)):
                        assert made._shared_out(call, *parts)[0] in kernels
