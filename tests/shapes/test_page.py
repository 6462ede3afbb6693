"""The page in a real browser, with the model that ships: what a viewer sees, and when."""

import asyncio
import json
import urllib.request

import pytest

from pipeline import load_pipeline
from shapes import demo
from shapes.world import BACKGROUNDS, COLOURS
from tests.server.browser import CHROMIUM, FLAGS, PREFIX, Screen, live_server
from utils.config import ROOT

pytestmark = pytest.mark.browser

GRAY, NAVY, MAROON = (BACKGROUNDS[name][0] for name in ("gray", "navy", "maroon"))
RED, GREEN = COLOURS["red"], COLOURS["green"]

# Sockets that can be closed from outside, die once they are open, and damage a chunk when they are
# told to.
TAPPED = """() => {
  const Plain = WebSocket;
  window.sockets = [];
  window.WebSocket = class extends Plain {
    constructor(...all) {
      super(...all);
      window.sockets.push(this);
      this.addEventListener('open', () => window.dying && setTimeout(() => this.close()));
    }
    set onmessage(heard) {
      super.onmessage = (event) => {
        const bad = window.damaged && typeof event.data !== 'string';
        if (bad) window.damaged = false;
        heard(bad ? { data: new ArrayBuffer(99) } : event);
      };
    }
  };
}"""

PARTS = """async () => {
  const { socketUrl } = await import('./protocol.js');
  const { spans, pointBefore } = await import('./timeline.js');
  const { read } = await import('./composer.js');
  const { clock, size } = await import('./dom.js');
  const change = (first, whole) => ({ first, whole });
  const points = [{ id: 3, seconds: 1 }, { id: 8, seconds: 2.5 }];
  const words = { colour: ['red', 'blue'], kind: ['circle', 'big circle'] };
  const template = 'A {colour} {kind}.';
  return {
    socket: socketUrl('https://host:1/a/?token=b#c', 'jpeg'),
    spans: spans([change(0, 0), change(2, 4), change(5, 9)], 6)
      .map(({ from, whole, to }) => [from, whole, to]),
    points: [0.5, 2.4, 9].map((seconds) => pointBefore(points, seconds)?.id ?? null),
    read: read(template, words, ' a RED big circle.'),
    unread: read(template, words, 'A red square.'),
    size: [0, 1500, 38.4e6].map(size),
    clock: [0, 59.94, 605].map(clock),
  };
}"""

LEAD = 1.5  # seconds, the server's default
BLOCK = 0.75


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pipe = load_pipeline(ROOT / demo.CONFIG, ROOT / demo.LIVE_CHECKPOINT, use_ema=True)
    example = "A large red circle drifts slowly to the right over a gray background."
    with live_server(pipe, tmp_path_factory.mktemp("live"), [example]) as server:
        yield server


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(server, chromium):
    """Open the page in a context of its own; no page may complain on the console."""
    screens, contexts = [], []

    def open_page(url=server.url, **settings) -> Screen:
        settings.setdefault("viewport", {"width": 1280, "height": 800})
        contexts.append(chromium.new_context(**settings))
        screens.append(Screen(contexts[-1].new_page(), url))
        return screens[-1]

    yield open_page
    for context in contexts:
        context.close()
    server.engine.delay = 0.0
    assert [error for screen in screens for error in screen.errors] == []


def test_first_frame_comes_at_once_and_the_clock_runs_while_it_is_made(open_page):
    screen = open_page()
    screen.start(colour="red", background="a gray background")
    first = float(screen.page.inner_text("#n-first").removesuffix(" s"))
    assert first < 2.0
    assert screen.share(GRAY) > 0.6
    assert screen.share(RED) > 0.03
    before = screen.seconds
    screen.until(lambda: screen.seconds > before + 1, 3)
    assert screen.page.is_enabled("#stop")  # it is still being made
    assert screen.page.inner_text("#state") == "Playing."
    assert screen.buffered[1] - screen.seconds < LEAD + 2 * BLOCK


def test_hard_changes_are_on_screen_within_the_lead(open_page):
    """Generation that runs ahead of what is played would show a change late."""
    screen = open_page()
    screen.start(background="a gray background")
    screen.until(lambda: screen.seconds > 0.5, 5)
    session = screen.session
    screen.change("cut", colour="green", background="a navy background")
    assert _until_shown(screen, NAVY, instead_of=GRAY) < LEAD + 1.5
    screen.until(lambda: screen.share(GREEN) > 0.02, 5)
    screen.change("renoise", background="a maroon background")
    assert _until_shown(screen, MAROON, instead_of=NAVY) < LEAD + 1.5
    assert screen.session == session


