"""The page: what may run on it, what it is made of, and that it shows what is going on."""

import re
import shutil
import subprocess

import httpx2
import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture
def page(address):
    return httpx2.get(f"{address}/")


def test_only_its_own_script_and_style_may_run(page):
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["x-frame-options"] == "DENY"


def test_nothing_comes_from_elsewhere_and_nothing_is_taken_for_code(page):
    # The name space of SVG is a name, and nothing is fetched from it.
    assert re.findall(r"https?://[^\"' ]+", page.text) == ["http://www.w3.org/2000/svg"]
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "document.write", "onclick=", "style="):
        assert word not in page.text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_a_browser_shows_what_is_going_on(address, tmp_path):
    for _ in range(3):
        httpx2.post(f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 7, "ignore_eos": True}, timeout=60)
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--enable-logging=stderr"]
    done = subprocess.run(
        [CHROMIUM, *options, "--virtual-time-budget=4000", "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    assert '<span id="model">embedded</span>' in done.stdout
    assert "sketch at sparsity 0.8 · up to 4 sequences of 256 tokens" in done.stdout
    assert done.stdout.count('<div class="decode"') >= 3
    assert "<polyline" in done.stdout
    assert '<span id="problem" role="status"></span>' in done.stdout
