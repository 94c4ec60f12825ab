"""The page's tests: a real Chromium, a real service, the provider of fake_openai.py, a real PostgreSQL.

    python -m pytest -q test_web.py                  all of them
    SCREENSHOTS=1 python -m pytest -q -k look        take the README's pictures again, too

Without a Chromium they are skipped, but not where CI=true. At the end of every test no page may have seen an
error or broken its Content-Security-Policy: see the fixture `browse`.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from pathlib import Path

import pytest
from axe_playwright_python.base import AXE_FILE_PATH
from playwright.sync_api import expect, sync_playwright

HERE = Path(__file__).parent
WEB = HERE / "web"
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
FLAGS += ["--host-resolver-rules=MAP plain.test 127.0.0.1"]  # plain http that is no secure context
WATCH = """addEventListener("securitypolicyviolation",
    (event) => console.error("CSP", event.violatedDirective, event.blockedURI))"""
POLICY = {
    "default-src": "'none'", "connect-src": "'self'", "img-src": "'self' data:", "script-src": "'self'",
    "style-src": "'self'", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
}  # fmt: skip
KEY = "a-key-for-the-browser-tests"
OTHER_KEY = "another-key-for-the-browser-tests"
S3 = "Amazon S3 keeps objects in buckets. "
LONG = {"answer": S3 * 20, "interval": 0.15}  # half a minute, for what ends before its end
MEDIUM = {"answer": S3 * 5, "interval": 0.05}  # some 2 s, for what goes on after an interruption
LINES = "\n\n".join(f"{number}. line about S3" for number in range(60))

# ---- Harness ----


@pytest.fixture(scope="module")
def browser():
    """A Chromium; without one its tests are skipped, but not in CI."""
    if not CHROMIUM and os.environ.get("CI") != "true":
        pytest.skip("no Chromium: install it, or name it in CHROMIUM")
    with sync_playwright() as playwright:
        expect.set_options(timeout=15_000)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def browse(browser):
    """browse(url, **options) opens a page; at the end no page may have seen an error or broken its policy."""
    contexts, problems = [], []

    def watch(page):
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)

    def open_page(url, **options):
        options.setdefault("viewport", {"width": 1200, "height": 800})
        context = browser.new_context(**options)
        contexts.append(context)
        context.on("page", watch)
        context.add_init_script(WATCH)
        page = context.new_page()
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    # Chromium itself reports every response of 400 and above, and every broken connection, as an error.
    assert [problem for problem in problems if "Failed to load resource" not in problem] == []


@pytest.fixture(scope="module")
def service(start_shared):
    """The service that these tests share; at its end it does not wait for answers that tests left running."""
    return start_shared(FIRST_TOKEN_SECONDS=3, STALL_SECONDS=3, GRACE_SECONDS=1)


@pytest.fixture
def page(browse, service):
    return browse(f"{service.url}/")


@pytest.fixture(scope="module")
def keyed(start_shared):
    """A service that wants a key; it knows two owners."""
    return start_shared(GRACE_SECONDS=1, API_KEYS=f"browser:{KEY},other:{OTHER_KEY}")


@pytest.fixture(scope="module")
def static_page(browser, service):
    """A page whose functions are called one by one."""
    page = browser.new_page()
    page.goto(f"{service.url}/")
    yield page
    page.close()


class Network:
    """A TCP proxy before the service that can lose everything, and come back."""

    def __init__(self, port):
        self.target = ("127.0.0.1", port)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/"
        self.sockets, self.up = set(), True
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                client = self.listener.accept()[0]
                if not self.up:
                    client.close()
                    continue
                server = socket.create_connection(self.target)
                self.sockets |= {client, server}
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self.pump, args=ends, daemon=True).start()

    def pump(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def lose(self):
        self.up = False
        for end in self.sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.listener.close()
        self.lose()


@pytest.fixture
def network(service):
    with contextlib.closing(Network(service.port)) as network:
        yield network


def fake(question, **directives):
    """A question that scripts the provider's answer."""
    return f"{question} #fake({', '.join(f'{key}={json.dumps(value)}' for key, value in directives.items())})"


def box(page):
    """Where one types."""
    return page.get_by_label("Your question")


def ask(page, question):
    """Type a question and send it; the locator of its answer."""
    box(page).fill(question)
    box(page).press("Enter")
    return page.locator(".answer").last


def complete(page, question):
    """Ask, and wait for the whole answer; its text."""
    answer = ask(page, question)
    expect(answer).to_have_class("answer complete")
    return answer.locator(".prose").inner_text()


def begun(answer):
    """Wait until an answer has begun to appear and is not whole; the text so far."""
    expect(answer.locator(".prose p").first).not_to_be_empty()
    expect(answer).to_have_class("answer running")
    return answer.locator(".prose").inner_text()


def session(page):
    """The id of the session on screen."""
    return page.evaluate("view.id")


def history(service, session_id, **headers):
    """A session's messages as the service stored them, oldest first."""
    answer = service.get("/chat", params={"limit": 200, "session_id": session_id}, headers=headers)
    return answer.json()["messages"][::-1] if answer.status_code == 200 else []


def post(service, question, session_id=None, key=None):
    """A turn without a browser; the status."""
    body = {"message": question, "session_id": session_id or str(uuid.uuid4())}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return service.post("/chat/stream", json=body, headers=headers).status_code


def keys_sent(page):
    """A list that gets the Idempotency-Key of every question that the page sends from now on."""
    keys = []

    def note(request):
        if request.method == "POST" and request.url.endswith("/chat/stream"):
            keys.append(request.headers.get("idempotency-key"))

    page.on("request", note)
    return keys


def sign_in(page, key, remember=False):
    """Fill in the dialog that asks for a key."""
    page.get_by_label("Your key").fill(key)
    page.get_by_label("Remember me").set_checked(remember)
    page.get_by_role("button", name="Sign in").click()


def until_true(page, expression):
    """Wait until an expression is true; wait_for_function() would need the eval that the policy forbids."""
    deadline = time.monotonic() + 15
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression


def wait_in_vain(page, seconds):
    """Let the page's clock run until it waits at least so long for the next try."""
    note, deadline = page.locator(".answer").last.locator(".note"), time.monotonic() + 15
    while not (left := re.search(r"Trying again in (\d+) s", note.inner_text())) or int(left[1]) < seconds:
        assert time.monotonic() < deadline
        page.clock.run_for(500)


def manage(page, what, which=0):
    """Click one of the buttons that a conversation of the list shows under the pointer."""
    page.locator(".session").nth(which).hover()
    page.locator(".session").nth(which).get_by_role("button", name=what).click()


def titles(page):
    """The list's links."""
    return page.locator("#sessions a")


def clipboard(page):
    """What was copied, told by pasting it into the box."""
    box(page).fill("")
    box(page).press("ControlOrMeta+v")
    return box(page).input_value()


# ---- Answers ----


def test_words_appear_while_streaming(page):
    answer = ask(page, fake("What is S3?", **LONG))
    first = begun(answer)
    expect(answer.locator(".prose")).not_to_have_text(first)
    assert len(begun(answer)) > len(first)
    expect(answer).to_have_attribute("aria-busy", "true")


