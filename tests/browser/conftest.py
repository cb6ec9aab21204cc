"""One ComfyUI, one browser and one page for all tests that drive them.

They end with their module, not with the session: while Playwright's synchronous API is open, an event loop counts as
running in this thread, and other tests start one of their own.
"""

import os

import frontend
import pytest


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    chromium = frontend.find_chromium()
    if chromium is None:
        # A person may lack a browser; a CI run that quietly skipped these would be no check.
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no chromium or google-chrome on PATH")
    base = tmp_path_factory.mktemp("browser")
    models = base / "models" / "diffusion_models"
    models.mkdir(parents=True)
    for weights in (frontend.ROOT / "demo").glob("**/*.safetensors"):
        (models / weights.name).symlink_to(weights)
    with frontend.server(base, **{"sage-attention-demo": frontend.ROOT / "demo" / "digit_nodes"}) as running:
        yield running


@pytest.fixture(scope="module")
def opened(server):
    with frontend.browser(frontend.find_chromium()) as chrome:
        yield frontend.open_frontend(chrome, server.url)


@pytest.fixture
def page(opened):
    """The page, with nothing over the canvas; a script error during the test fails it."""
    page, errors = opened
    errors.clear()
    frontend.clear_overlays(page)
    yield page
    frontend.clear_overlays(page)
    assert not errors
