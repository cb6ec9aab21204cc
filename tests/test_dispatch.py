"""Dispatch: what is available, that explain tells the truth, and that no substitution and no "auto" costs accuracy."""

import functools
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checks import qkv

import sage_kernels
from sage_kernels import PV_MODES, QK_GRANULARITIES, AttentionConfig, cuda, dispatch, ops, reference
from sage_kernels.config import INTENTS
from sage_kernels.dispatch import Request, choose
from sage_kernels.quantize import PV
from sage_kernels.sources import source_hash

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
NAMES = ("cuda", "triton", "reference")
GPU = torch.device("cuda", 0)  # only named here, never used


def is_sentence(text):
    return len(text.split()) >= 4 and "None" not in text


CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]


def fake_binary(**changes):
    """What dispatch reads of `_C`."""
    fields = {
        "ARCHS": tuple(dispatch.CUDA_AUTO),
        "SOURCE_HASH": source_hash(),
        "CUDA_RUNTIME": 13000,
        "driver_version": lambda: 13010,
        "modes": lambda arch: tuple(m for m in PV_MODES if float(arch) >= 8.9 or not m.startswith("fp8")),
    }
    fake = SimpleNamespace(**{**fields, **changes})
    # the rule itself is csrc/bindings.cpp's, tests/test_bindings.py looks at it
    fake.arch_for = lambda major, minor: next(
        (f"{major}.{m}" for m in range(minor, -1, -1) if f"{major}.{m}" in fake.ARCHS), ""
    )
    return fake