def test_a_whole_answer_is_what_the_service_stored(page, service):
    text = complete(
        page, fake("What is S3?", answer="Amazon S3 keeps objects: für größere Daten, S3は安全 🚀.")
    )
    assert text == history(service, session(page))[-1]["content"]
    expect(page.get_by_role("status")).to_have_text("Answered.")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")


def test_end_replaces_a_text_that_drifted_off(page):
    answer = ask(page, fake("What is S3?", drift=400, paragraph=1, interval=0.01))
    first = begun(answer)
    expect(answer).to_have_class("answer refused")
    assert first[:20] not in answer.inner_text()
    expect(answer).to_contain_text("I can only help with Amazon Web Services")


def test_a_refusal_looks_unlike_an_answer_and_says_what_to_try(page):
    answer = ask(page, fake("How do I bake bread?", judge="BLOCK"))
    expect(answer).to_have_class("answer refused")
    expect(answer.locator(".when.refused")).to_contain_text("Try naming the AWS service")
    expect(answer).to_have_css("border-top-style", "dashed")
    expect(answer.get_by_role("button", name="Copy")).to_be_hidden()


def test_a_failure_looks_like_one_and_is_retried_with_the_same_key(page, service):
    keys = keys_sent(page)
    answer = ask(page, fake("What is S3?", fault="reset", after=20, fault_once=1))
    expect(answer).to_have_class("answer failed")
    expect(answer.locator(".when.failed")).to_have_css("border-top-style", "dashed")
    expect(answer.get_by_role("button", name="Copy")).to_be_hidden()
    page.reload()  # the key outlives a reload, too, and so do the looks
    expect(answer).to_have_class("answer failed")
    expect(answer.locator(".when.failed")).to_be_visible()
    page.get_by_role("button", name="Ask again").click()
    expect(answer).to_have_class("answer complete")
    assert len(keys) == 2 and keys[0] == keys[1] and len(keys[0]) == 36
    assert [message["role"] for message in history(service, session(page))] == ["user", "assistant"]
    expect(page.locator(".question")).to_have_count(1)


def test_stop_keeps_what_was_said_and_says_so(page, service):
    answer = ask(page, fake("What is S3?", **LONG))
    said = begun(answer)
    page.get_by_role("button", name="Stop").click()
    expect(answer).to_have_class("answer stopped")
    expect(answer.locator(".prose")).to_contain_text(said[:20])
    expect(answer).to_contain_text("Stopped.")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    assert history(service, session(page))[-1]["status"] == "stopped"


def test_an_answer_that_was_cut_says_so_once_and_can_be_continued(page):
    answer = ask(page, fake("What is S3?", answer=S3, fault="length"))
    expect(answer).to_have_class("answer truncated")
    assert answer.inner_text().count("cut at the length limit") == 1
    answer.get_by_role("button", name="Continue").click()
    expect(page.locator(".answer")).to_have_class(["answer truncated", "answer complete"])
    expect(page.locator(".question p").last).to_have_text("Continue")
    expect(page.get_by_role("button", name="Continue")).to_have_count(0)


def test_a_new_question_ends_the_answer_that_still_runs(page):
    begun(ask(page, fake("What is S3?", **LONG)))
    complete(page, fake("And EC2?", answer="Amazon EC2 rents virtual machines."))
    expect(page.locator(".answer").first).to_have_class("answer stopped")
    expect(page.locator(".answer")).to_have_count(2)


def test_to_ask_again_is_a_new_turn_with_the_same_words(page, service):
    keys = keys_sent(page)
    complete(page, fake("What is S3?", answer=S3))
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator(".answer.complete")).to_have_count(2)
    assert len(set(keys)) == 2
    first, _, again, _ = history(service, session(page))
    assert first["content"] == again["content"]
    expect(page.get_by_role("button", name="Ask again")).to_have_count(1)  # of the last answer only
    expect(page.get_by_role("button", name="Edit")).to_have_count(1)


def test_the_last_question_is_edited_and_sent_as_a_new_one(page, service):
    complete(page, fake("What is S3?", answer=S3))
    box(page).press_sequentially("a draft")
    page.get_by_role("button", name="Edit").click()
    expect(box(page)).to_be_focused()
    expect(box(page)).to_have_value(re.compile(r"^What is S3\? #fake"))
    box(page).press("ControlOrMeta+z")
    expect(box(page)).to_have_value("a draft")
    page.get_by_role("button", name="Edit").click()
    box(page).press("Home")
    page.keyboard.type("Please: ")
    box(page).press("Enter")
    expect(page.locator(".answer.complete")).to_have_count(2)
    assert history(service, session(page))[2]["content"].startswith("Please: What is S3?")


def test_silence_is_called_thinking(page):
    page.clock.install()
    page.reload()
    answer = ask(page, fake("What is S3?", answer=S3, first=2))
    expect(answer).to_have_class("answer running")
    page.clock.fast_forward(5000)
    expect(answer).to_have_class("answer running silent")
    expect(answer.get_by_text("Still thinking")).to_be_visible()
    expect(answer).to_have_class("answer complete")
    expect(answer.get_by_text("Still thinking")).to_be_hidden()


def test_the_view_follows_the_answer_unless_the_reader_has_scrolled_up(page):
    answer = ask(page, fake("What is S3?", answer=LINES, interval=0.005))
    newest = page.get_by_role("button", name="Jump to the newest message")
    expect(answer).to_contain_text("line about S3")
    until_true(page, "$('scroll').scrollTop > 200 && atEnd()")
    page.mouse.move(700, 300)
    page.mouse.wheel(0, -2000)
    expect(newest).to_be_visible()
    place = page.evaluate("$('scroll').scrollTop")
    expect(answer).to_have_class("answer complete")
    assert page.evaluate("$('scroll').scrollTop") <= place
    newest.click()
    expect(newest).to_be_hidden()
    assert page.evaluate("atEnd()")


# ---- Reloads and lost networks ----


def test_a_reload_in_the_middle_goes_on_with_the_answer(page, service):
    answer = ask(page, fake("What is S3?", **MEDIUM))
    said = begun(answer)
    page.reload()
    again = begun(answer)
    assert again.startswith(said[:20]) and len(again) >= len(said)
    expect(answer).to_have_class("answer complete")
    stored = history(service, session(page))
    assert answer.locator(".prose").inner_text().strip() == stored[-1]["content"].strip()
    expect(page.locator(".question")).to_have_count(1)


def test_a_network_lost_in_the_middle_is_picked_up_again(browse, network, service):
    page = browse(network.url)
    answer = ask(page, fake("What is S3?", **MEDIUM))
    said = begun(answer)
    network.lose()
    expect(answer.locator(".note")).to_contain_text("The connection was lost. Trying again in")
    expect(answer.locator(".prose")).to_contain_text(said[:20])
    network.up = True
    expect(answer).to_have_class("answer complete")
    expect(answer.locator(".note")).to_be_empty()
    stored = history(service, session(page))
    assert len(stored) == 2
    assert answer.locator(".prose").inner_text().strip() == stored[1]["content"].strip()


