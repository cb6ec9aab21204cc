"""The attention override without a ComfyUI: every argument of the hook, errors, and torch.compile."""

import copy
import logging
import math

import pytest
import torch
from override_calls import (
    DIM,
    HEADS,
    TOLERANCE,
    check_passed,
    check_taken,
    core,
    count_core,  # noqa: F401 (a fixture of every test)
    failing,
    make,
    plain,
    relative_l2,
    tensors,
)

from nodes.errors import poisons_context
from nodes.report import Report
from nodes.sampling import Patch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
def test_layouts(skip_reshape, skip_output_reshape, dtype):
    run, patch = make()
    qkv = tensors(skip_reshape=skip_reshape, dtype=dtype)
    check_taken(run, patch, *qkv, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)


def test_strided_views_of_one_projection():
    run, patch = make()
    qkv = torch.randn(2, 40, 3, HEADS, DIM, generator=torch.Generator().manual_seed(0)).permute(2, 0, 3, 1, 4)
    check_taken(run, patch, *qkv, skip_reshape=True)


def test_heads_by_keyword_and_other_arguments_by_position():
    run, patch = make()
    q, k, v = tensors()
    assert run(core, q, k, v, heads=HEADS).equal(run(core, q, k, v, HEADS, None, None, False, False))
    assert patch.report.as_dict()["taken"][0]["calls"] == 2


MASKS = {
    "[nq, nk]": (30, 50),
    "[1, nk]": (1, 50),
    "[b, 1, nk]": (2, 1, 50),
    "[1, 1, nk]": (1, 1, 50),
    "[b, nq, nk]": (2, 30, 50),
    "[b, h, nq, nk]": (2, HEADS, 30, 50),
    "[1, 1, nq, nk]": (1, 1, 30, 50),
    "[1, h, 1, nk]": (1, HEADS, 1, 50),
}


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("skip_reshape", [False, True])
def test_masks(shape, kind, skip_reshape):
    visible = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    visible[..., 0] = True  # no row without a key
    mask = visible if kind == "bool" else torch.zeros(shape).masked_fill(~visible, -math.inf)
    run, patch = make()
    qkv = tensors(30, 50, skip_reshape=skip_reshape)
    out = check_taken(run, patch, *qkv, mask=mask, skip_reshape=skip_reshape)
    assert relative_l2(out, core(*qkv, HEADS, skip_reshape=skip_reshape)) > 3 * TOLERANCE  # dropping it would show


def test_a_mask_that_does_not_broadcast_is_passed_on():
    run, patch = make()
    seen = []
    out = run(
        lambda *args, **kwargs: seen.append(kwargs["mask"]) or "served",
        *tensors(30, 50),
        HEADS,
        mask=(m := torch.ones(7, 50)),
    )
    assert out == "served" and seen == [m]
    (reason,) = patch.report.passed
    assert "mask" in reason and "broadcast" in reason


def test_scale():
    run, patch = make()
    qkv = tensors()
    out = check_taken(run, patch, *qkv, scale=0.5)
    assert relative_l2(out, core(*qkv, HEADS)) > 3 * TOLERANCE


@pytest.mark.parametrize("skip_reshape", [False, True])
def test_enable_gqa(skip_reshape):
    run, patch = make()
    check_taken(run, patch, *tensors(kv_heads=2, skip_reshape=skip_reshape), skip_reshape=skip_reshape, enable_gqa=True)


def test_fewer_kv_heads_without_enable_gqa_are_passed_on():
    run, patch = make()
    assert (
        run(lambda *args, **kwargs: "served", *tensors(kv_heads=2, skip_reshape=True), HEADS, skip_reshape=True)
        == "served"
    )
    assert list(patch.report.passed) == ["k has another number of heads than q without enable_gqa"]


def test_low_precision_attention():
    run, patch = make()
    check_taken(run, patch, *tensors(), low_precision_attention=True)
    run, patch = make()
    core.calls = 0
    reason = "the model asks for full precision (low_precision_attention=False)"
    check_passed(run, patch, reason, *tensors(), low_precision_attention=False)