def test_soft_changes_are_heard_within_a_block(open_page):
    screen = open_page()
    screen.start(background="a gray background")
    screen.until(lambda: screen.seconds > 0.5, 5)
    for place, (policy, background) in enumerate([("keep", "navy"), ("recache", "maroon")], 1):
        asked = screen.seconds
        screen.change(policy, background=f"a {background} background")
        heard = screen.page.locator(f"#prompts li >> nth={place} >> text=first heard at")
        assert screen.until(lambda heard=heard: heard.count() == 1, 5) < LEAD + BLOCK
        times = [_moment(screen, place, words) for words in ("asked at", "first heard at")]
        assert (
            asked <= times[0] + 0.1 < times[1] + 0.1 < _moment(screen, place, "nothing else from")
        )
        assert times[1] - times[0] < LEAD + 2 * BLOCK
        screen.page.fill("#blend", "2")
    marks = screen.page.locator(".marks i")
    screen.until(lambda: marks.count() == 6, 1)
    names = marks.evaluate_all("(all) => all.map((mark) => mark.className)")
    assert names == 2 * ["mark-asked", "mark-first", "mark-whole"]


def test_a_slow_model_is_waited_for_and_playback_goes_on(open_page, server):
    """Players of others froze for ever when generation was slower than real time."""
    screen = open_page()
    screen.start()
    server.engine.delay = 3 * BLOCK
    screen.wait_state("waiting")
    assert "goes on by itself" in screen.page.inner_text("#state")
    server.engine.delay = 0.0
    before = screen.seconds
    screen.until(lambda: screen.seconds > before + 2 * BLOCK, 6)


@pytest.mark.long
def test_a_model_that_is_slow_for_long_is_waited_for(open_page, server):
    screen = open_page()
    screen.start()
    server.engine.delay = 3 * BLOCK
    screen.wait_state("waiting")
    screen.page.wait_for_timeout(20_000)
    server.engine.delay = 0.0
    screen.wait_state("playing", timeout=15)
    before = screen.seconds
    screen.until(lambda: screen.seconds > before + 5, 7)


@pytest.mark.long
@pytest.mark.parametrize("policy", ["cut", "renoise"])
def test_a_hard_change_after_a_minute_is_on_screen_as_soon(open_page, policy):
    screen = open_page()
    screen.start(background="a gray background")
    screen.until(lambda: screen.seconds > 60, 70, step=1)
    begin, _ = screen.buffered
    assert screen.seconds - begin < 40  # media that was played is dropped
    screen.change(policy, background="a navy background")
    assert _until_shown(screen, NAVY, instead_of=GRAY) < LEAD + 1.5


def test_pause_go_on_and_stop(open_page, server):
    screen = open_page()
    screen.start()
    screen.page.click("#pause")
    screen.wait_state("paused")
    held = screen.seconds
    made = _blocks(screen)
    screen.page.wait_for_timeout(600)
    assert screen.seconds == held
    assert _blocks(screen) <= made + 2
    screen.page.click("#pause")
    screen.until(lambda: screen.seconds > held + 0.5, 3)
    _turn(screen, hidden=True)  # to another tab: nothing is made that nobody sees
    screen.page.wait_for_timeout(300)
    held, made = screen.seconds, _blocks(screen)
    screen.page.wait_for_timeout(600)
    assert screen.seconds == held
    assert _blocks(screen) <= made + 1
    _turn(screen, hidden=False)
    screen.until(lambda: screen.seconds > held + 0.3, 3)
    screen.page.click("#stop")
    screen.wait_state("ended")
    assert "as you asked" in screen.page.inner_text("#state")
    assert screen.page.inner_text("#submit") == "Start"
    record = json.load(_get(screen, "#json"))
    assert record["seed"] == 3
    assert _get(screen, "#mp4").read(8)[4:] == b"ftyp"
    assert "inference.py --replay" in screen.page.inner_text("#replay")


def test_a_video_of_some_seconds_plays_to_its_end(open_page):
    screen = open_page()
    screen.page.fill("#seconds", "1")
    screen.page.click("#submit")
    screen.wait_state("ended")
    assert screen.page.inner_text("#state").startswith("The end, after 1.")
    first = screen.session
    screen.page.click("#submit")  # and another one may follow
    screen.until(lambda: screen.session != first, 5)
    screen.wait_state("ended")