def test_a_question_that_was_lost_on_its_way_is_sent_once(browse, network, service):
    page = browse(network.url)
    complete(page, fake("What is S3?", answer="Amazon S3 keeps objects."))
    network.lose()
    answer = ask(page, fake("And EC2?", answer="Amazon EC2 rents virtual machines."))
    expect(answer.locator(".note")).to_contain_text("The connection was lost.")
    network.up = True
    expect(answer).to_have_class("answer complete")
    expect(answer).to_contain_text("Amazon EC2 rents")
    assert len(history(service, session(page))) == 4


def test_a_question_that_never_arrived_is_sent_after_a_reload(browse, network, service):
    page = browse(network.url)
    page.clock.install()
    page.reload()
    network.lose()
    answer = ask(page, fake("What is S3?", answer=S3))
    wait_in_vain(page, 3)
    network.up = True
    page.reload()
    expect(answer).to_have_class("answer complete")
    assert len(history(service, session(page))) == 2
    expect(page.locator(".question")).to_have_count(1)


def test_the_same_question_asked_again_is_not_taken_for_the_one_before(browse, network, service):
    page = browse(network.url)
    page.clock.install()
    page.reload()
    complete(page, fake("What is S3?", answer=S3))
    network.lose()
    page.get_by_role("button", name="Ask again").click()
    wait_in_vain(page, 3)
    network.up = True
    page.reload()
    until_true(page, "!find().pending")
    assert len(history(service, session(page))) == 4


def test_back_online_it_does_not_wait(browse, network):
    page = browse(network.url)
    page.clock.install()
    page.reload()
    network.lose()
    answer = ask(page, fake("What is S3?", answer="Amazon S3 keeps objects."))
    wait_in_vain(page, 7)
    network.up = True
    started = time.monotonic()
    page.evaluate("dispatchEvent(new Event('online'))")
    expect(answer).to_have_class("answer complete")
    assert time.monotonic() - started < 5


def test_of_two_questions_that_wait_only_the_last_is_sent(browse, network, service):
    page = browse(network.url)
    network.lose()
    ask(page, fake("What is S3?", answer=S3))
    expect(page.locator(".answer .note")).to_contain_text("The connection was lost.")
    answer = ask(page, fake("What is EC2?", answer="Amazon EC2 rents virtual machines."))
    network.up = True
    expect(answer).to_have_class("answer complete")
    expect(page.locator(".answer").first).to_have_class("answer stopped")
    assert len(history(service, session(page))) == 2


def test_a_question_stopped_while_it_waits_is_not_sent(browse, network, service):
    page = browse(network.url)
    network.lose()
    answer = ask(page, "What is S3?")
    expect(answer.locator(".note")).to_contain_text("The connection was lost.")
    page.keyboard.press("Escape")
    expect(answer).to_have_class("answer stopped")
    network.up = True
    page.reload()
    expect(page.get_by_role("status")).to_contain_text("does not exist")
    assert history(service, session(page)) == []


# ---- Sign-in and limits ----


def test_a_key_is_asked_for_before_the_first_question(browse, keyed):
    page = browse(keyed.url)
    expect(page.get_by_role("dialog", name="Sign in")).to_be_visible()
    expect(page.get_by_label("Your key")).to_be_focused()
    expect(page.get_by_role("alert")).to_be_hidden()
    sign_in(page, "not-the-right-key-at-all")
    expect(page.get_by_role("alert")).to_contain_text("not accepted")
    expect(page.get_by_label("Your key")).to_have_value("")
    sign_in(page, KEY)
    expect(page.get_by_role("dialog")).to_be_hidden()
    complete(page, fake("What is S3?", answer=S3))
    assert KEY not in page.evaluate("JSON.stringify(localStorage)") + page.inner_html("html")


def test_a_key_is_kept_for_the_tab_unless_one_says_remember(browse, keyed):
    page = browse(keyed.url)
    sign_in(page, KEY)
    complete(page, fake("What is S3?", answer=S3))
    page.reload()
    expect(page.locator(".answer")).to_have_class("answer complete")
    other = page.context.new_page()
    other.goto(keyed.url)
    sign_in(other, KEY, remember=True)
    third = page.context.new_page()
    third.goto(keyed.url)
    complete(third, fake("What is S3?", answer=S3))
    expect(third.get_by_role("dialog")).to_be_hidden()


def test_to_sign_out_forgets_the_key_in_every_tab(browse, keyed):
    page = browse(keyed.url)
    sign_in(page, KEY, remember=True)
    complete(page, fake("What is S3?", answer=S3))
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.locator(".answer.complete")).to_be_visible()
    page.bring_to_front()
    page.get_by_role("button", name="Sign out").click()
    dialog = page.get_by_role("dialog", name="Sign out?")
    dialog.get_by_role("button", name="Cancel").click()
    expect(page.locator(".answer.complete")).to_be_visible()
    page.get_by_role("button", name="Sign out").click()
    dialog.get_by_label("Forget the list").check()
    dialog.get_by_role("button", name="Sign out").click()
    for each in (page, other):
        expect(each.get_by_role("dialog", name="Sign in")).to_be_visible()
        expect(each.locator(".answer")).to_have_count(0)
        expect(titles(each)).to_have_count(0)
    assert KEY not in page.evaluate("JSON.stringify([localStorage, sessionStorage])")


def test_a_key_is_changed_for_another(browse, keyed):
    page = browse(keyed.url)
    sign_in(page, OTHER_KEY)
    expect(page.get_by_role("button", name="Sign out")).to_be_visible()
    page.get_by_role("button", name="Sign out or change key").click()
    page.get_by_role("dialog").get_by_role("button", name="Sign out").click()
    sign_in(page, KEY)
    complete(page, fake("What is S3?", answer=S3))
    assert len(history(keyed, session(page), Authorization=f"Bearer {KEY}")) == 2


def test_who_does_not_sign_in_is_told_so_and_may_try_again(browse, keyed):
    page = browse(keyed.url)
    page.get_by_label("Your key").press("Escape")
    expect(page.get_by_role("status")).to_have_text("Please sign in first.")
    answer = ask(page, fake("What is S3?", answer=S3))
    page.get_by_label("Your key").press("Escape")
    expect(answer).to_have_class("answer failed")
    expect(answer).to_contain_text("Please sign in first.")
    answer.get_by_role("button", name="Ask again").click()
    sign_in(page, KEY)
    expect(answer).to_have_class("answer complete")


def test_too_many_questions_are_counted_down_and_then_asked(browse, start_service):
    service = start_service(RATE_PER_MINUTE="20", API_KEYS=f"limited:{KEY}")
    page = browse(service.url)
    sign_in(page, KEY)
    expect(page.get_by_role("dialog")).to_be_hidden()
    while post(service, fake("What is S3?", answer="Amazon S3."), key=KEY) != 429:
        pass
    answer = ask(page, fake("What is S3?", answer="Amazon S3 keeps objects."))
    expect(answer.locator(".note")).to_contain_text(re.compile(r"Too many .* Trying again in [1-3] s\."))
    expect(answer).to_have_class("answer complete")


# ---- Conversations ----


