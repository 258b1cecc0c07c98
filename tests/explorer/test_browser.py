"""The explorer in a real headless Chromium: as a notebook in JupyterLab, and as a Voila page.

A server is started for each on 127.0.0.1 with a token, and is stopped with all that it has started. Where a test fails,
a screenshot is kept in results/failures/.
"""

import json
import re
import shutil
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import timm
import torch
from helpers import bomb, encoded, gradient, segmenting

import msvit
from benchmarks.browser import CHROMIUM, TOKEN, VOILA, WAITING, chromium, press, serving, until
from msvit.data.scenes import Scenes
from msvit.reducers.registry import make_reducer

ROOT = Path(__file__).resolve().parents[2]
FAILURES = ROOT / "results" / "failures"
PACKAGES = ("playwright", "jupyterlab", "voila", "anywidget")
MISSING = [name for name in PACKAGES if not find_spec(name)] + ([] if CHROMIUM else ["chromium"])
PATIENCE = 1000 * WAITING  # milliseconds
IDLE = 15  # seconds after which a kernel without a page is ended; longer than one takes to start

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    # Playwright's own event loop and sockets, and the servers' pipes, are closed by their finalizers.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with the notebook, whose parameters name two small models of random weights and a folder for files."""
    folder = tmp_path_factory.mktemp("workspace")
    for i, name in enumerate(("one", "two")):
        torch.manual_seed(i)
        model = msvit.MSViT(timm.create_model("vit_mini_patch8_64"))
        model.vit.head.weight.data *= 20  # so that the answer depends on the tokens visibly
        model.save_pretrained(folder / "runs" / name)
    vit = timm.create_model("vit_mini_patch8_64", num_classes=0)
    pixels = segmenting(msvit.MSViT(vit, reducer=make_reducer("tome", vit)), Scenes(1).regions)
    pixels.head.decoder.head.weight.data.normal_()
    pixels.save_pretrained(folder / "runs" / "pixels")
    settings = {"model": "one", "source": "scenes: middle", "runs": str(folder / "runs"), "out": str(folder / "out")}
    notebook = json.loads((ROOT / "notebooks/gate_explorer.ipynb").read_text())
    at = [cell["metadata"].get("tags") for cell in notebook["cells"]].index(["parameters"])
    source = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    notebook["cells"].insert(at + 1, notebook["cells"][at] | {"id": "given", "source": source, "metadata": {}})
    (folder / "explorer.ipynb").write_text(json.dumps(notebook))
    return folder


@pytest.fixture
def untouched(tmp_path):
    """A folder with the notebook as it is in the repository, and nothing else."""
    shutil.copy(ROOT / "notebooks/gate_explorer.ipynb", tmp_path / "explorer.ipynb")
    return tmp_path


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser):
    """A page that may not leave this machine."""
    context, elsewhere = browser.new_context(viewport={"width": 1500, "height": 1300}), []

    def only_here(route):
        if re.match(r"(https?|wss?)://127\.0\.0\.1[:/]|data:|blob:", route.request.url):
            route.continue_()
        else:
            elsewhere.append(route.request.url)
            route.abort()

    context.route("**/*", only_here)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    yield page
    context.close()
    assert not elsewhere, f"the page asked for {elsewhere[:3]}"


@contextmanager
def kept(page, name: str):
    """Keep a screenshot of what went wrong, and name it in the error."""
    try:
        yield
    except Exception as error:
        FAILURES.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=FAILURES / f"{name}.png")
        error.add_note(f"screenshot: {(FAILURES / name).relative_to(ROOT)}.png")
        raise


@pytest.fixture
def serve(workspace, tmp_path):
    """A function that starts a server and returns its address; all of its processes end with the test."""
    with ExitStack() as stack:

        def start(module: str, *options: str, folder: Path = workspace) -> str:
            return stack.enter_context(serving(module, *options, folder=folder, private=tmp_path))

        yield start


