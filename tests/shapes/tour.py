"""The tour of `docs/live.md`, taken by a browser: `python -m tests.shapes.tour docs/images`."""

import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from pipeline import load_pipeline
from shapes import demo
from tests.server.browser import CHROMIUM, FLAGS, Screen, live_server
from utils.config import ROOT
from utils.prompts import read_prompts

COLOURS = 96  # of a picture, which keeps them small


def main(folder: Path) -> None:
    """Write the pictures of the tour into a folder."""
    pipe = load_pipeline(ROOT / demo.CONFIG, ROOT / demo.LIVE_CHECKPOINT, use_ema=True)
    examples = read_prompts(ROOT / demo.PROMPTS)
    with (
        tempfile.TemporaryDirectory() as videos,
        live_server(pipe, Path(videos), examples) as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        take_desktop(browser, server.url, folder)
        take_phone(browser, server.url, folder)
        browser.close()


def take_desktop(browser: Browser, url: str, folder: Path) -> None:
    """A change that flows over, a new scene, and the way back."""
    screen = Screen(browser.new_page(viewport={"width": 1180, "height": 860}), url)
    yellow = {"size": "large", "colour": "yellow", "kind": "star", "pace": "quickly"}
    screen.start(**yellow, direction="to the upper right", background="a navy background")
    screen.until(lambda: screen.seconds > 3, 10)
    screen.change("recache", colour="green", kind="triangle", background="a maroon background")
    screen.until(lambda: screen.seconds > 8.5, 15)
    picture(screen, folder / "live_change.png")
    screen.change("cut", colour="cyan", kind="circle", background="a gray background")
    screen.until(lambda: screen.seconds > 12, 15)
    screen.page.click("#timeline .track", position={"x": 190, "y": 20})
    screen.page.evaluate("scrollTo(0, document.body.scrollHeight)")
    picture(screen, folder / "live_branch.png")
    screen.page.context.close()


def take_phone(browser: Browser, url: str, folder: Path) -> None:
    """A phone at night."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    screen = Screen(context.new_page(), url)
    screen.start(
        seed=5, colour="orange", kind="square", background="a gradient from navy to maroon"
    )
    screen.until(lambda: screen.seconds > 3, 10)
    picture(screen, folder / "live_phone.png")
    context.close()


def picture(screen: Screen, path: Path) -> None:
    """What is in the window, with few colours."""
    screen.page.screenshot(path=path)
    with Image.open(path) as shot:
        shot.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