def test_sessions_are_named_by_their_first_question_and_survive_a_reload(page, service):
    complete(page, fake("What is S3?", answer="Amazon S3 keeps objects."))
    complete(page, fake("And its cost?", answer="Amazon S3 costs little."))
    page.get_by_role("link", name="New conversation").click()
    expect(page.get_by_role("heading", name="What would you like to know")).to_be_visible()
    complete(page, fake("What is EC2?", answer="Amazon EC2 rents machines."))
    page.reload()
    expect(titles(page)).to_have_text([re.compile("What is EC2"), re.compile("What is S3")])
    expect(page.locator(".prose")).to_have_text("Amazon EC2 rents machines.")
    titles(page).nth(1).click()
    expect(page.locator(".prose")).to_have_text(["Amazon S3 keeps objects.", "Amazon S3 costs little."])
    expect(titles(page).nth(1)).to_have_attribute("aria-current", "page")
    expect(page).to_have_title(re.compile("What is S3.* · awschat"))


def test_erasing_asks_first(page, service):
    complete(page, fake("What is S3?", answer=S3))
    erased = session(page)
    dialog = page.get_by_role("dialog", name="Erase this conversation?")
    manage(page, "Erase: What is S3?")
    expect(dialog).to_contain_text("What is S3?")
    page.keyboard.press("Escape")
    expect(page.locator("article")).to_have_count(2)
    manage(page, "Erase: What is S3?")
    dialog.get_by_role("button", name="Erase").click()
    expect(titles(page)).to_have_count(0)
    expect(page.locator("article")).to_have_count(0)
    expect(page.get_by_role("heading", name="What would you like to know")).to_be_visible()
    assert history(service, erased) == []


def test_earlier_messages_come_page_by_page(page, service):
    complete(page, fake("Question 0 on S3", answer="Amazon S3 answer 0."))
    for number in range(1, 30):
        assert (
            post(service, fake(f"Q {number} on S3", answer=f"Amazon S3 answer {number}."), session(page))
            == 200
        )
    page.reload()
    expect(page.locator(".prose").last).to_have_text("Amazon S3 answer 29.")
    expect(page.locator("article")).to_have_count(50)
    expect(page.locator("article").last).to_be_in_viewport()
    page.get_by_role("button", name="Show earlier messages").click()
    expect(page.locator("article")).to_have_count(60)
    expect(page.get_by_role("button", name="Show earlier messages")).to_be_hidden()
    shown = "\n".join(page.locator(".prose").all_inner_texts())
    assert re.findall(r"answer (\d+)\.$", shown, re.M) == [str(number) for number in range(30)]


def test_each_conversation_has_an_address_for_back_and_forward(page):
    complete(page, fake("What is S3?", answer="Amazon S3 keeps objects."))
    assert page.url.endswith(f"#{session(page)}")
    page.get_by_role("link", name="New conversation").click()
    complete(page, fake("What is EC2?", answer="Amazon EC2 rents machines."))
    page.go_back()
    expect(page.locator(".prose")).to_have_text("Amazon S3 keeps objects.")
    page.go_forward()
    expect(page.locator(".prose")).to_have_text("Amazon EC2 rents machines.")


def test_an_address_opens_its_conversation_elsewhere(browse, service):
    odd = f"team chat/{uuid.uuid4()} & größer + 100%"
    assert post(service, fake("What is S3?", answer=S3), odd) == 200
    page = browse(service.url)
    page.evaluate("(id) => { location.hash = encodeURIComponent(id); }", odd)
    expect(page.locator(".prose")).to_have_text(S3.strip())
    expect(titles(page)).to_have_text(re.compile("What is S3"))
    complete(page, fake("And EC2?", answer="Amazon EC2."))
    assert len(history(service, odd)) == 4


def test_an_address_that_leads_nowhere_says_so(page, service):
    page.goto(f"{service.url}/#nobody-has-asked-here")
    expect(page.get_by_role("status")).to_contain_text("This conversation does not exist")
    expect(titles(page)).to_have_count(0)


def test_a_conversation_is_renamed(page):
    complete(page, fake("What is S3?", answer=S3))
    manage(page, "Rename: What is S3?")
    expect(page.get_by_label("Title", exact=True)).to_have_value(re.compile("^What is S3"))
    page.get_by_label("Title", exact=True).fill("Our buckets")
    page.keyboard.press("Enter")
    expect(titles(page)).to_have_text("Our buckets")
    page.reload()
    expect(titles(page)).to_have_text("Our buckets")
    expect(page).to_have_title("Our buckets · awschat")


def test_the_list_is_sorted_by_date_and_searched(page):
    page.evaluate("""() => {
        const days = { "Old buckets": 400, Queues: 3, "Buckets today": 0, "Yesterday's VPC": 1, Roles: 20 };
        const morning = new Date().setHours(2, 0, 0, 0);
        save(Object.keys(days).map((id) => ({ id, title: id, at: morning - days[id] * 86_400_000 })));
    }""")
    expect(page.locator("#sessions h2")).to_have_text(
        ["Today", "Yesterday", "Last 7 days", "Last 30 days", "Older"]
    )
    expect(titles(page)).to_have_text(["Buckets today", "Yesterday's VPC", "Queues", "Roles", "Old buckets"])
    page.get_by_label("Search titles").fill("BUCKET")
    expect(titles(page)).to_have_text(["Buckets today", "Old buckets"])


def test_the_list_of_version_1_is_taken_over(page):
    page.evaluate("""localStorage.awschatSessions = JSON.stringify([{ id: "one", title: "Of version 1" }])""")
    page.reload()
    expect(page.locator("#sessions h2")).to_have_text(["Older"])
    expect(titles(page)).to_have_text(["Of version 1"])


def test_several_tabs_agree(page):
    complete(page, fake("What is S3?", answer="Amazon S3 keeps objects."))
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.locator(".prose")).to_have_text("Amazon S3 keeps objects.")
    complete(other, fake("And EC2?", answer="Amazon EC2 rents machines."))
    expect(page.locator(".prose")).to_have_text(["Amazon S3 keeps objects.", "Amazon EC2 rents machines."])
    begun(ask(page, fake("And its cost?", **LONG)))
    begun(other.locator(".answer").nth(2))
    answer = ask(other, fake("And RDS?", answer="Amazon RDS runs databases."))
    expect(answer).to_have_class("answer complete")
    expect(page.locator(".prose").last).to_have_text("Amazon RDS runs databases.")
    page.bring_to_front()  # a tab in the background draws nothing for seconds, and Playwright waits for that
    manage(page, "Erase: What is S3?")
    page.get_by_role("dialog").get_by_role("button", name="Erase").click()
    for each in (page, other):
        expect(titles(each)).to_have_count(0)
        expect(each.locator("article")).to_have_count(0)


# ---- Asking ----