def kernels() -> int:
    """How many kernels live of those that this test has started."""
    found = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            found += "ipykernel_launcher" in process.cmdline()
    return found


def clipped(page) -> list[str]:
    """Texts of the explorer that do not fit where they stand."""
    return page.evaluate("""() => [...document.querySelectorAll('.msvit button, .msvit .widget-label, .msvit-title')]
        .filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)""")


def figure(page, name: str) -> str:
    """A figure of the first model: "tokens" or "prediction"."""
    return page.locator(f".msvit-{name}").first.inner_text()


def send(page, **files: bytes):
    """Upload files; their names are given with an underscore for the point."""
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload pictures").click()
    chooser.value.set_files(
        [{"name": n.replace("_", "."), "mimeType": "image/png", "buffer": data} for n, data in files.items()]
    )


def drive(page, out: Path):
    """What a user does: thresholds, a brush, good and hostile files, a second model, a copy to keep."""
    page.wait_for_selector(".msvit-tokens")
    assert clipped(page) == []
    press(page, 0, "End")
    until(page, 65)
    fine = figure(page, "prediction")
    press(page, 0, "Home")
    until(page, 17)
    assert figure(page, "prediction") != fine
    press(page, 1, "End")
    until(page, 62)  # the budget counts the gate too, so all but one region fine is nearer to 100 % than all
    press(page, 0, "End")
    until(page, 65)

    page.locator(".msvit-canvas").first.scroll_into_view_if_needed()
    box = page.locator(".msvit-canvas").first.bounding_box()
    step = box["width"] / 4
    page.mouse.move(box["x"] + step / 2, box["y"] + step / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 3.5 * step, box["y"] + step / 2, steps=12)
    page.mouse.up()
    until(page, 65 - 4 * 3)
    assert figure(page, "prediction") != fine
    assert re.match(r"row 0, column 3: score -?\d+\.\d+, m 0\.\d+, coarse, painted", page.inner_text(".msvit-readout"))
    page.get_by_role("button", name="Clear", exact=True).click()
    until(page, 65)
    edit_painting(page)

    look_inside(page)

    send(page, good_png=encoded(gradient()), text_png=b"no picture")
    page.wait_for_function("document.querySelector('.msvit-figures').textContent.includes('good.png')")
    page.wait_for_function("document.querySelector('.msvit-message')?.textContent.includes('text.png is no picture')")
    assert figure(page, "prediction") != fine
    send(page, bomb_png=bomb(30000))
    page.wait_for_function("document.querySelector('.msvit-message')?.textContent.includes('900 megapixels')")
    press(page, 0, "Home")
    until(page, 17)

    page.locator(".widget-dropdown select").nth(1).select_option("two")
    page.wait_for_function("document.querySelectorAll('.msvit-tokens').length === 2")
    page.get_by_role("button", name="Save PNG").click()
    page.wait_for_selector(".msvit-good a[download]")
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".png"]


def edit_painting(page):
    """Undo and redo, a rectangle, the keyboard, and strokes that stay with their picture; all fine before and after."""
    canvas = page.locator(".msvit-canvas").first
    canvas.focus()
    page.keyboard.press("Control+z")
    until(page, 53)
    page.keyboard.press("Control+z")
    until(page, 65)
    page.keyboard.press("Control+Shift+z")
    until(page, 53)
    page.get_by_role("button", name="Undo").click()
    until(page, 65)

    page.get_by_role("button", name="rectangles").click()
    page.wait_for_selector(".msvit-canvas[data-tool=rectangle]")  # it comes from the kernel, which may be timing
    canvas.scroll_into_view_if_needed()
    box, step = canvas.bounding_box(), canvas.bounding_box()["width"] / 4
    page.mouse.move(box["x"] + step / 2, box["y"] + step / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 1.5 * step, box["y"] + 2.5 * step, steps=6)
    until(page, 65)
    page.mouse.up()
    until(page, 65 - 6 * 3)
    page.get_by_role("button", name="Clear", exact=True).click()
    until(page, 65)

    page.get_by_role("button", name="strokes").click()
    page.wait_for_selector(".msvit-canvas[data-tool=stroke]")
    canvas.focus()
    for key in ("ArrowRight", "ArrowDown", "Space"):
        page.keyboard.press(key)
    until(page, 62)
    assert page.inner_text(".msvit-readout").startswith("row ")
    picture = page.locator(".widget-dropdown select").nth(3)
    first, second = (option.inner_text() for option in picture.locator("option").all()[:2])
    picture.select_option(second)
    until(page, 65)
    picture.select_option(first)
    until(page, 62)
    page.get_by_role("button", name="Undo").click()
    until(page, 65)