def test_a_past_moment_branches(open_page):
    """A click asks first; the keyboard alone goes to a branch point, into the form, and back."""
    screen = open_page()
    screen.start(background="a gray background")
    screen.until(lambda: screen.seconds > 1.8, 5)
    screen.page.click("#timeline .track", position={"x": 120, "y": 60})
    assert "go on from there" in screen.page.inner_text("#branch-words")
    assert screen.page.evaluate("document.activeElement.id") == "branch-go"
    screen.page.keyboard.press("Escape")
    assert screen.page.is_hidden("#branch")
    assert screen.share(GRAY) > 0.6  # nothing was lost
    screen.say(background="a navy background")
    track = screen.page.locator("#timeline .track")
    for key in ("Home", "ArrowRight"):
        track.press(key)
    chosen = float(track.get_attribute("aria-valuenow"))
    assert 0 < chosen < screen.seconds
    track.press("Enter")
    screen.page.check("#branch-prompt")
    screen.page.keyboard.press("Enter")
    screen.until(lambda: screen.share(NAVY) > 0.6, 10)
    assert screen.buffered[0] <= chosen + 0.1
    assert "A large red circle" in screen.texts("#prompts li")[0]


def test_a_page_that_is_loaded_again_goes_on_with_its_video(open_page):
    screen = open_page()
    screen.start(background="a gray background")
    screen.until(lambda: screen.seconds > 0.5, 5)
    screen.change("cut", background="a navy background")
    screen.until(lambda: screen.share(NAVY) > 0.6, 10)
    before, session = screen.seconds, screen.session
    screen.page.reload()
    screen.wait_state("playing")
    assert screen.session == session
    screen.until(lambda: screen.seconds > before + 0.5, 5)
    assert screen.share(NAVY) > 0.6
    times = screen.texts("#prompts li")
    assert len(times) == 2
    assert "asked at" in times[1]


def test_a_lost_socket_and_a_broken_chunk_are_got_over(open_page):
    """As a dying network and a damaged stream have it; the page attaches again by itself."""
    screen = _tapped(open_page())
    screen.page.evaluate("window.sockets.at(-1).close()")
    screen.wait_state("offline")
    screen.wait_state("playing")
    before = screen.seconds
    screen.until(lambda: screen.seconds > before + 0.5, 3)
    screen.page.evaluate("window.damaged = true")
    screen.until(lambda: screen.page.evaluate("window.damaged") is False, 3)
    before = screen.seconds
    screen.until(lambda: screen.seconds > before + LEAD + 0.5, 6)


def test_a_video_that_is_lost_is_told_once(open_page, server):
    """Ten errors a second said "start a session first" instead of what had happened."""
    screen = _tapped(open_page())
    lost = screen.session
    screen.page.evaluate("window.sockets.at(-1).close()")
    ending = server.pool.close(server.pool.find(lost), "idle")
    loop = next(iter(server.pool._tasks)).get_loop()
    asyncio.run_coroutine_threadsafe(ending, loop).result(10)
    screen.page.wait_for_selector("#alert:not([hidden])")
    screen.page.wait_for_timeout(500)
    _turn(screen, hidden=True)
    _turn(screen, hidden=False)
    screen.page.wait_for_timeout(300)
    assert "has ended" in screen.page.inner_text("#alert-text")
    assert screen.page.evaluate("sessionStorage.getItem('rolling-forcing-live')") is None
    screen.page.evaluate("window.dying = true")  # and the next one is lost before it begins
    screen.page.click("#submit")
    screen.page.wait_for_selector("#alert:not([hidden])")
    assert "before the new video began" in screen.page.inner_text("#alert-text")
    screen.page.evaluate("window.dying = false")
    screen.start()
    assert screen.session != lost


def test_two_pages_at_once_and_one_dies(open_page, server):
    """One of them behind a path prefix, where only addresses relative to the page work."""
    one, other = open_page(), open_page(f"http://localhost:{server.port}{PREFIX}")
    one.start(background="a gray background")
    other.start(background="a navy background")
    assert one.share(GRAY) > 0.6
    assert other.share(NAVY) > 0.6
    assert PREFIX in other.page.evaluate("document.querySelector('#json').href")
    assert json.load(_get(other, "#json"))["seed"] == 3
    dead = other.session
    other.page.context.close()  # a tab that is gone, without a word
    before = one.seconds
    one.until(lambda: server.pool.find(dead) is None, 10)
    assert one.seconds > before + 1


