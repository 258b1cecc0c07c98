"""A real headless Chromium and a server of notebooks, for the explorer's tests and its timing.

The server listens on 127.0.0.1 with a token, and is stopped with all that it has started.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
QUIET += ("--disable-component-update", "--disable-sync", "--no-sandbox")
TOKEN = "only-for-this-machine"
WAITING = 60  # seconds that a server or a page may take on a machine that others use too
# Voila's template asks another host for icons, which the page does without: the browser may ask none.
ONLY_HERE = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
}
VOILA = ("--no-browser", "--Voila.ip=127.0.0.1", "--port={port}", "--Voila.token={token}")
VOILA += ("--Voila.tornado_settings={headers}",)


@contextmanager
def chromium() -> Iterator:
    """Start Playwright's handle of a headless Chromium, and close it afterwards."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield started
        started.close()


@contextmanager
def serving(module: str, *options: str, folder: Path, private: Path, waiting: float = WAITING) -> Iterator[str]:
    """Start a server as `python -m module options`, and give its address; all of its processes end afterwards.

    Args:
        options: In them {port}, {token} and {headers} are filled in.
        folder: Where it runs.
        private: A folder for its settings and its log, so that no user's own have a say.
        waiting: Seconds that it may take to start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [option.format(port=port, token=TOKEN, headers={"headers": ONLY_HERE}) for option in options]
    with open(private / "server.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", module, *options],
            cwd=folder,
            env=os.environ | _environment(private),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            address, end = f"http://127.0.0.1:{port}", time.monotonic() + waiting
            while not _answers(address):
                if server.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{module} did not start: {(private / 'server.log').read_text()[-2000:]}")
                time.sleep(0.2)
            yield address
        finally:
            server.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                server.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)  # its own session; kernels end by themselves when it is gone


def _environment(private: Path) -> dict[str, str]:
    """Return the variables of a server whose settings are in a folder of its own."""
    quiet = private / "lab/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false"}')  # else it asks, on top of the page
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    return {name: str(private / name) for name in folders} | {
        "OMP_WAIT_POLICY": "passive",  # threads that wait for a core must not burn another
        "PYTHONPATH": str(ROOT),
        "JUPYTERLAB_SETTINGS_DIR": str(private / "lab"),
    }


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api", timeout=2).close()
    except urllib.error.HTTPError as error:
        error.close()
        return True  # it lives, and it asks for a token
    except OSError:
        return False
    return True


def until(page, tokens: int):
    """Wait until the page says that the first model has so many tokens."""
    page.wait_for_function(f"document.querySelector('.msvit-tokens')?.textContent === '{tokens}'")


def press(page, slider: int, key: str):
    """Press a key on the threshold's (0), the budget's (1) or the layer's (2) handle."""
    page.locator(".widget-slider .noUi-handle").nth(slider).focus()
    page.keyboard.press(key)
