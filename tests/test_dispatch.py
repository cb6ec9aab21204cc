"""Dispatch: what is available, that explain tells the truth, and that no substitution and no "auto" costs accuracy."""

from dataclasses import fields, replace

import pytest
import torch
from checks import qkv

import sage_kernels
from sage_kernels import PV_MODES, QK_GRANULARITIES, AttentionConfig, dispatch, ops, reference
from sage_kernels.config import INTENTS
from sage_kernels.dispatch import Request, choose
from sage_kernels.quantize import PV

NAMES = ("cuda", "triton", "reference")
GPU = torch.device("cuda", 0)  # only named here, never used


def is_sentence(text):
    return len(text.split()) >= 4 and "None" not in text


@pytest.fixture
def gpu_machine(monkeypatch):
    """Dispatch as on a machine whose GPU Triton supports."""
    table = tuple(replace(row, blocked=lambda device: None) if row.name == "triton" else row for row in dispatch.TABLE)
    monkeypatch.setattr(dispatch, "TABLE", table)
    choose.cache_clear()
    yield
    choose.cache_clear()


def test_availability():
    given = sage_kernels.availability()
    assert tuple(given) == NAMES
    assert given["reference"] == "yes"
    assert "install.py" in given["cuda"] and is_sentence(given["cuda"])
    assert given["triton"] == "yes" or is_sentence(given["triton"])


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
        if mode in row.modes:
            assert choice.refusal is None and (choice.backend, choice.mode) == (row.name, mode)
        else:
            assert (
                choice.refusal
                and is_sentence(choice.refusal)
                and (mode in choice.refusal or "install.py" in choice.refusal)
            )


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
    for row in dispatch.TABLE:
        if row.modes:
            assert PV[row.auto["auto"][0]].error <= limit, row.name
            assert set(row.auto) == set(INTENTS)


def test_intents_are_ordered(gpu_machine):
    for row in dispatch.TABLE:
        if row.modes:
            errors = [PV[row.auto[intent][0]].error for intent in ("accurate", "balanced", "fast")]
            assert errors == sorted(errors), row.name


@pytest.mark.parametrize("mode", PV_MODES)
def test_substitution_is_never_less_accurate(gpu_machine, mode):
    """strict=False on a GPU: the nearest mode at least as accurate, named in the notes; strict=True: exactly the mode."""
    loose = choose(Request(AttentionConfig(pv_accum=mode, strict=False), GPU))
    assert loose.refusal is None and loose.backend == "triton"
    assert PV[loose.mode].error <= PV[mode].error
    if loose.mode == mode:
        assert loose.notes == ()
    else:
        assert any(mode in note and loose.mode in note and is_sentence(note) for note in loose.notes)
        better = [other for other in dispatch.TABLE[1].modes if PV[other].error <= PV[mode].error]
        assert PV[loose.mode].error == max(PV[other].error for other in better), "the nearest"
    strict = choose(Request(AttentionConfig(pv_accum=mode), GPU))
    assert strict.refusal is None and strict.mode == mode and strict.notes == ()


def test_nearest_mode_prefers_accuracy(monkeypatch):
    errors = {"fp16/fp32": 0.01, "int8/int32": 0.02, "fp8/fp32+fp32": 0.05, "fp8/fp32": 0.06}
    monkeypatch.setattr(dispatch, "PV", {mode: replace(PV[mode], error=error) for mode, error in errors.items()})
    assert dispatch.nearest_mode("fp8/fp32", ("fp16/fp32", "int8/int32")) == "int8/int32"
    assert dispatch.nearest_mode("int8/int32", ("fp16/fp32", "fp8/fp32")) == "fp16/fp32"
    assert dispatch.nearest_mode("fp16/fp32", ("int8/int32", "fp8/fp32")) == "int8/int32", "the most accurate there is"


def test_gpu_is_not_served_by_the_emulation_unasked(monkeypatch):
    """The node's strict=False on a GPU without Triton: a refusal with reasons, not a crawl."""
    table = tuple(
        replace(row, blocked=lambda device: "not here for this test") if row.name == "triton" else row
        for row in dispatch.TABLE
    )
    monkeypatch.setattr(dispatch, "TABLE", table)
    choose.cache_clear()
    try:
        choice = choose(Request(AttentionConfig(strict=False), GPU))
        assert "not here for this test" in choice.refusal and set(choice.rejected) == set(NAMES)
        asked = choose(Request(AttentionConfig(strict=False, backend="reference"), GPU))
        assert asked.refusal is None and asked.backend == "reference"
    finally:
        choose.cache_clear()


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
