"""The override in newer ComfyUIs, whose attention hands out q, k and v in containers of a single owner."""

import sys
import types

import pytest
from override_calls import (
    HEADS,
    core,
    count_core,  # noqa: F401 (a fixture of every test)
    failing,
    make,
    tensors,
)

import nodes.override as override_module


class Container:
    """ComfyUI's single-owner tensor container."""

    def __init__(self, tensor):
        self.tensor = tensor

    def peek(self):
        assert self.tensor is not None, "consumed twice"
        return self.tensor

    def take(self):
        tensor, self.tensor = self.peek(), None
        return tensor


@pytest.fixture
def newer_comfyui(monkeypatch):
    """A ComfyUI with containers: its attention takes what containers it is handed."""

    def optimized_attention(q, k, v, heads, **kwargs):
        assert kwargs.pop("_inside_attn_wrapper")
        q, k, v = (t.take() if isinstance(t, Container) else t for t in (q, k, v))
        return core(q, k, v, heads, **kwargs)

    module = types.ModuleType("comfy.ldm.modules.attention")
    module.AttentionTensorContainer, module.optimized_attention = Container, optimized_attention
    monkeypatch.setitem(sys.modules, "comfy.ldm.modules.attention", module)


def call_containers(run, qkv, **kwargs):
    containers = [Container(t.clone()) for t in qkv]
    out = run.container_function(*containers, HEADS, _inside_attn_wrapper=True, **kwargs)
    assert all(container.tensor is None for container in containers)
    return out


def test_no_container_function_where_there_are_no_containers():
    assert not hasattr(make()[0], "container_function")


@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
def test_containers_are_served(newer_comfyui, skip_reshape, skip_output_reshape):
    run, patch = make()
    qkv = tensors(skip_reshape=skip_reshape)
    layout = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    out = call_containers(run, qkv, **layout)
    assert core.calls == 0 and patch.report.as_dict()["taken"][0]["calls"] == 1
    assert out.equal(run(core, *qkv, HEADS, **layout))


def test_containers_free_their_tensors_once_quantised(newer_comfyui, monkeypatch):
    import weakref

    run, _ = make()
    containers = [Container(t) for t in tensors()]
    alive = [weakref.ref(container.tensor) for container in containers]
    real = override_module.attention_consuming

    def attention_consuming(qkv, **kwargs):
        held = [t.clone() for t in qkv]
        qkv.clear()
        assert [ref() for ref in alive] == [None] * 3, "somebody still holds q, k or v"
        return real(held, **kwargs)

    monkeypatch.setattr(override_module, "attention_consuming", attention_consuming)
    run.container_function(*containers, HEADS, _inside_attn_wrapper=True)


def test_containers_are_passed_on(newer_comfyui):
    qkv = tensors()
    run, patch = make(attention="cross")
    assert call_containers(run, qkv).equal(core(*qkv, HEADS))

    def previous(func, q, k, v, heads, **kwargs):
        return -func(q, k, v, heads, **kwargs)

    run, patch = make(previous, attention="cross")
    assert call_containers(run, qkv).equal(-core(*qkv, HEADS))
    previous.container_function = lambda q, k, v, heads, **kwargs: [t.take() for t in (q, k, v)][0]
    assert call_containers(run, qkv).equal(qkv[0])
    assert sum(patch.report.passed.values()) == 2


@pytest.mark.parametrize("skip_reshape", [False, True])
def test_a_kernel_error_with_containers(newer_comfyui, monkeypatch, skip_reshape):
    qkv = tensors(skip_reshape=skip_reshape)
    failing(monkeypatch, RuntimeError("broken"))
    run, patch = make()
    assert call_containers(run, qkv, skip_reshape=skip_reshape).equal(core(*qkv, HEADS, skip_reshape=skip_reshape))
    assert len(patch.report.errors) == 1

    def too_late(qkv, **_):
        qkv.clear()
        raise RuntimeError("broken")

    monkeypatch.setattr(override_module, "attention_consuming", too_late)
    run, patch = make()
    with pytest.raises(RuntimeError, match="after q, k and v had been freed"):
        call_containers(run, qkv, skip_reshape=skip_reshape)