def test_attn_precision_float32_cannot_overflow():
    """In half precision these scores are inf; ComfyUI asks for float32 there, and gets it."""
    run, patch = make()
    q, k, v = tensors(dtype=torch.float16, dim=DIM)
    check_taken(run, patch, q * 60, k * 60, v, attn_precision=torch.float32, scale=1e-4)


def test_another_attn_precision_is_passed_on():
    run, patch = make()
    reason = "attn_precision torch.float64 is not one that this node knows"
    check_passed(run, patch, reason, *tensors(), attn_precision=torch.float64)


def test_unknown_arguments_pass_through():
    run, patch = make()
    reason = "the model passes an argument that this node does not know: window"
    seen = {}

    def func(*args, **kwargs):
        seen.update(kwargs)
        return "served"

    assert run(func, *tensors(), HEADS, window=7, transformer_options={"a": 1}, _inside_attn_wrapper=True) == "served"
    assert seen == {
        "mask": None, "attn_precision": None, "skip_reshape": False, "skip_output_reshape": False, "window": 7,
        "transformer_options": {"a": 1}, "_inside_attn_wrapper": True,
    }  # fmt: skip
    assert dict(patch.report.passed) == {reason: 1}


def test_an_unknown_argument_that_is_none_changes_nothing():
    run, patch = make()
    check_taken(run, patch, *tensors(), window=None)


def test_gradients_are_passed_on():
    run, patch = make()
    q, k, v = tensors()
    q.requires_grad_()
    run(core, q, k, v, HEADS).square().sum().backward()
    (want,) = torch.autograd.grad(core(q, k, v, HEADS).square().sum(), q)
    assert torch.equal(q.grad, want) and bool(want.any())
    assert list(patch.report.passed) == ["gradients are wanted, which the kernels do not compute"]


def test_v_with_its_heads_split_already():
    """SD3 hands over q and k as [b, n, h * d] and v as [b, n, h, d]."""
    run, patch = make()
    q, k, v = tensors()
    want = run(core, q, k, v, HEADS)
    assert torch.equal(run(core, q, k, v.unflatten(-1, (HEADS, DIM)), HEADS), want) and core.calls == 0
    assert patch.report.as_dict()["calls"] == 2 and not patch.report.passed


@pytest.mark.parametrize(
    "shapes, said",
    [
        ([(2, 8, 0)] * 3, "head_dim 0"),
        ([(2, 8, 256), (2, 8, 256), (2, 8, 160)], "the same number of whole heads"),
        ([(2, 8, 256), (2, 8, 100), (2, 8, 100)], "the same number of whole heads"),
        ([(2, 8, 255)] * 3, "number of heads"),
        ([(2, 256)] * 3, "3 or 4 dimensions"),
    ],
)
def test_shapes_that_cannot_be_served_reach_the_previous_attention(shapes, said):
    run, patch = make()
    given = [torch.zeros(shape) for shape in shapes]
    assert run(lambda q, *rest, **more: q, *given, HEADS) is given[0]
    (reason,) = patch.report.passed
    assert said in reason


def test_what_the_kernels_refuse_is_passed_on_with_their_reason():
    run, patch = make()
    run(core, *tensors(dtype=torch.float64), HEADS)
    (reason,) = patch.report.passed
    assert "float64" in reason
    run(core, *tensors(dim=320, skip_reshape=True), HEADS, skip_reshape=True)
    assert any("head_dim is 320" in reason for reason in patch.report.passed)


@pytest.mark.parametrize("nk, kind, other", [(48, "self", "cross"), (20, "cross", "self")])
def test_self_and_cross(nk, kind, other):
    for attention in (kind, "both"):
        core.calls = 0
        check_taken(*make(attention=attention), *tensors(48, nk))
    core.calls = 0
    run, patch = make(attention=other)
    check_passed(run, patch, f"{kind} attention (attention is set to {other})", *tensors(48, nk))


