"""What happens around the model, outside any torch.compile region: the run's report and the step window."""

import itertools
import math
from dataclasses import dataclass, field

from .blocks import Tags
from .errors import raised_by_kernels, serve_or_raise
from .report import Report, publish

_COMPILED = "attention inside the compiled model"
_names = (f"sage_attention_{number}" for number in itertools.count())


@dataclass
class Patch:
    """One patched model's state. Closures hold it, so ComfyUI's deep copies of model_options share it."""

    node_id: str | None = None
    start_percent: float = 0.0
    end_percent: float = 1.0
    notes: tuple[str, ...] = ()  # what is known about this model before it runs
    tags: Tags | None = None  # for a model whose own code does not tell its blocks
    # The key under which transformer_options tells the override whether this step is inside the window. One per
    # patch, so that two patches in a row keep their own windows.
    key: str = field(default_factory=lambda: next(_names))
    report: Report = field(default_factory=Report)
    compiled: bool = False  # whether a call of this run was served inside a compiled graph


def install(patcher, patch: Patch) -> None:
    """Wrap the patcher's sampling (a report each run) and its model calls (the step window)."""
    from comfy.patcher_extension import WrappersMP

    def run(executor, *args, **kwargs):
        patch.report, patch.compiled = Report(patch.node_id), False
        for note in patch.notes:
            patch.report.notes.setdefault(note)
        try:
            return executor(*args, **kwargs)
        finally:
            if uncounted := _uncounted(patch):
                patch.report.notes.setdefault(uncounted)
            publish(patch.report)

    def model_call(executor, *args, **kwargs):
        options = _options(args, kwargs)
        if options is None:
            return executor(*args, **kwargs)
        report = patch.report
        sigmas = options.get("sigmas")
        sigma = None if sigmas is None else float(sigmas[0])
        on = inside(sigma, patch.start_percent, patch.end_percent, executor.class_obj.model_sampling)
        on = on and _COMPILED not in report.broken
        report.model_calls += 1
        report.model_calls_on += on
        report.step = step_index(sigma, options.get("sample_sigmas"))
        if patch.tags is not None:
            options = patch.tags.into(options)
        call_args, call_kwargs = _with_options(args, kwargs, {**options, patch.key: on})
        try:
            return executor(*call_args, **call_kwargs)
        except Exception as error:
            # Outside torch.compile the override has dealt with it, and what arrives here is its own sentence.
            if not (on and raised_by_kernels(error)):
                raise
            serve_or_raise(error, _COMPILED, report, restored=True)
        call_args, call_kwargs = _with_options(args, kwargs, {**options, patch.key: False})
        return executor(*call_args, **call_kwargs)

    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, patch.key, run)
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, patch.key, model_call)


def _options(args, kwargs) -> dict | None:
    """transformer_options of apply_model(x, t, c_concat, c_crossattn, control, transformer_options, ...)."""
    return kwargs.get("transformer_options", args[5] if len(args) > 5 else None)


def _with_options(args, kwargs, options):
    """The same call with these options. ComfyUI's own dict is not written: its default argument is shared."""
    if "transformer_options" in kwargs:
        return args, {**kwargs, "transformer_options": options}
    return (*args[:5], options, *args[6:]), kwargs


def _uncounted(patch: Patch) -> str | None:
    """A sentence for the report of a run whose attention calls could not be counted, or None."""
    report = patch.report
    if patch.compiled:
        return (
            "the model is compiled: calls inside torch.compile are not counted one by one; "
            f"{report.model_calls_on} of {report.model_calls} model calls ran with the patch on"
        )
    if report.model_calls_on and not report.taken and not report.passed:
        return (
            f"no attention call arrived in {report.model_calls_on} model calls: another node after this one has "
            "replaced the attention override, or the model does not use it"
        )
    return None


def inside(sigma: float | None, start_percent: float, end_percent: float, model_sampling) -> bool:
    """Whether a model call at noise level `sigma` lies in the window, both ends included as everywhere in ComfyUI.

    A step at an end of the window has the window's sigma but for rounding, hence the tolerance.
    """
    first = math.inf if start_percent <= 0 else float(model_sampling.percent_to_sigma(start_percent))
    last = -math.inf if end_percent >= 1 else float(model_sampling.percent_to_sigma(end_percent))
    if sigma is None:
        return first == math.inf and last == -math.inf
    return last - 1e-5 * abs(last) <= sigma <= first + 1e-5 * abs(first)


def step_index(sigma: float | None, sample_sigmas) -> int | None:
    """The sampling step whose noise level `sigma` is or, for a sampler that also calls in between, the step above it."""
    if sigma is None or sample_sigmas is None:
        return None
    return max(int((sample_sigmas[:-1] >= sigma * (1 - 1e-5)).sum()) - 1, 0)