def test_a_long_text_is_counted_and_neither_cut_nor_sent(page):
    text = "S3 🪣 " * 730
    box(page).fill(text)
    expect(page.locator("#count")).to_have_text(f"{len(text.strip())} of 4000")
    text = "S3 🪣 " * 900
    box(page).fill(text)
    expect(page.locator("#count")).to_have_text(f"{len(text.strip())} of 4000")
    box(page).press("Enter")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("article")).to_have_count(0)
    assert page.evaluate("$('question').validationMessage") == "Too long by 499 characters."
    expect(box(page)).to_have_value(text)
    box(page).fill("S3 " * 100)
    expect(page.locator("#count")).to_be_empty()


def test_drafts_survive_a_reload_each_in_its_conversation(page):
    box(page).fill("a draft for a new conversation")
    page.reload()
    expect(box(page)).to_have_value("a draft for a new conversation")
    complete(page, fake("What is S3?", answer=S3))
    page.reload()
    expect(box(page)).to_have_value("")
    box(page).fill("and another")
    page.get_by_role("link", name="New conversation").click()
    expect(box(page)).to_have_value("")
    titles(page).click()
    expect(box(page)).to_have_value("and another")


def test_an_example_is_asked_and_the_box_is_ready_for_more(page):
    example = page.locator("#examples button").first
    question = example.inner_text()
    example.click()
    expect(page.locator(".question p")).to_have_text(question)
    expect(box(page)).to_be_focused()
    expect(page.locator(".answer")).to_have_class("answer complete")


def test_arrow_up_edits_the_last_question_but_only_in_an_empty_box(page):
    complete(page, fake("What is S3?", answer=S3))
    box(page).fill("one\ntwo")
    box(page).press("ArrowUp")
    expect(box(page)).to_have_value("one\ntwo")
    box(page).fill("")
    box(page).press("ArrowUp")
    expect(box(page)).to_have_value(re.compile("^What is S3"))


def test_a_key_that_ends_a_composition_does_not_send(page):
    box(page).fill("バケット")
    box(page).dispatch_event("keydown", {"key": "Enter", "isComposing": True, "bubbles": True})
    expect(page.locator("article")).to_have_count(0)


# ---- Nothing runs that should not ----

NASTY = [
    "<script>pwned = 1</script>",
    "<img src=x onerror='pwned = 1'>",
    "<svg onload='pwned = 1'></svg><iframe srcdoc='<script>top.pwned = 1</script>'></iframe>",
    "[a](javascript:pwned=1) [a](JaVaScRiPt:pwned=1) [a](data:text/html,<script>pwned=1</script>)",
    "[a]( javascript:pwned=1) [a](\tjavascript:pwned=1) [a](&#106;avascript:pwned=1) <javascript:pwned=1>",
    "![a](javascript:pwned=1) ![a](https://example.com/x.png) **<img src=x onerror=pwned=1>**",
    "| <img src=x onerror=pwned=1> | b |\n|---|---|\n| [a](javascript:pwned=1) | <script>pwned=1</script> |",
    "```html\n<script>pwned = 1</script>\n```\n> <img src=x onerror=pwned=1>\n\n1. <b onclick=pwned=1>x</b>",
    '[a](https://example.com/"onmouseover="pwned=1) https://example.com/"onclick="pwned=1',
    "# <style>*{display:none}</style>\n`<script>pwned=1</script>` <a href=javascript:pwned=1>a</a>",
    "- [x] <img src=x onerror=pwned=1> ~~<b onclick=pwned=1>~~ \\<script>pwned=1</script>",
    "```\" onload=pwned=1 x=\"\nlet a = '<img src=x onerror=pwned=1>'; // <script>\n```",
]
RAW = "#log .prose *, #log .question p *, #sessions a *, #title *, #erased *"  # made of somebody's text


def assert_harmless(page):
    """Nothing on the page came from a text as markup."""
    for link in page.locator("#log a").all():
        assert link.get_attribute("href").startswith("https://example.com/")
        assert link.get_attribute("rel") == "noopener"
        assert link.evaluate("(a) => a.getAttributeNames().sort().join()") == "href,rel,target"
    names = page.evaluate(f"""[...document.querySelectorAll(`{RAW}`)]
        .filter((node) => !node.closest("button"))
        .flatMap((node) => [node.localName, ...node.getAttributeNames()])""")
    assert not [
        name for name in names if re.fullmatch(r"on\w+|src\w*|style|script|img|svg|iframe|object|b", name)
    ]
    assert page.evaluate("typeof pwned") == "undefined"


@pytest.mark.parametrize("nasty", NASTY)
def test_markup_in_a_question_or_an_answer_never_runs(page, nasty):
    question = fake(f"What is S3? {nasty}", answer=f"Amazon S3 and AWS Lambda.\n\n{nasty}\n\nAmazon S3.")
    complete(page, question)
    for _ in range(2):  # as it was streamed, and as it is read back
        expect(page.locator(".question")).to_contain_text("What is S3? " + nasty.split("\n")[0].strip()[:10])
        assert_harmless(page)
        page.reload()
        expect(page.locator(".answer")).to_have_class("answer complete")


@pytest.mark.parametrize("nasty", NASTY[:4])
def test_markup_in_a_title_never_runs(page, nasty):
    complete(page, fake("What is S3?", answer=S3))
    manage(page, "Rename")
    page.get_by_label("Title", exact=True).fill(nasty)
    page.keyboard.press("Enter")
    expect(titles(page)).to_have_text(nasty)
    manage(page, "Erase")
    expect(page.locator("#erased")).to_have_text(nasty)
    assert_harmless(page)


@pytest.mark.parametrize(
    "nasty", [*NASTY[:3], "javascript:pwned=1", "%", "%E0%A4%A", "a&id=b", "%00", "x" * 200, "scroll"]
)
def test_markup_in_an_address_never_runs(page, service, nasty):
    page.goto(f"{service.url}/#{nasty}")
    page.reload()
    expect(page.get_by_role("status")).not_to_be_empty()
    expect(titles(page)).to_have_count(0)
    assert_harmless(page)
    page.get_by_role("link", name="New conversation").click()
    complete(page, fake("What is S3?", answer=S3))


def test_the_page_is_three_files_with_a_strict_policy(page, service):
    answer = service.get("/")
    directives = (part.split(maxsplit=1) for part in answer.headers["Content-Security-Policy"].split(";"))
    assert dict(directives) == POLICY
    page.wait_for_load_state("networkidle")
    loaded = "performance.getEntriesByType('resource').map((entry) => new URL(entry.name).pathname)"
    assert set(page.evaluate(loaded)) == {"/ready", "/chat", "/web/chat.css", "/web/chat.js"}
    html, script, style = ((WEB / name).read_text() for name in ("index.html", "chat.js", "chat.css"))
    assert not re.search(r"<script>|<style|\son\w+=|\sstyle=|(?:src|href)=\"?(?:https?:)?//", html)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", script)
    assert not re.search(r"@import|url\(", style)
    assert script.count("\n") < 450


def test_another_subject_needs_no_edit_of_the_script():
    lines = (re.sub(r"(^|\s)//.*", "", line) for line in (WEB / "chat.js").read_text().splitlines())
    assert not [line for line in lines if re.search("aws(?!chat)|amazon", line, re.I)]


# ---- Markdown and the stream reader, as functions ----