def forget():
    for cached in (choose, cuda.binary, cuda.arch, dispatch._triton_blocked):
        cached.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """machine(capability, binary, triton): dispatch as on such a GPU; binary None: not built, triton: its reason."""

    def be(capability=(8, 6), binary=None, triton=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setitem(sys.modules, "sage_kernels._C", binary)  # None: importing it fails
        table = tuple(
            replace(row, blocked=lambda device: triton) if row.name == "triton" else row for row in dispatch.TABLE
        )
        monkeypatch.setattr(dispatch, "TABLE", table)
        forget()

    yield be
    monkeypatch.undo()
    forget()


@pytest.fixture(params=["triton alone", *CAPABILITIES], ids=str)
def gpu_machine(request, machine):
    """Every kind of GPU with CUDA kernels, and one with Triton's alone. Gives the name of the backend that serves."""
    if request.param == "triton alone":
        machine()
        return "triton"
    machine(request.param, fake_binary(), "too old for this test" if request.param < (8, 0) else None)
    return "cuda"


def rows():
    return [row for row in dispatch.TABLE if row.blocked(GPU) is None]


def test_availability():
    given = sage_kernels.availability()
    assert tuple(given) == NAMES
    assert given["reference"] == "yes"
    for name in ("cuda", "triton"):
        assert given[name] == "yes" or is_sentence(given[name])


def reason(machine, *args, **options):
    machine(*args, **options)
    said = sage_kernels.availability(GPU)["cuda"]
    assert is_sentence(said) and "\n" not in said
    refused = choose(Request(AttentionConfig(backend="cuda"), GPU)).refusal
    assert said in refused
    return said


def test_cuda_not_built(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "PACKAGE", tmp_path)
    said = reason(machine)
    assert "not built" in said and "install.py" in said and sys.executable in said


def test_cuda_for_another_python(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "PACKAGE", tmp_path)
    (tmp_path / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    said = reason(machine)
    assert "another Python" in said and "_C.cpython-39" in said and "install.py" in said


def test_cuda_that_cannot_be_loaded(machine, monkeypatch, tmp_path):
    def broken(name, package):
        raise ImportError("libstdc++.so.6: version `GLIBCXX_3.4.32' not found\n(required by _C)")

    monkeypatch.setattr(cuda, "PACKAGE", tmp_path)
    (tmp_path / "_C.so").touch()
    monkeypatch.setattr(cuda, "importlib", SimpleNamespace(import_module=broken))
    said = reason(machine)
    assert "cannot be loaded" in said and "GLIBCXX_3.4.32" in said and "install.py" in said


def test_cuda_of_other_sources_is_not_used(machine):
    said = reason(machine, binary=fake_binary(SOURCE_HASH="0123456789abcdef"))
    assert "other sources" in said and said.endswith("again")
    assert choose(Request(AttentionConfig(), GPU)).backend == "triton"


def test_cuda_without_sources_beside_it(machine, monkeypatch):
    monkeypatch.setattr(cuda, "source_hash", lambda: None)
    machine((8, 9), fake_binary(SOURCE_HASH="0123456789abcdef"))
    assert sage_kernels.availability(GPU)["cuda"] == "yes"


@pytest.mark.parametrize("driver, needed, fits", [(12080, 13000, False), (13000, 13020, True), (13010, 12080, True)])
def test_cuda_and_the_driver(machine, driver, needed, fits):
    binary = fake_binary(driver_version=lambda: driver, CUDA_RUNTIME=needed)
    if fits:
        machine((8, 9), binary)
        assert sage_kernels.availability(GPU)["cuda"] == "yes"
    else:
        said = reason(machine, (8, 9), binary=binary)
        assert "CUDA 12.8" in said and "13.0" in said and "update the driver" in said and "install.py" in said


@pytest.mark.parametrize(
    "capability, driver, fits", [((13, 0), 13010, False), ((13, 0), 13020, True), ((12, 1), 13010, True)]
)
def test_cuda_that_the_driver_compiles(machine, capability, driver, fits):
    """From PTX, which needs a driver as new as the toolkit; machine code needs only its major version."""
    binary = fake_binary(ARCHS=("12.0",), driver_version=lambda: driver, CUDA_RUNTIME=13020)
    binary.arch_for = lambda major, minor: "12.0"
    if fits:
        machine(capability, binary)
        assert sage_kernels.availability(GPU)["cuda"] == "yes"
    else:
        said = reason(machine, capability, binary=binary)
        assert all(words in said for words in ("CUDA 13.1", "13.2", "(13.0)", "update the driver", "install.py"))


def test_cuda_and_the_gpu(machine):
    machine((8, 6), fake_binary(ARCHS=("8.0", "8.6", "9.0")))
    assert sage_kernels.availability(GPU)["cuda"] == "yes"
    assert cuda.arch(GPU) == "8.6"
    said = reason(machine, (8, 9), binary=fake_binary(ARCHS=("9.0", "10.0")))
    assert "9.0, 10.0" in said and "8.9" in said and "install.py" in said
    assert cuda.arch(GPU) == ""


def test_cuda_on_other_devices(machine, monkeypatch):
    machine((8, 9), fake_binary())
    assert "on cpu" in sage_kernels.availability("cpu")["cuda"]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in cuda.blocked(GPU)


def test_availability_of_a_device():
    assert sage_kernels.availability("cpu")["reference"] == "yes"
    assert "meta" in sage_kernels.availability("meta")["triton"]


def test_triton_missing(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    dispatch._triton_blocked.cache_clear()
    choose.cache_clear()
    try:
        assert "pip install triton" in sage_kernels.availability("cpu")["triton"]
        choice = sage_kernels.explain(*qkv())
        assert choice.backend == "reference" and "pip install triton" in choice.rejected["triton"]
        with pytest.raises(RuntimeError, match="pip install triton"):
            sage_kernels.attention(*qkv(), config=AttentionConfig(backend="triton"))
    finally:
        dispatch._triton_blocked.cache_clear()
        choose.cache_clear()


@pytest.mark.parametrize("capability, blocked", [((7, 5), True), ((8, 0), False), ((9, 0), False), ((12, 0), False)])
def test_triton_by_compute_capability(monkeypatch, capability, blocked):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    reason = dispatch._triton_blocked.__wrapped__(GPU)
    assert bool(reason) == blocked
    if blocked:
        assert "8.0" in reason and "7.5" in reason


CONFIGS = [AttentionConfig(intent=intent) for intent in INTENTS] + [
    AttentionConfig(pv_accum="int8/int32", smooth_v=False),
    AttentionConfig(pv_accum="fp8/fp32+fp16", qk_quant_gran="per_thread", strict=False),
    AttentionConfig(backend="reference", pv_accum="fp16/fp16", smooth_k=False, rotate=False),
    AttentionConfig(backend="triton"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.encode())
def test_explain_is_what_runs(config, monkeypatch):
    ran = []

    def spy(name, function):
        def run(*args, **options):
            found = [a for a in (*args, *options.values()) if isinstance(a, AttentionConfig)]
            ran.append((name, *found))
            return function(*args, **options)

        return run

    monkeypatch.setattr(reference, "attention", spy("reference", reference.attention))
    if sage_kernels.availability("cpu")["triton"] == "yes":
        from sage_kernels.triton import launch

        monkeypatch.setattr(launch, "attention", spy("triton", launch.attention))
    x = qkv(nq=9)
    choice = sage_kernels.explain(*x, config=config)
    assert ran == [], "explain runs nothing"
    if choice.refusal:
        with pytest.raises(RuntimeError) as caught:
            sage_kernels.attention(*x, config=config)
        assert str(caught.value) == choice.refusal and ran == []
        return
    sage_kernels.attention(*x, config=config)
    assert ran == [(choice.backend, choice.config)]
    assert "auto" not in [
        getattr(choice.config, field.name) for field in fields(choice.config) if field.name != "intent"
    ]
    assert choice.mode == choice.config.pv_accum in PV_MODES
    assert choice.config.qk_quant_gran in QK_GRANULARITIES


@pytest.mark.parametrize("field, values", [("smooth_k", (True, False)), ("smooth_v", (True, False)), ("rotate", (True, False)),
                                           ("qk_quant_gran", QK_GRANULARITIES)])  # fmt: skip
def test_explicit_choices_are_kept(field, values):
    for value in values:
        assert getattr(sage_kernels.explain(*qkv(), config=AttentionConfig(**{field: value})).config, field) == value


@pytest.mark.parametrize("mode", PV_MODES)
@pytest.mark.parametrize("backend", NAMES)
def test_every_cell_has_an_answer(backend, mode):
    """Every backend with every mode: it runs exactly that, or a sentence says why not."""
    choice = sage_kernels.explain(*qkv(), config=AttentionConfig(backend=backend, pv_accum=mode))
    if choice.refusal is None:
        assert (choice.backend, choice.mode) == (backend, mode) and not choice.notes
    else:
        assert is_sentence(choice.refusal) and backend in choice.refusal
    for name, reason in choice.rejected.items():
        assert name in NAMES and is_sentence(reason) or reason.startswith("backend=")
    text = str(choice)
    assert "\n" not in text and (choice.refusal or choice.backend) in text


@pytest.mark.parametrize("mode", PV_MODES)
def test_every_cell_has_an_answer_on_a_gpu(gpu_machine, mode):
    for row in dispatch.TABLE:
        choice = choose(Request(AttentionConfig(backend=row.name, pv_accum=mode), GPU))
        blocked = row.blocked(GPU)
        if blocked is None and mode in row.modes(GPU):
            assert choice.refusal is None and (choice.backend, choice.mode) == (row.name, mode)
        else:
            assert is_sentence(choice.refusal) and (blocked or mode) in choice.refusal


def test_modes_have_measured_errors():
    errors = {mode: PV[mode].error for mode in PV_MODES}
    assert set(PV) == set(PV_MODES)
    assert all(0.005 < error < 0.5 for error in errors.values()), errors
    assert errors["fp16/fp32"] <= errors["fp16/fp16+fp32"] <= errors["fp16/fp16"]
    assert errors["fp16/fp32"] <= errors["int8/int32"] < errors["fp8/fp32+fp32"] <= errors["fp8/fp32"]


def test_auto_is_never_worse_than_fp8_two_level(gpu_machine):
    limit = PV["fp8/fp32+fp32"].error
    for device in (GPU, torch.device("cpu")):
        for strict in (True, False):
            choice = choose(Request(AttentionConfig(strict=strict), device))
            assert choice.refusal is None and PV[choice.mode].error <= limit
    for row in rows():
        assert PV[row.auto(GPU)["auto"][0]].error <= limit, row.name
        assert set(row.auto(GPU)) == set(INTENTS)


def test_intents_are_ordered(gpu_machine):
    for row in rows():
        errors = [PV[row.auto(GPU)[intent][0]].error for intent in ("accurate", "balanced", "fast")]
        assert errors == sorted(errors), row.name
        assert {mode for mode, _ in row.auto(GPU).values()} <= set(row.modes(GPU))


def test_break_even_is_as_measured(machine):
    """In the newest result file auto loses little from there on, and gains little below."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("nvidia-h200-*.json")]
    rows = [row for row in max(files, key=lambda content: content["date"])["rows"] if row["ms"] and not row.get("step")]
    machine((9, 0), fake_binary())
    seen, auto = 0, {"cuda": dispatch.CUDA_AUTO["9.0"]["auto"], "triton": dispatch.TRITON_AUTO["auto"]}
    for row in rows:
        if auto.get(row["backend"]) != (row["mode"], row.get("qk_quant_gran")):
            continue
        (torchs,) = (x["ms"] for x in rows if x["mode"] == "cudnn bf16" and x["name"] == row["name"])
        _, _, nq, nk, head_dim = row["shape"]
        enough = dispatch.too_few(row["backend"], "cuda:0", head_dim, nq, nk) is None
        ratio = torchs / row["ms"]
        assert ratio >= 1 if enough and row["backend"] == "cuda" else ratio >= 0.93 if enough else ratio <= 1.05, row
        seen += 1
    assert seen > 15


@pytest.mark.parametrize(
    "backend, capability, head_dim, tokens",
    [
        ("cuda", (9, 0), 40, 4200), ("cuda", (9, 0), 96, 3500), ("triton", (9, 0), 128, 32000),
        ("cuda", (9, 0), 256, 1024), ("cuda", (8, 9), 64, 1024),
    ],
)  # fmt: skip
def test_break_even(machine, backend, capability, head_dim, tokens):
    machine(capability, fake_binary())
    on_gpu, on_cpu = (functools.partial(dispatch.too_few, backend, device, head_dim) for device in ("cuda:0", "cpu"))
    assert on_gpu(tokens, tokens) is None and on_gpu(tokens - 1, tokens - 1) == tokens and on_gpu(0, 0) == tokens
    assert on_cpu(1024, 1024) is None and on_cpu(1023, 1 << 20) == on_cpu(1 << 20, 1023) == 1024


def test_break_even_of_cross_attention(machine):
    """Many queries make up for fewer keys, where it was measured, but not for Wan's 512; keys do not for fewer queries."""
    machine((9, 0), fake_binary())
    of_keys = functools.partial(dispatch.too_few, "cuda", "cuda:0", 128, 32760)
    assert of_keys(512) == of_keys(1024) == 3500 and of_keys(1536) is None
    assert dispatch.too_few("cuda", "cuda:0", 128, 3499, 1 << 20) == 3500
    assert dispatch.too_few("cuda", "cuda:0", 256, 32760, 512) == 1024


@pytest.mark.parametrize("mode", PV_MODES)
def test_substitution_is_never_less_accurate(gpu_machine, mode):
    """strict=False on a GPU: the nearest mode at least as accurate, named in the notes; strict=True: exactly the mode."""
    loose = choose(Request(AttentionConfig(pv_accum=mode, strict=False), GPU))
    preferred = dispatch.FIRST.get(torch.cuda.get_device_capability(GPU), {}).get("auto")
    own = preferred == "triton" and mode == dispatch.TRITON_AUTO["auto"][0]  # what is taken first there has it
    assert loose.refusal is None and loose.backend == ("triton" if own else gpu_machine)
    assert PV[loose.mode].error <= PV[mode].error
    if loose.mode == mode:
        assert loose.notes == ()
    else:
        assert any(mode in note and loose.mode in note and is_sentence(note) for note in loose.notes)
        better = [other for other in rows()[0].modes(GPU) if PV[other].error <= PV[mode].error]
        assert PV[loose.mode].error == max(PV[other].error for other in better), "the nearest"
    strict = choose(Request(AttentionConfig(pv_accum=mode), GPU))
    assert strict.refusal is None and strict.mode == mode and strict.notes == ()


@pytest.mark.parametrize("mode", PV_MODES)
def test_a_mode_asked_for_is_served_by_the_kernels_that_have_it(machine, mode):
    """Those that "auto" prefers on the GPU only if it is their own choice there."""
    machine((10, 0), fake_binary())
    own = dispatch.TRITON_AUTO["auto"][0]
    assert choose(Request(AttentionConfig(pv_accum=mode), GPU)).backend == ("triton" if mode == own else "cuda")
    assert choose(Request(AttentionConfig(pv_accum=mode, backend="cuda"), GPU)).backend == "cuda"


def test_the_order_of_backends(machine, monkeypatch):
    monkeypatch.setattr(dispatch, "FIRST", {(9, 0): {"auto": "triton"}})
    for capability, intent, first in [((9, 0), "auto", "triton"), ((9, 0), "fast", "cuda"), ((8, 9), "auto", "cuda")]:
        machine(capability, fake_binary())
        assert choose(Request(AttentionConfig(intent=intent), GPU)).backend == first
        assert choose(Request(AttentionConfig(intent=intent, backend="cuda"), GPU)).backend == "cuda"
        machine(capability, fake_binary(), triton="not here for this test")
        choice = choose(Request(AttentionConfig(intent=intent), GPU))
        assert choice.backend == "cuda" and ("triton" in choice.rejected) == (first == "triton")


def test_the_order_names_what_there_is():
    for capability, intents in dispatch.FIRST.items():
        assert capability in CAPABILITIES and set(intents) <= set(INTENTS) and set(intents.values()) <= set(NAMES)


def test_nearest_mode_prefers_accuracy(monkeypatch):
    errors = {"fp16/fp32": 0.01, "int8/int32": 0.02, "fp8/fp32+fp32": 0.05, "fp8/fp32": 0.06}
    monkeypatch.setattr(dispatch, "PV", {mode: replace(PV[mode], error=error) for mode, error in errors.items()})
    assert dispatch.nearest_mode("fp8/fp32", ("fp16/fp32", "int8/int32")) == "int8/int32"
    assert dispatch.nearest_mode("int8/int32", ("fp16/fp32", "fp8/fp32")) == "fp16/fp32"
    assert dispatch.nearest_mode("fp16/fp32", ("int8/int32", "fp8/fp32")) == "int8/int32", "the most accurate there is"


def test_gpu_is_not_served_by_the_emulation_unasked(machine):
    """The node's strict=False on a GPU without kernels: a refusal with reasons, not a crawl."""
    machine(triton="not here for this test")
    choice = choose(Request(AttentionConfig(strict=False), GPU))
    assert "not here for this test" in choice.refusal and set(choice.rejected) == set(NAMES)
    asked = choose(Request(AttentionConfig(strict=False, backend="reference"), GPU))
    assert asked.refusal is None and asked.backend == "reference"


def test_explain_is_cheap():
    """It reads no values: meta tensors are enough for the shapes' part, and one config is resolved once."""
    choose.cache_clear()
    x = qkv()
    for _ in range(5):
        sage_kernels.explain(*x)
    assert choose.cache_info().misses == 1 and choose.cache_info().hits == 4


def test_config_crosses_the_op():
    for config in CONFIGS:
        assert AttentionConfig.decode(config.encode()) == config
    assert len({AttentionConfig(), AttentionConfig(), AttentionConfig(intent="fast")}) == 2, "hashable"
    with pytest.raises(AttributeError):
        AttentionConfig().intent = "fast"


def test_the_emulation_off_the_cpu_is_said_once(caplog):
    """A strict choice that only the emulation has runs, but not in silence; asked for by name, it is no surprise."""
    device = torch.device("meta")
    only_emulated = next(mode for mode in PV_MODES if mode.startswith("fp8/"))
    for _ in range(2):
        assert ops.accept(Request(AttentionConfig(pv_accum=only_emulated), device)).backend == "reference"
    said = [record.message for record in caplog.records if "emulation, which is slow" in record.message]
    assert len(said) == 1 and only_emulated in said[0]
    caplog.clear()
    ops.accept(Request(AttentionConfig(pv_accum=only_emulated, backend="reference"), device))
    assert not caplog.records


def test_a_triton_that_crashes_is_not_used(monkeypatch):
    """Triton 3.2's compiler ends the process, so its version is looked at before a GPU is."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_triton_version", lambda: "3.2.0")
    dispatch._triton_blocked.cache_clear()
    try:
        reason = dispatch._triton_blocked(GPU)
    finally:
        dispatch._triton_blocked.cache_clear()
    assert "Triton 3.2.0" in reason and "torch 2.7" in reason