@pytest.mark.parametrize("nq, nk", [(99, 200), (200, 99)])
def test_min_tokens(nq, nk):
    run, patch = make(min_tokens=100)
    check_passed(run, patch, "fewer than 100 tokens (min_tokens)", *tensors(nq, nk))
    run, patch = make(min_tokens=99)
    core.calls = 0
    check_taken(run, patch, *tensors(nq, nk))


@pytest.mark.parametrize("skip_reshape", [False, True])
def test_min_tokens_that_the_card_decides(monkeypatch, skip_reshape):
    asked = []

    def too_few(backend, device, head_dim, nq, nk):
        asked.append((backend, device, head_dim))
        return 48 if nk < 60 else None

    monkeypatch.setattr("nodes.override.too_few", too_few)
    run, patch = make(min_tokens=-1)
    reason = "counts as fewer than 48 tokens, too few to gain on this device (min_tokens is -1)"
    check_passed(run, patch, reason, *tensors(60, 59, skip_reshape=skip_reshape), skip_reshape=skip_reshape)
    core.calls = 0
    check_taken(*make(min_tokens=-1), *tensors(47, 60, skip_reshape=skip_reshape), skip_reshape=skip_reshape)
    assert set(asked) == {("reference", "cpu", DIM)}


def block(kind, index, total):
    return {"block_type": kind, "block_index": index, "total_blocks": total}


def test_blocks():
    counts = {"double": 2, "single": 3}
    run, patch = make(blocks="!0,!-1", counts=counts)
    calls = [block("double", i, 2) for i in range(2)] + [block("single", i, 3) for i in range(3)]
    for options in calls:
        run(core, *tensors(), HEADS, transformer_options=options)
    assert patch.report.as_dict()["taken"][0]["blocks"] == [1, 2, 3]
    assert dict(patch.report.passed) == {'block not in blocks "!0,!-1"': 2}


def test_calls_outside_any_block():
    outside = "outside the model's numbered blocks (a text refiner, for example)"
    check_passed(*make(counts={"double": 2, "single": 3}), outside, *tensors(), transformer_options={})
    core.calls = 0
    check_taken(*make(), *tensors(), transformer_options={"block_index": 0})  # a UNet, blocks "all"
    core.calls = 0
    unknown = 'this model does not tell its blocks, so blocks "0" cannot be applied'
    check_passed(*make(blocks="0"), unknown, *tensors(), transformer_options={"block_index": 0})


def test_the_window_is_one_bool():
    patch = Patch(start_percent=0.25, end_percent=0.5)
    run, _ = make(patch=patch)
    check_taken(run, patch, *tensors(), transformer_options={patch.key: True})
    for options in ({patch.key: False}, {}):  # {}: the model was called past ComfyUI's sampling, the step is unknown
        patch.report, core.calls = Report(), 0
        patch.report.taken.clear()
        reason = "step outside start_percent 0.25 to end_percent 0.5"
        check_passed(run, patch, reason, *tensors(), transformer_options=options)


def test_previous_override_is_chained():
    def previous(func, q, k, v, heads, **kwargs):
        return -func(q, k, v, heads, **kwargs)

    run, patch = make(previous, attention="cross")
    qkv = tensors()
    assert run(core, *qkv, HEADS).equal(-core(*qkv, HEADS))
    assert sum(patch.report.passed.values()) == 1


def test_deep_copies_share_the_patch():
    """ComfyUI 0.3.75 deep-copies model_options at every clone()."""
    run, patch = make()
    options = copy.deepcopy(copy.deepcopy({"transformer_options": {"optimized_attention_override": run}}))
    check_taken(options["transformer_options"]["optimized_attention_override"], patch, *tensors())


# Errors