def test_a_video_that_another_window_takes_over(open_page):
    screen = open_page()
    screen.start()
    second = screen.page.context.new_page()
    stored = screen.page.evaluate("sessionStorage.getItem('rolling-forcing-live')")
    second.add_init_script(f"sessionStorage.setItem('rolling-forcing-live', {json.dumps(stored)})")
    second.goto(screen.page.url)
    second.wait_for_selector("body[data-state=playing]")
    screen.wait_state("replaced")
    assert "Another window" in screen.page.inner_text("#state")


def test_phone_and_dark(open_page):
    phone = open_page(
        viewport={"width": 360, "height": 740}, color_scheme="dark", reduced_motion="reduce"
    )
    assert phone.overflow() == 0
    phone.start()
    phone.change("keep", colour="green")
    phone.page.click("#timeline .track", position={"x": 5, "y": 60})
    assert phone.overflow() == 0
    back = phone.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(int(part) for part in back[4:-1].split(",")) < 150


def test_parts_of_the_page(open_page):
    """Addresses, spans of time, branch points and sentences, in the modules themselves."""
    screen = open_page()
    results = screen.page.evaluate(PARTS)
    assert results["socket"] == "wss://host:1/a/v1/realtime/video?format=jpeg"
    assert results["spans"] == [[0, 0, 2], [2, 4, 5], [5, 6, 6]]
    assert results["points"] == [None, 3, 8]
    assert results["read"] == {"colour": "red", "kind": "big circle"}
    assert results["unread"] is None
    assert results["size"] == ["0 B", "1.5 kB", "38 MB"]
    assert results["clock"] == ["0:00", "0:59.9", "10:05"]


def test_errors_are_sentences(open_page):
    screen = open_page()
    screen.page.fill("#seconds", "-3")
    screen.page.click("#submit")
    screen.page.wait_for_selector("#alert:not([hidden])")
    text = screen.page.inner_text("#alert-text")
    assert text[0].isupper()
    assert text.endswith(".")
    screen.page.click("#alert-close")
    assert screen.page.is_hidden("#alert")
    screen.page.fill("#seconds", "2")
    screen.page.click("#submit")
    screen.wait_state("playing")


@pytest.mark.parametrize(
    "lacks",
    [
        "delete window.MediaSource; delete window.ManagedMediaSource",
        "MediaSource.isTypeSupported = () => false",
        "MediaSource.prototype.addSourceBuffer = () => { throw new Error('no decoder'); }",
    ],
    ids=["media sources", "its codec", "what it says it has"],
)
def test_a_browser_that_lacks_something_gets_pictures(open_page, lacks):
    screen = open_page()
    screen.page.add_init_script(lacks)
    screen.page.reload()
    screen.page.wait_for_selector("#composer > *")
    screen.start(background="a gray background")
    assert screen.page.is_visible("#frames")
    assert screen.share(GRAY) > 0.6
    screen.change("cut", background="a navy background")
    screen.until(lambda: screen.share(NAVY) > 0.6, LEAD + 2)


def _tapped(screen: Screen) -> Screen:
    """The page with sockets that a test has in hand, playing."""
    screen.page.add_init_script(f"({TAPPED})()")
    screen.page.reload()
    screen.page.wait_for_selector("#composer > *")
    screen.start()
    screen.until(lambda: screen.seconds > 0.5, 5)
    return screen


def _until_shown(screen: Screen, colour, *, instead_of) -> float:
    """Seconds until the picture has one background and nothing of another one."""
    return screen.until(lambda: screen.share(colour) > 0.6 and screen.share(instead_of) < 0.05, 10)


def _moment(screen: Screen, place: int, words: str) -> float:
    """A time in the list of prompts, in seconds of the video."""
    text = screen.texts("#prompts li")[place]
    minutes, seconds = text.partition(words)[2].split()[0].split(":")
    return 60 * int(minutes) + float(seconds)


def _turn(screen: Screen, *, hidden: bool) -> None:
    """The page goes out of sight, or comes back."""
    screen.page.evaluate(
        "(hidden) => { Object.defineProperty(document, 'hidden', { value: hidden,"
        "configurable: true }); document.dispatchEvent(new Event('visibilitychange')); }",
        hidden,
    )


def _blocks(screen: Screen) -> int:
    return int(screen.page.inner_text("#n-block"))


def _get(screen: Screen, link: str):
    return urllib.request.urlopen(screen.page.evaluate(f"document.querySelector('{link}').href"))