MARKDOWN = [
    ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
    (
        "# A\n## B #1\n###### C",
        '<h3 class="level1">A</h3><h3 class="level2">B #1</h3><h6 class="level6">C</h6>',
    ),
    ("#hashtag", "<p>#hashtag</p>"),
    (
        "**bold** and *it* and ***both***",
        "<p><strong>bold</strong> and <em>it</em> and <strong><em>both</em></strong></p>",
    ),
    (
        "s3:Get* and s3:Put*, 2 * 3 * 4, AWS_ACCESS_KEY_ID",
        "<p>s3:Get* and s3:Put*, 2 * 3 * 4, AWS_ACCESS_KEY_ID</p>",
    ),
    (
        "**`aws s3`** and ``a`b`` `**no**`",
        "<p><strong><code>aws s3</code></strong> and <code>a`b</code> <code>**no**</code></p>",
    ),
    (
        "- a\n- b\n  - c\n  - d\n- e",
        "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li><li><p>d</p></li></ul></li>"
        "<li><p>e</p></li></ul>",
    ),
    ("* a\n\n* b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
    ("3. c\n4. d", '<ol start="3"><li><p>c</p></li><li><p>d</p></li></ol>'),
    (
        "1. a\n- x\n2. b",
        '<ol start="1"><li><p>a</p></li></ol><ul><li><p>x</p></li></ul><ol start="2"><li><p>b</p></li></ol>',
    ),
    (
        "Steps:\n1. a\n2. b\n\nafter",
        '<p>Steps:</p><ol start="1"><li><p>a</p></li><li><p>b</p></li></ol><p>after</p>',
    ),
    ("since\n1986. No list", "<p>since\n1986. No list</p>"),
    ("> a\n> b\n\nc", "<blockquote><p>a\nb</p></blockquote><p>c</p>"),
    ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    (
        "A:\n| x | y |\n|:--|--:|\n| 1 | `a\\|b` |\n| **2** | |",
        '<p>A:</p><div class="table" tabindex="0"><table>'
        '<tr><th class="left">x</th><th class="right">y</th></tr>'
        '<tr><td class="left">1</td><td class="right"><code>a|b</code></td></tr>'
        '<tr><td class="left"><strong>2</strong></td><td class="right"></td></tr></table></div>',
    ),
    (
        "x|y\n:-:|---\na<br>b|c|d",
        '<div class="table" tabindex="0"><table><tr><th class="center">x</th><th class="left">y</th></tr>'
        '<tr><td class="center">a<br>b</td><td class="left">c</td><td class="left">d</td></tr></table></div>',
    ),
    (
        "~~old~~ _new_ and snake_case_name __init__",
        "<p><del>old</del> <em>new</em> and snake_case_name __init__</p>",
    ),
    ("\\*no\\* 1\\.  \nbreak", "<p>*no* 1\\.<br>break</p>"),
    (
        "- [x] a\n- [ ] b\n  - c",
        '<ul><li class="task"><p>☑ a</p></li><li class="task"><p>☐ b</p><ul><li><p>c</p></li></ul></li></ul>',
    ),
    (
        "1. a\n   - b\n     1. c\n2. d",
        '<ol start="1"><li><p>a</p><ul><li><p>b</p><ol start="1"><li><p>c</p></li></ol></li></ul></li>'
        "<li><p>d</p></li></ol>",
    ),
    ("a | b", "<p>a | b</p>"),
    (
        "[docs](https://aws.amazon.com/s3/) https://a.b/c_(d). [x](ftp://a) ![i](https://a.b/i)",
        '<p><a href="https://aws.amazon.com/s3/" target="_blank" rel="noopener">docs</a> '
        '<a href="https://a.b/c_(d" target="_blank" rel="noopener">https://a.b/c_(d</a>). [x](ftp://a) '
        '<a href="https://a.b/i" target="_blank" rel="noopener">i</a></p>',
    ),
    (
        "[https://a.b](https://a.b)",
        '<p><a href="https://a.b" target="_blank" rel="noopener">https://a.b</a></p>',
    ),
    ("a\r\n\r\nb\u2028c", "<p>a</p><p>b\nc</p>"),
    ("", ""),
    ("\n \n", ""),
]
CODE = [
    ("```py\nx = 1\n\n\ty\n```\nafter", "py", "x = 1\n\n\ty"),
    ("~~~\na\n~~~", "text", "a"),
    ("1. do\n   ```sh\n   ls\n     -l\n   ```\n2. then", "sh", "ls\n  -l"),
    ("````md\n```\nx\n```\n````", "md", "```\nx\n```"),
    ("```js\nstill open", "js", "still open"),
]


def rendered(page, text):
    return page.evaluate("(text) => render(el('div'), text).getHTML()", text)


@pytest.mark.parametrize(("text", "html"), MARKDOWN)
def test_markdown_becomes_elements(static_page, text, html):
    assert rendered(static_page, text) == html


@pytest.mark.parametrize(("text", "language", "code"), CODE)
def test_code_stays_as_it_is(static_page, text, language, code):
    read = """(text) => {
        const node = render(el("div"), text);
        return [node.querySelector("figcaption").firstChild.data, node.querySelector("code").textContent];
    }"""
    assert static_page.evaluate(read, text) == [language, code]


COLOURED = [
    ("json", '{"a": "b", "n": 12, "t": true}', ["name", "string", "name", "number", "name", "word"]),
    ("bash", "# all\naws s3 ls --recursive 'x y'", ["comment", "string"]),
    ("python", 'def f(a):  # why\n    return """x\ny"""', ["word", "comment", "word", "string"]),
    ("yaml", "Type: AWS::S3::Bucket\n- Key: 'x' # y", ["name", "name", "string", "comment"]),
    ("ts", "const url = 'https://a.b'; // c", ["word", "string", "comment"]),
    ("text", "for if 12 'x'", []),
]


@pytest.mark.parametrize(("language", "code", "kinds"), COLOURED)
def test_code_gets_quiet_colours(static_page, language, code, kinds):
    read = (
        "(text) => [...render(el('div'), text).querySelectorAll('code span')].map((span) => span.className)"
    )
    assert static_page.evaluate(read, f"```{language}\n{code}\n```") == kinds


def test_markdown_that_grows_ends_as_if_shown_at_once(static_page):
    text = "\n\n".join(text for text, *_ in MARKDOWN + CODE)
    grow = """(text) => {
        const node = el("div");
        for (let end = 0; end <= text.length; end++) render(node, text.slice(0, end));
        return node.getHTML();
    }"""
    assert static_page.evaluate(grow, text) == rendered(static_page, text)


def test_streaming_rebuilds_only_the_last_block(static_page):
    grow = """() => {
        const node = render(el("div"), "one\\n\\n- a\\n- b\\n\\nthr");
        const before = [...node.children];
        render(node, "one\\n\\n- a\\n- b\\n\\nthree");
        return before.map((old, i) => old === node.children[i]);
    }"""
    assert static_page.evaluate(grow) == [True, True, False]


MISCHIEF = ["> " * 5000, "- " * 5000, "*a **b " * 3000, "[" * 20_000, "`" * 20_000, "|-" * 8000, "((" * 9000]
MISCHIEF += [
    "~~a " * 5000,
    "_a " * 5000,
    "\\" * 20_000,
    "- [x] " * 3000,
    "  " * 9000 + "<br",
    "```js\n" + '"' * 9999,
]
MISCHIEF += [
    "```js\n" + "/*" * 9999,
    "```js\n" + "a-" * 9999,
    "```py\n" + '"""' * 5001,
    "```x\n" + "<!--" * 5000,
]


@pytest.mark.parametrize("text", MISCHIEF, ids=lambda text: repr(text[:12]))
def test_mischief_in_markdown_does_not_hang_the_page(static_page, text):
    clock = """(text) => {
        const start = performance.now();
        render(el("div"), text);
        return performance.now() - start;
    }"""
    assert static_page.evaluate(clock, text) < 3000  # milliseconds


EVENTS = [
    {"type": "token", "content": "für 🚀 "},
    {"type": "token", "content": "data: {}\n\n: ping"},
    {"type": "end", "content": "für 🚀 data: {}\n\n: ping", "status": "complete", "more": 1},
]
READ = """async ([chunks, silence]) => {
    const seen = [];
    const body = new ReadableStream({ start(stream) {
        for (const chunk of chunks) stream.enqueue(Uint8Array.from(chunk));
        if (!silence) stream.close();
    } });
    try {
        const late = new Promise((_, reject) => setTimeout(() => reject(new Error("it still waits")), 5000));
        const reading = readEvents(new Response(body), (event) => seen.push(event), silence ?? undefined);
        seen.push(["closed by", await Promise.race([reading, late])]);
    } catch (error) {
        seen.push(error.message);
    }
    return seen;
}"""


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_the_stream_reader_does_not_care_where_chunks_are_cut(static_page, size):
    raw = [f"data: {json.dumps(event, ensure_ascii=size % 2)}\n\n".encode() for event in EVENTS]
    raw = b": ping\n" + raw[0] + b": ping\n: ping\n" + raw[1] + raw[2]
    chunks = [list(raw[at : at + size]) for at in range(0, len(raw), size)]
    assert static_page.evaluate(READ, [chunks, None]) == [*EVENTS, ["closed by", EVENTS[-1]]]


@pytest.mark.parametrize("silence", [None, 50])
def test_the_stream_reader_reports_a_line_that_closed_or_died(static_page, silence):
    raw = list(f"data: {json.dumps(EVENTS[0])}\n\ndata: ".encode())
    lost = "The connection closed before the answer ended."
    assert static_page.evaluate(READ, [[raw], silence]) == [EVENTS[0], lost]


def test_the_stream_reader_works_in_another_page(browser, static_page):
    source = static_page.evaluate("readEvents.toString()")
    elsewhere = browser.new_page()
    elsewhere.evaluate("(source) => { globalThis.readEvents = eval(`(${source})`); }", source)
    chunks = [list(f"data: {json.dumps(event)}\n\n".encode()) for event in EVENTS]
    assert elsewhere.evaluate(READ, [chunks, None]) == [*EVENTS, ["closed by", EVENTS[-1]]]
    elsewhere.close()


# ---- For everybody ----

ANSWER = """Use a **gateway endpoint** for S3 and let the bucket policy deny every other way in.

1. Create the endpoint. It costs nothing and needs no NAT gateway.
2. Deny all requests to the S3 bucket that do not come through it:

```json
{
  "Effect": "Deny", "Principal": "*", "Action": "s3:GetObject",
  "Resource": "arn:aws:s3:::reports/*",
  "Condition": {"StringNotEquals": {"aws:SourceVpce": "vpce-1a2b3c"}}
}
```

| Way in | Price | Reaches |
|:--|--:|:--|
| Gateway endpoint | free | S3 and DynamoDB in the Region |
| Interface endpoint | $0.01 per hour | S3 from on-premises, too |
"""
CODES = """### Count the objects of an S3 bucket

```python
import boto3

def count(bucket: str) -> int:
    \"\"\"The number of objects; a page holds 1000 of them.\"\"\"
    paginator = boto3.client("s3").get_paginator("list_objects_v2")
    pages = paginator.paginate(Bucket=bucket)
    return sum(page["KeyCount"] for page in pages)  # no object is read
```

The same from a shell, for one prefix:

```bash
aws s3 ls s3://reports/2026/ --recursive --summarize | tail -2
```

| Way | Requests to S3 | Fits |
|:--|--:|:-:|
| `list_objects_v2` | 1 per 1,000 objects | ~~millions~~ some 100,000 |
| S3 Inventory | none | billions |

- [x] Give the role `s3:ListBucket`
- [ ] Turn on S3 Inventory for large buckets
"""


def serious(page):
    """What axe finds serious or critical, as 'rule: where'."""
    page.evaluate(AXE_FILE_PATH.read_text())
    results = page.evaluate("axe.run()")
    return [
        f"{found['id']}: {node['target']}"
        for found in results["violations"]
        if found["impact"] in ("serious", "critical")
        for node in found["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browse, keyed, scheme):
    page = browse(keyed.url, color_scheme=scheme, reduced_motion="reduce")
    assert serious(page) == []  # the sign-in
    sign_in(page, "a-wrong-key")
    expect(page.get_by_role("alert")).to_be_visible()
    assert serious(page) == []
    sign_in(page, KEY)
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert serious(page) == []  # the welcome
    complete(page, fake("What is S3?", answer=CODES + ANSWER))
    expect(ask(page, fake("How do I bake bread?", judge="BLOCK"))).to_have_class("answer refused")
    expect(ask(page, fake("What is S3?", answer=S3, fault="length"))).to_have_class("answer truncated")
    expect(ask(page, fake("What is EC2?", fault="http500"))).to_have_class("answer failed")
    assert serious(page) == []
    box(page).fill("S3 " * 1400)
    begun(ask(page.context.pages[0], fake("What is S3?", **LONG)))
    assert serious(page) == []
    page.keyboard.press("Escape")
    opens = [lambda: manage(page, "Rename"), lambda: manage(page, "Erase"), page.locator("#account").click]
    for click in opens:
        click()
        expect(page.get_by_role("dialog")).to_be_visible()
        assert serious(page) == []
        page.keyboard.press("Escape")


def test_the_keyboard_is_enough(page):
    expect(box(page)).to_be_focused()
    page.keyboard.type("What is S3?")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type(fake("", **LONG))
    page.keyboard.press("Enter")
    expect(page.locator(".question")).to_contain_text("What is S3?\n")
    begun(page.locator(".answer"))
    page.keyboard.press("Escape")
    expect(page.locator(".answer")).to_have_class("answer stopped")
    reached = set()
    for _ in range(14):
        page.keyboard.press("Tab")
        name, outline = page.evaluate("""() => {
            const here = document.activeElement, ring = here.closest("#form") ?? here;
            return [here.ariaLabel || here.textContent,
                here === document.body || getComputedStyle(ring).outlineStyle];
        }""")
        assert outline != "none", name
        reached.add(name.split(":")[0].strip())
    assert {"Ask again", "Send", "New conversation", "Your question", "Rename", "Erase", "Edit"} <= reached
    page.get_by_role("link", name="New conversation").focus()
    page.keyboard.press("Enter")
    expect(page.locator("article")).to_have_count(0)
    expect(box(page)).to_be_focused()
    titles(page).focus()
    page.keyboard.press("Enter")
    expect(page.locator("article")).to_have_count(2)


def test_a_screen_reader_finds_its_way(page):
    complete(page, fake("What is S3?", answer="# Amazon S3\n\nIt keeps objects."))
    names = [name.strip() for name in page.get_by_role("heading").all_inner_texts()]
    assert names == ["awschat", "Today", "You asked", "Answer", "Amazon S3"]
    expect(page.get_by_role("log", name="Conversation")).to_be_visible()
    expect(page.get_by_role("navigation", name="Conversations")).to_be_visible()
    expect(page.get_by_role("main")).to_be_visible()


def test_a_screen_reader_hears_an_answer_once_and_whole(page):
    page.evaluate("""() => {
        globalThis.heard = [];
        const said = (records) => records.map(({ target }) => target.textContent).filter(Boolean);
        const note = (records) => heard.push(...said(records));
        for (const node of document.querySelectorAll("[aria-live=polite], [role=status]"))
            new MutationObserver(note).observe(node, { childList: true, characterData: true, subtree: true });
    }""")
    complete(page, fake("What is S3?", answer=S3 * 5, interval=0.01))
    until_true(page, "heard.length >= 3")
    until_true(page, "$('speech').textContent === ''")
    assert page.evaluate("heard") == ["Answering …", "Answered.", (S3 * 5).strip()]
    expect(page.locator("#log")).to_have_attribute("aria-live", "off")


def test_an_answer_and_its_code_are_copied(page):
    complete(page, fake("How do I list S3 buckets?", answer="Amazon **S3**:\n\n```bash\naws s3 ls\n```\n"))
    page.locator("figure").get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert clipboard(page) == "aws s3 ls"
    page.locator(".actions").get_by_role("button", name="Copy").click()
    assert clipboard(page) == "Amazon **S3**:\n\n```bash\naws s3 ls\n```\n"


def test_all_works_without_https(browse, service):
    page = browse(f"http://plain.test:{service.port}/")
    assert not page.evaluate("isSecureContext") and not page.evaluate("'randomUUID' in crypto")
    complete(page, fake("What is S3?", answer="Amazon **S3**."))
    assert len(session(page)) >= 32
    page.get_by_role("button", name="Copy").click()
    assert clipboard(page) == "Amazon **S3**."


def test_on_a_phone_the_list_opens_from_a_button(browse, service):
    page = browse(service.url, viewport={"width": 390, "height": 780}, has_touch=True, is_mobile=True)
    complete(page, fake("What is S3?", answer=S3))
    expect(titles(page)).to_be_hidden()
    menu = page.get_by_role("button", name="Conversations")
    menu.tap()
    expect(titles(page)).to_be_visible()
    assert serious(page) == []
    page.keyboard.press("Escape")
    expect(titles(page)).to_be_hidden()
    menu.tap()
    page.locator("nav").get_by_role("link", name="New conversation").tap()
    expect(titles(page)).to_be_hidden()
    expect(page.locator("article")).to_have_count(0)
    expect(box(page)).not_to_be_focused()  # else it would open the keyboard
    menu.tap()
    titles(page).tap()
    expect(titles(page)).to_be_hidden()
    expect(page.locator(".prose")).to_have_text(S3.strip())
    menu.tap()
    titles(page).tap()  # the one that is on screen
    expect(titles(page)).to_be_hidden()


def test_320_pixels_are_enough(browse, service):
    page = browse(service.url, viewport={"width": 320, "height": 568}, has_touch=True, is_mobile=True)
    fits = "document.documentElement.scrollWidth <= 320 && $('scroll').scrollWidth <= $('scroll').clientWidth"
    assert page.evaluate(fits)
    expect(page.get_by_role("heading", name="What would you like to know")).to_be_in_viewport()
    complete(page, fake("What is S3? " + "long" * 50, answer=CODES + ANSWER + "S3" * 200))
    assert page.evaluate(fits)
    page.get_by_role("button", name="Conversations").tap()
    page.get_by_role("button", name="Erase").tap()
    dialog = page.get_by_role("dialog").bounding_box()
    assert dialog["x"] >= 0 and dialog["x"] + dialog["width"] <= 320


def test_who_wants_no_motion_gets_none(browse, service):
    page = browse(service.url, reduced_motion="reduce")
    begun(ask(page, fake("What is S3?", **LONG)))
    assert page.evaluate("document.getAnimations().length") == 0


def test_the_demo_says_so(page):
    ready = {"status": "ready", "version": "2.0.0", "demo": True, "missing": []}
    page.route("**/ready", lambda route: route.fulfill(json=ready))
    page.reload()
    expect(page.locator("#demo")).to_be_visible()
    expect(page.locator("#demo")).to_contain_text("OPENAI_API_KEY")


def test_without_a_demo_nothing_is_said(page):
    complete(page, fake("What is S3?", answer="Amazon S3."))
    expect(page.locator("#demo")).to_be_hidden()


LOOKS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1200, "height": 780}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1200, "height": 780}},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 780}, "has_touch": True},
}