def test_a_kernel_error_is_shown_and_the_call_served(monkeypatch, caplog):
    calls = failing(monkeypatch, RuntimeError("shared memory: 240 KB wanted\nmore text"))
    run, patch = make()
    qkv = tensors()
    with caplog.at_level(logging.WARNING):
        assert run(core, *qkv, HEADS).equal(core(*qkv, HEADS))
        assert run(core, *qkv, HEADS).equal(core(*qkv, HEADS))
    assert len(calls) == 1  # off for the rest of the run
    sentence = "reference fp16/fp32 failed: RuntimeError: shared memory: 240 KB wanted"
    assert patch.report.errors == [sentence]
    assert dict(patch.report.passed) == {
        "reference fp16/fp32 failed in this call": 1,
        "reference fp16/fp32 failed earlier in this run": 1,
    }
    (record,) = caplog.records
    assert sentence in record.message and record.exc_info
    assert sentence in patch.report.line()

    patch.report = Report()  # the next run tries again
    run(core, *qkv, HEADS)
    assert len(calls) == 2


def test_a_cuda_error_that_poisons_the_context_is_raised(monkeypatch):
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")
    failing(monkeypatch, error)
    run, patch = make()
    with pytest.raises(RuntimeError, match="restart ComfyUI") as raised:
        run(core, *tensors(), HEADS)
    assert raised.value.__cause__ is error and core.calls == 0
    assert patch.report.errors == [
        "reference fp16/fp32 failed: RuntimeError: CUDA error: an illegal memory access was encountered"
    ]


def test_out_of_memory_is_left_to_comfyui(monkeypatch):
    error = torch.cuda.OutOfMemoryError("CUDA out of memory")
    failing(monkeypatch, error)
    run, patch = make()
    with pytest.raises(torch.cuda.OutOfMemoryError) as raised:
        run(core, *tensors(), HEADS)
    assert raised.value is error and core.calls == 0 and not patch.report.errors


@pytest.mark.parametrize(
    "text, poisons",
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("CUDA error: device-side assert triggered", True),
        ("CUDA error: unspecified launch failure", True),
        ("CUDA error: misaligned address", True),
        ("Triton Error [CUDA]: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: misaligned address", True),
        ("Triton Error [CUDA]: illegal instruction", True),
        ("Triton Error [CUDA]: invalid argument", False),
        ("Triton Error [CUDA]: out of memory", False),
        ("CUDA error: no kernel image is available for execution on the device", False),
        ("CUDA error: invalid configuration argument", False),
        ("out of resource: shared memory", False),
    ],
)
def test_poisons_context(text, poisons):
    assert poisons_context(RuntimeError(text)) is poisons


# torch.compile


def test_compiled_steps_do_not_recompile():
    """Ten steps in and out of the window: one graph for each side, none broken, nothing compiled again."""
    patch = Patch(start_percent=0.3, end_percent=0.7)
    run, _ = make(patch=patch, counts={"double": 2, "single": 0}, blocks="0")
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    def model(x, transformer_options):
        for index in range(2):
            transformer_options["block_type"], transformer_options["block_index"] = "double", index
            x = x + run(plain, x, x * 0.5, x + 1, HEADS, transformer_options=transformer_options)
        return x

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = tensors()[0]
    for step in range(10):
        options = {patch.key: 3 <= step <= 6, "sigmas": torch.tensor([1.0 - step / 10]), "cond_or_uncond": [0]}
        out = compiled(x, dict(options))
        assert torch.allclose(out, model(x, dict(options)), atol=1e-5)
        patch.report = Report()  # what a new sampling run brings does not matter either
        assert patch.compiled
    assert len(graphs) == 2
    assert sum("sage_kernels" in str(node.target) for graph in graphs for node in graph.graph.nodes) == 1


@pytest.mark.parametrize("min_tokens", [-1, 0])
def test_compiled_with_sizes_that_are_not_known(min_tokens):
    """Tokens and head_dim are symbols: no graph is broken, and another number of tokens makes no new one."""
    run, _ = make(min_tokens=min_tokens)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: run(plain, x, x, x, HEADS), backend=backend, dynamic=True, fullgraph=True)
    for nq, dim, count in ((1100, 32, 1), (1200, 32, 1), (1300, 40, 2)):
        x = tensors(nq, nq, batch=1, dim=dim)[0]
        assert torch.allclose(compiled(x), run(plain, x, x, x, HEADS), atol=1e-5)
        assert len(graphs) <= count
        assert sum("sage_kernels" in str(node.target) for node in graphs[-1].graph.nodes) == 1