def look_inside(page):
    """What a token sees, and another token; the panel is taller than the empty square before it."""
    page.get_by_role("button", name="Attention").click()
    image = page.locator(".widget-vbox:has(> .widget-html .msvit-title:text-is('Attention')) img").first
    page.wait_for_function("image => image.naturalHeight > image.naturalWidth", arg=image.element_handle())
    before = image.get_attribute("src")
    page.get_by_role("button", name="pick a token").click()
    page.wait_for_function("document.querySelector('.msvit-canvas').style.cursor === 'pointer'")
    canvas = page.locator(".msvit-canvas").first
    canvas.scroll_into_view_if_needed()
    canvas.click(position={"x": 100, "y": 100})
    page.wait_for_function("([image, before]) => image.src !== before", arg=[image.element_handle(), before])
    until(page, 65)  # nothing was painted
    page.get_by_role("button", name="strokes").click()
    page.wait_for_function("document.querySelector('.msvit-canvas').style.cursor === 'crosshair'")
    page.get_by_role("button", name="Attention").click()


def label_pixels(page):
    """A segmenter with a reducer in the first row: its figures, its panels, and its tokens at another block."""
    page.locator(".widget-dropdown select").nth(1).select_option("nothing")
    page.locator(".widget-dropdown select").nth(2).select_option("scenes: easy")
    page.locator(".widget-dropdown select").nth(0).select_option("pixels")
    page.wait_for_function("document.querySelector('.msvit-prediction')?.textContent.includes('of pixels right')")
    titles = page.locator(".msvit-title:visible")
    assert titles.all_inner_texts()[4:] == ["Where each pixel's token ended", "Prediction", "Ground truth", "Error"]
    ended = page.locator(".widget-vbox:has(> .widget-html .msvit-title:text('token ended')) img").first
    before = ended.get_attribute("src")
    press(page, 2, "Home")
    page.wait_for_function("([image, before]) => image.src !== before", arg=[ended.element_handle(), before])


def browse(page):
    """The gallery of a source: thumbnails come, a filter leaves fewer, and a click opens the picture."""
    page.locator(".widget-dropdown select").nth(0).select_option("one")
    page.wait_for_function("!document.querySelector('.msvit-prediction')?.textContent.includes('of pixels right')")
    page.get_by_role("button", name="Gallery of all").click()
    page.wait_for_selector(".msvit-thumb div[style*='url']")
    shown = page.locator(".msvit-thumb").count()
    assert 20 <= shown < 150, "of two hundred only those in sight are in the page"
    page.get_by_label("show").select_option("wrong")
    page.wait_for_function("!document.querySelector('.msvit-thumb')")  # this model's classes are not those of scenes
    page.get_by_label("show").select_option("all pictures")
    page.wait_for_selector(".msvit-thumb")
    title = page.locator(".msvit-thumb").nth(1).get_attribute("title")
    page.locator(".msvit-thumb").nth(1).click()
    number = re.match(r"#(\d+) ", title)[1]
    page.wait_for_function(f"document.querySelector('.msvit-figures').textContent.includes('#{number}')")