def take_picture(page, name):
    """Keep what is to be seen for the README, if one wants to."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if os.environ.get("SCREENSHOTS"):
        picture = HERE / "docs" / f"{name}.png"
        page.mouse.move(600, 600)
        page.screenshot(path=picture, animations="disabled")
        assert picture.stat().st_size < 150_000


@pytest.mark.parametrize("look", LOOKS)
def test_it_looks_right(browse, service, look):
    page = browse(service.url, **LOOKS[look])
    for question, answer in {
        "What makes a DynamoDB table expensive?": "Amazon DynamoDB.",
        "When should I use Fargate instead of Lambda?": "AWS Fargate.",
        "How do I let only one VPC read my S3 bucket?": ANSWER,
    }.items():
        page.evaluate("location.hash = ''")
        expect(page.locator("article")).to_have_count(0)
        complete(page, fake(question, answer=answer))
        # The directive is nothing to look at.
        page.evaluate("(title) => update(view.id, { title })", question)
        page.evaluate("(title) => { document.querySelector('.asked').textContent = title; }", question)
    background = "rgb(20, 23, 27)" if look == "dark" else "rgb(252, 251, 249)"
    expect(page.locator("body")).to_have_css("background-color", background)
    page.locator("#scroll").evaluate("(node) => { node.scrollTop = 0; }")
    take_picture(page, look)


def test_code_and_a_table_of_the_demo_look_right(browse, start_service):
    demo = start_service("demo.py", OPENAI_BASE_URL="")
    page = browse(demo.url, viewport={"width": 1200, "height": 1010})
    expect(page.locator("#demo")).to_contain_text("OPENAI_API_KEY")
    complete(page, "What is the difference between Lambda and Fargate?")
    complete(page, "Show me Lambda in Python")
    expect(page.locator("td").first).to_be_in_viewport()
    expect(page.locator("pre code .word").first).to_have_text("import")
    take_picture(page, "code")
