"""What is around the model: the window of steps, the report of a run, and errors inside a compiled model."""

import logging
import sys
import types

import pytest
import torch
from override_calls import (
    HEADS,
    core,
    count_core,  # noqa: F401 (a fixture of every test)
    make,
    plain,
    tensors,
)

from nodes.report import Report, publish, ranges
from nodes.sampling import Patch, inside, install, step_index


class ModelSampling:
    def percent_to_sigma(self, percent):
        return 1 - percent


@pytest.mark.parametrize(
    "sigma, start, end, expected",
    [
        (1.0, 0, 1, True), (0.0, 0, 1, True), (1e9, 0, 0.5, True), (None, 0, 1, True), (None, 0, 0.5, False),
        (0.8, 0.3, 0.6, False), (0.7, 0.3, 0.6, True), (0.7000001, 0.3, 0.6, True), (0.4, 0.3, 0.6, True),
        (0.3, 0.3, 0.6, False), (0.5, 0.5, 0.5, True),
    ],
)  # fmt: skip
def test_inside(sigma, start, end, expected):
    assert inside(sigma, start, end, ModelSampling()) is expected


def test_step_index():
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    assert [step_index(s, sigmas) for s in (1.0, 0.750002, 0.6, 0.25, 0.1, 2.0)] == [0, 1, 1, 3, 3, 0]
    assert step_index(None, sigmas) is None and step_index(0.5, None) is None


class Executor:
    """ComfyUI's WrapperExecutor as a wrapper sees it."""

    class_obj = types.SimpleNamespace(model_sampling=ModelSampling())

    def __init__(self, function):
        self.function = function

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


@pytest.fixture
def wrappers(monkeypatch):
    """install() on a patch: {"outer_sample": wrapper, "apply_model": wrapper}."""
    module = types.ModuleType("comfy.patcher_extension")
    module.WrappersMP = types.SimpleNamespace(OUTER_SAMPLE="outer_sample", APPLY_MODEL="apply_model")
    monkeypatch.setitem(sys.modules, "comfy", types.ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", module)

    def made(patch):
        found = {}
        install(
            types.SimpleNamespace(add_wrapper_with_key=lambda kind, key, wrapper: found.update({kind: wrapper})), patch
        )
        return found

    return made


def test_a_model_call_gets_the_window_without_its_options_being_written(wrappers):
    patch = Patch(start_percent=0.5)
    call = wrappers(patch)["apply_model"]
    for by_keyword in (False, True):
        for sigma, on in ((0.9, False), (0.4, True)):
            options = {"sigmas": torch.tensor([sigma]), "sample_sigmas": torch.tensor([1.0, 0.9, 0.4, 0.0])}
            given = dict(options)
            model = Executor(lambda *args, transformer_options=None: transformer_options or args[5])
            if by_keyword:
                seen = call(model, 1, 2, transformer_options=given)
            else:
                seen = call(model, 1, 2, None, None, None, given)
            assert seen[patch.key] is on and given.keys() == options.keys()
            assert patch.report.step == (2 if on else 1)
    assert (patch.report.model_calls, patch.report.model_calls_on) == (4, 2)


def test_a_model_call_without_options_goes_through(wrappers):
    call = wrappers(Patch())["apply_model"]
    assert call(Executor(lambda *args, **kwargs: (args, kwargs)), 1, 2) == ((1, 2), {})


def test_a_run_is_reported_even_when_it_fails(wrappers, caplog):
    patch = Patch(node_id="7", notes=("a note",))
    run, _ = make(patch=patch)

    def sample():
        run(core, *tensors(), HEADS)
        raise ValueError("out of luck")

    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="out of luck"):
        wrappers(patch)["outer_sample"](Executor(sample))
    assert caplog.messages == ["Sage Attention: 1 call by reference fp16/fp32; a note"]


@pytest.mark.parametrize("compiled, said", [(True, "5 of 8 model calls ran with the patch on"), (False, "replaced")])
def test_a_run_without_counted_calls_says_why(wrappers, compiled, said):
    patch = Patch()

    def sample():
        patch.report.model_calls, patch.report.model_calls_on, patch.compiled = 8, 5, compiled

    wrappers(patch)["outer_sample"](Executor(sample))
    (note,) = patch.report.notes
    assert said in note and said in patch.report.line()


def test_a_report_that_cannot_be_shown_costs_nothing(monkeypatch, caplog):
    class PromptServer:
        class instance:
            @staticmethod
            def send_progress_text(text):  # another signature than today's
                raise AssertionError("not reached")

    monkeypatch.setitem(sys.modules, "server", types.SimpleNamespace(PromptServer=PromptServer))
    with caplog.at_level(logging.WARNING):
        publish(Report("1"))
    assert "cannot be shown" in caplog.text


def test_ranges():
    assert ranges({0, 1, 2, 5, 7, 8}) == "0-2, 5, 7-8"
    assert ranges([]) == ""


def test_a_kernel_error_inside_a_compiled_graph(wrappers, monkeypatch, caplog):
    """The model call runs again without the patch, which stays off for the rest of the run."""
    from sage_kernels import ops

    def broken(*_):
        raise RuntimeError("broken")

    patch = Patch()
    run, _ = make(patch=patch)
    wrapper = wrappers(patch)["apply_model"]
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, o: run(plain, q, q, q, HEADS, transformer_options=o), backend="eager")

    def model(*args):
        return compiled(args[0], args[5])

    monkeypatch.setattr(ops, "run", broken)
    q = tensors()[0]
    for _ in range(2):
        assert torch.allclose(wrapper(Executor(model), q, 0, None, None, None, {}), plain(q, q, q, HEADS), atol=1e-5)
    sentence = "attention inside the compiled model failed: RuntimeError: broken"
    assert patch.report.errors == [sentence] and sentence in caplog.text
    assert (patch.report.model_calls, patch.report.model_calls_on) == (2, 1)


def test_another_error_in_a_compiled_model_is_not_ours(wrappers):
    patch = Patch()

    def model(*args):
        raise RuntimeError("the model's own")

    with pytest.raises(RuntimeError, match="the model's own"):
        wrappers(patch)["apply_model"](Executor(model), 1, 2, 3, 4, 5, {})
    assert not patch.report.errors
