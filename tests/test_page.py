"""The page of `edge-kv serve` in a real browser: what a person does with it, and how it looks."""

import threading
import time

import browser as browsers
import pytest
from fake_artifact import NumpySession, write_artifact

from edge_kv.artifact import read_artifact
from edge_kv.runtime.chat import Piece, Reply, Turn
from edge_kv.runtime.replies import CONTENT, THINKING
from edge_kv.serve.app import Settings, make_app
from edge_kv.serve.command import make_server

pytestmark = pytest.mark.skipif(
    browsers.PROGRAM is None, reason="no browser; on Debian and Ubuntu: apt install chromium"
)
LAST = "document.querySelector('#log article:last-child"
DONE = "document.querySelector('#stop').hidden"
CONTRAST = """(() => {
  const light = (c) => c.match(/[\\d.]+/g).slice(0, 3).map(Number).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$|transparent/.test(c)) return c; } return "rgb(255, 255, 255)"; };
  return ["#model", "#log article .text", "#log .figures", "#context-text", "#send", "#m-total"]
    .map((s) => document.querySelector(s)).map((e) => {
      const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05); });
})()"""


class Slow(NumpySession):
    """A session whose tokens take a moment, so that there is something to stop."""

    def _run_decode(self, ids, pos):
        time.sleep(0.01)
        return super()._run_decode(ids, pos)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(address, server) of a server over a toy model."""
    import uvicorn

    root = write_artifact(tmp_path_factory.mktemp("page") / "toy", ctx=2048, programs=False)
    server = make_server(Slow(read_artifact(root)), Settings(planned=90 << 20))
    config = uvicorn.Config(make_app(server), port=0, log_level="error")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    until = time.monotonic() + browsers.SECONDS
    while not running.started:
        assert time.monotonic() < until
        time.sleep(0.05)
    port = running.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}", server
    running.should_exit = True
    thread.join(browsers.SECONDS)


@pytest.fixture(scope="module")
def browser():
    made = browsers.Browser()
    yield made
    made.close()


@pytest.fixture
def page(browser, served):
    """The page, newly opened; it has to stay free of errors and of requests to other hosts."""
    browser.size(1100, 720)
    browser.requests.clear()
    browser.faults.clear()
    browser.open(f"{served[0]}/")
    browser.run("localStorage.clear()")
    browser.wait("document.querySelector('#summary').textContent.includes('context')")
    yield browser
    assert browser.faults == []
    assert [u for u in browser.requests if not u.startswith((served[0], "data:"))] == []


def ask(page, text, tokens):
    """Send a message as a person would, for a reply of at most so many tokens."""
    page.run(f"document.querySelector('#max_tokens').value = {tokens}")
    page.run("document.querySelector('#input').focus()")
    page.type(text)
    page.key("Enter", "\r")
    page.wait("document.querySelectorAll('#log article').length % 2 == 0")


def test_a_conversation_with_its_figures(page, served):
    for turn, question in enumerate(("Hello", "And then?"), 1):
        ask(page, question, 12)
        page.wait(DONE)
        assert page.run("document.querySelectorAll('#log article').length") == 2 * turn
    texts = page.run("[...document.querySelectorAll('#log article .text')].map(e => e.textContent)")
    assert texts[0] == "Hello" and texts[2] == "And then?"
    assert "12 tokens" in page.run(f"{LAST} .figures').textContent")
    page.wait("document.querySelector('#context').value > 0")
    held = served[1].generator.session.pos
    page.wait(f"document.querySelector('#context-text').textContent.startsWith('{held} of')")
    assert page.run("document.querySelector('#area-state').getAttribute('d').length") > 10
    assert "94.4 MB" in page.run("document.querySelector('#m-planned').textContent")


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_ends_the_reply_here_and_on_the_device(page, served, how):
    ask(page, "Tell me all", 1500)
    page.wait(f"{LAST} .text').textContent.length > 20")
    edits = "[...document.querySelectorAll('#log button')].filter(b => b.textContent == 'Edit')"
    assert page.run(f"{edits}.length") == 0  # while the question is being answered
    if how == "button":
        page.click("#stop")
    else:
        page.key("Escape")
    page.wait(DONE)
    assert "stopped" in page.run(f"{LAST} .figures').textContent")
    assert page.run(f"{edits}.length") == 1
    assert page.run("document.activeElement.id") == "input"  # and not nowhere
    until = time.monotonic() + browsers.SECONDS
    while served[1].worker.busy:
        assert time.monotonic() < until
        time.sleep(0.05)
    ask(page, "Go on", 4)
    page.wait(DONE)
    assert page.run("document.querySelectorAll('#log article.failed').length") == 0


def test_regenerate_answers_once_more_and_edit_takes_back(page):
    page.run("document.querySelector('#temperature').value = 3")
    page.run("document.querySelector('#seed').value = 1")  # neither seed draws an end early
    ask(page, "Hello", 24)
    page.wait(DONE)
    first = page.run(f"{LAST} .text').textContent")
    page.run("document.querySelector('#seed').value = 2")
    page.run(f"[...{LAST}').querySelectorAll('button')]"
             ".find(b => b.textContent == 'Regenerate').click()")  # fmt: skip
    page.wait(f"{DONE} && {LAST} .figures').textContent.includes('24 tokens')")
    assert page.run("document.querySelectorAll('#log article').length") == 2
    assert page.run(f"{LAST} .text').textContent") != first
    page.run("document.querySelector('#log article.user button').click()")
    assert page.run("document.querySelectorAll('#log article').length") == 0
    assert page.run("document.querySelector('#input').value") == "Hello"


@pytest.fixture
def asked(served, monkeypatch):
    """The conversations that the server is asked, with their options, as they come."""
    generator, heard = served[1].generator, []
    reply = generator.reply

    def hearing(messages, **how):
        heard.append((messages, how["options"]))
        return reply(messages, **how)

    monkeypatch.setattr(generator, "reply", hearing)
    return heard


def test_a_failure_is_told_and_the_conversation_goes_on(page, asked):
    ask(page, "Hello", 4)
    page.wait(DONE)
    ask(page, "long " * 3000, 4)
    page.wait(DONE)
    assert "context" in page.run(f"{LAST} .text').textContent")
    assert page.run("document.querySelectorAll('#log article.failed').length") == 1
    ask(page, "And now?", 4)
    page.wait(DONE)
    assert page.run("document.querySelectorAll('#log article.failed').length") == 1
    assert [m.content for m in asked[-1][0] if m.role == "user"] == ["Hello", "And now?"]
    page.faults.clear()  # the browser logs the status 400


def test_settings_reach_the_model(page, asked):
    values = {"system": "Be brief.", "temperature": 0.5, "top_k": 7, "top_p": 0.9, "seed": 3}
    for name, value in {**values, "think": "on"}.items():
        page.run(f"document.querySelector('#{name}').value = {value!r}")
    ask(page, "Hello", 4)
    page.wait(DONE)
    messages, options = asked[-1]
    assert [(m.role, m.content) for m in messages] == [("system", "Be brief."), ("user", "Hello")]
    given = {n: getattr(options, n) for n in (*values, "think") if n != "system"}
    assert given == {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "seed": 3, "think": True}


def test_hebrew_begins_on_the_right_and_tabs_meet_what_is_seen(page):
    ask(page, "שלום (abc).", 4)
    page.wait(DONE)
    direction = "getComputedStyle(document.querySelector('#log .user .text')).direction"
    assert page.run(direction) == "rtl"
    focus = "(e => e.id || e.textContent)(document.activeElement)"
    page.run("document.querySelector('#input').focus()")
    met = []
    while page.key("Tab") or page.run("document.activeElement !== document.body"):
        met.append(page.run(focus))
    assert met == ["attach", "send"]


def test_a_text_file_is_added_and_another_file_is_refused(page, tmp_path):
    (tmp_path / "list.txt").write_text("milk\nbread ü")
    page.upload("#file", tmp_path / "list.txt")
    page.wait("document.querySelector('#input').value.includes('list.txt:\\nmilk\\nbread ü')")
    (tmp_path / "odd.bin").write_bytes(b"\xff\xfe\x00")
    page.upload("#file", tmp_path / "odd.bin")
    page.wait("document.querySelector('#notice').textContent.includes('odd.bin is not')")


def test_a_thought_is_folded_and_stays_open_once_opened(page, served, monkeypatch):
    told = threading.Event()

    def pieces(turn):
        yield Piece(THINKING, "Hm.")
        yield Piece(CONTENT, "Yes")
        told.wait(browsers.SECONDS)
        yield Piece(CONTENT, ".")
        turn[0].reply = Reply("Yes.", (7, 8), 3, 0, 0.1, 0.2, thinking="Hm.")

    def reply(messages, **how):
        heard.append(messages)
        turn = []
        turn.append(Turn(pieces(turn)))
        return turn[0]

    heard = []
    monkeypatch.setattr(served[1].generator, "reply", reply)
    ask(page, "Really?", 8)
    page.wait(f"{LAST} .text').textContent == 'Yes'")
    assert page.run(f"{LAST} .thinking').textContent") == "Hm."
    assert page.run(f"{LAST} details').open") is False
    page.click("#log article:last-child summary")
    told.set()
    page.wait(DONE)
    assert page.run(f"{LAST} .text').textContent") == "Yes."
    assert page.run(f"{LAST} details').open") is True
    ask(page, "Sure?", 8)
    page.wait(DONE)
    assert [m.content for m in heard[-1]] == ["Really?", "Yes.", "Sure?"]
    assert not any(m.thinking for m in heard[-1])


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1100])
def test_every_text_can_be_read_and_nothing_is_cut_off(page, tmp_path, dark, width):
    page.size(width, 720, dark=dark)
    ask(page, "A question with a wordthatislongerthanthescreenis" + "x" * 80, 24)
    page.wait(DONE)
    assert page.run("document.documentElement.scrollWidth") <= width
    assert min(page.run(CONTRAST)) >= 4.5  # WCAG AA
    color = "getComputedStyle(document.body).backgroundColor"
    brightness = page.run(f"{color}.match(/\\d+/g).map(Number)")
    assert (sum(brightness) < 200) == dark
    page.click("#toggle-settings")
    assert page.run("document.activeElement.id") == "system"
    page.key("Escape")
    assert page.run("document.activeElement.id") == "toggle-settings"
    told = page.run("document.querySelector('#memory').innerText")
    assert all(kind in told for kind in ("State", "Heap", "Mapped", "Planned"))
    box = page.run("(r => [r.left, r.right, r.bottom])"
                   "(document.querySelector('#send').getBoundingClientRect())")  # fmt: skip
    assert (0 <= box[0] < box[1] <= width and box[2] <= 720) or width < 600
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 5000