def run_all(page, address: str):
    """Through the menu, once the kernel listens; the notebook's own indicator is idle before there is one."""
    for _ in range(PATIENCE // 200):
        sessions = page.request.get(f"{address}/api/sessions?token={TOKEN}").json()
        kernels = [session["kernel"] for session in sessions if session["kernel"]]
        if any(kernel["connections"] and kernel["execution_state"] == "idle" for kernel in kernels):
            break
        page.wait_for_timeout(200)
    else:
        raise TimeoutError(f"no kernel was connected and idle after {PATIENCE / 1000:.0f} s: {kernels}")
    page.locator(".lm-MenuBar-itemLabel:text-is('Run')").click()
    page.locator("li.lm-Menu-item[data-command='runmenu:run-all']").click()
    accept = page.locator(".jp-Dialog .jp-mod-accept")
    for _ in range(PATIENCE // 200):  # JupyterLab asks which kernel if its own part of the connection comes late
        if re.search(r"[\d*]", page.locator(".jp-CodeCell .jp-InputPrompt").first.inner_text()):
            return
        if accept.count():
            accept.click()
        page.wait_for_timeout(200)
    raise TimeoutError(f"no cell had begun {PATIENCE / 1000:.0f} s after Run All Cells")


def test_jupyterlab(page, serve, workspace):
    address = serve(
        "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port={port}",
        "--IdentityProvider.token={token}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--ServerApp.terminals_enabled=False",
    )  # fmt: skip
    with kept(page, "jupyterlab"):
        page.goto(f"{address}/lab/tree/explorer.ipynb?token={TOKEN}")
        page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']")
        run_all(page, address)
        drive(page, workspace / "out")
        page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']")
        assert not page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").count()
    shutil.rmtree(workspace / "out")


def test_voila(page, serve, workspace):
    address = serve("voila", "explorer.ipynb", *VOILA)
    with kept(page, "voila"):
        page.goto(f"{address}/?token={TOKEN}")
        drive(page, workspace / "out")
        label_pixels(page)
        browse(page)
    shutil.rmtree(workspace / "out")


def voila_options(idle: int) -> list[str]:
    """The options with which `make explorer` starts Voila, kernels culled after so many seconds."""
    recipe = (ROOT / "Makefile").read_text().partition("\nexplorer:")[2].partition("\n\n")[0]
    culling = re.findall(r"--MappingKernelManager\.(\w+)=\d+", recipe)
    assert culling == ["cull_idle_timeout", "cull_interval"]
    return [f"--MappingKernelManager.{name}={seconds}" for name, seconds in zip(culling, (idle, 1), strict=True)]


def test_first_sight(page, serve, untouched):
    """As `make explorer` opens it: a picture at once, above the fold; and no kernel outlives its page."""
    address = serve("voila", "explorer.ipynb", *VOILA, *voila_options(idle=IDLE), folder=untouched)
    with kept(page, "first-sight"):
        page.set_viewport_size({"width": 1440, "height": 900})
        page.goto(f"{address}/?token={TOKEN}")
        page.wait_for_selector(".msvit-tokens")
        page.wait_for_function("document.querySelector('.msvit-figures').textContent.includes('ms, dense')")
        boxes = [box.bounding_box() for box in page.locator(".msvit-title:visible").all()]
        assert len({round(box["y"]) for box in boxes}) == 1, "the panels stand in one line"
        canvas = page.locator(".msvit-canvas").first.bounding_box()
        assert canvas["y"] + canvas["height"] < 900, "and above the fold"
        assert clipped(page) == []
        page.set_viewport_size({"width": 1920, "height": 1080})
        assert clipped(page) == []
        page.wait_for_timeout(1200 * IDLE)
        assert kernels() == 1, "a page that is looked at keeps its kernel"
        page.goto("about:blank")
        for _ in range(PATIENCE // 200):
            if not kernels():
                break
            page.wait_for_timeout(200)
        assert kernels() == 0
