"""The playground page in headless Chromium, against a real server."""

import io

import pytest
import test_server
from browser import Page, open_page
from PIL import Image
from test_server import BIN, CURVE, MODEL, Server

from prunepath_vllm.sources.packages import SourceError

serve = test_server.serve
QUESTION = "What is skipped?"
IDLE = "document.querySelector('#send').textContent === 'Ask'"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844, "phone": True}


@pytest.fixture(scope="module")
def server(serve, prunepath_checkpoint) -> Server:
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6, tau_curve=CURVE)
    return serve(checkpoint, command=(str(BIN / "prunepath"), "serve"))


@pytest.fixture(scope="module")
def browser():
    with open_page() as page:
        yield page


@pytest.fixture
def page(request, server):
    """A browser's page; a machine without npm, or without a way to it, has none."""
    try:
        page = request.getfixturevalue("browser")
    except SourceError as error:
        if "sha256" in str(error):
            raise
        pytest.skip(str(error))
    page.problems.clear()
    yield page
    assert page.problems == []


def start(page: Page, server: Server, **size) -> None:
    page.open(f"{server.url}/prunepath", **size)
    page.wait("document.querySelectorAll('input[type=range]').length === 2")
    page.evaluate("document.querySelector('#tokens').value = 12")


def ask(page: Page, question: str = QUESTION) -> None:
    page.press("#question")
    page.type(question)
    page.press("#send")
    page.wait(f"document.querySelectorAll('.answer').length && {IDLE}")


def texts(page: Page, selector: str) -> list[str]:
    return page.evaluate(f"[...document.querySelectorAll('{selector}')].map(one => one.textContent)")


def set_second_tau(page, tau: float) -> None:
    """Move the slider of the second answer."""
    move = f"at => {{ at.value = {tau}; at.dispatchEvent(new Event('input')); }}"
    page.evaluate(f"({move})(document.querySelector('#tau-b'))")


def test_one_question_has_two_answers_at_two_taus(page, server):
    start(page, server, **DESKTOP)
    set_second_tau(page, 0.4)
    assert texts(page, ".knob label span") == ["tau", "1.00", "tau", "0.40"]
    assert texts(page, ".hint") == ["every expert runs", "about 77% of experts skipped"]
    ask(page)
    assert texts(page, ".answer h2") == ["tau 1.00", "tau 0.40"]
    for i, tau in enumerate((1.0, 0.4)):
        answer = server.client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=12,
            temperature=0,
            extra_body={"tau": tau, "prunepath_report": True},
        )
        assert texts(page, ".answer .text")[i] == answer.choices[0].message.content
        report = answer.model_extra["prunepath"]
        assert texts(page, ".answer .stats")[i].endswith(f"{report['ffn_sparsity']:.0%} of experts skipped")
        cells = f"[...document.querySelectorAll('.answer')[{i}].querySelectorAll('.heat span')]"
        active = [1 - sparsity for sparsity in report["ffn_sparsity_by_layer"]]
        assert page.evaluate(f"{cells}.map(cell => Number(cell.style.opacity))") == pytest.approx(active)
    rings = page.evaluate(
        "[...document.querySelectorAll('#curve circle[fill=none]')].map(one => one.getAttribute('cx'))"
    )
    assert len(rings) == 2
    ask(page, "And what is not?")  # a second turn
    assert len(texts(page, ".answer .stats")) == 4
    assert all("tokens" in said for said in texts(page, ".answer .stats"))
    page.press("summary")
    page.press("#clear")
    assert texts(page, ".answer") == []


def test_a_phone_shows_one_answer_below_the_other_and_nothing_sideways(page, server):
    start(page, server, **PHONE)
    ask(page)
    boxes = page.evaluate("[...document.querySelectorAll('.answer')].map(one => one.getBoundingClientRect().toJSON())")
    assert boxes[1]["top"] >= boxes[0]["bottom"]
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    send = page.evaluate("document.querySelector('#send').getBoundingClientRect().toJSON()")
    assert 0 <= send["top"] < send["bottom"] <= PHONE["height"]
    assert send["right"] <= PHONE["width"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_is_drawn(page, server, dark):
    start(page, server, **DESKTOP, dark=dark)
    image = Image.open(io.BytesIO(page.screenshot())).convert("L")
    assert image.size == (1280, 900)
    ground = image.getpixel((5, 5))
    assert ground < 60 if dark else ground > 200
    assert len(set(image.getdata())) > 50  # text, a curve, sliders


def test_a_refusal_is_shown_and_the_conversation_goes_on(page, server):
    start(page, server, **DESKTOP)
    page.evaluate("document.querySelector('#tokens').value = 100000")
    ask(page)
    said = texts(page, ".answer .stats.error")
    assert len(said) == 2
    assert all("256" in one for one in said)
    page.evaluate("document.querySelector('#tokens').value = 4")
    page.problems.clear()  # the browser logs every HTTP 400
    ask(page)
    assert all("tokens" in one for one in texts(page, ".answer .stats")[2:])


def test_an_answer_can_be_stopped(page, server):
    start(page, server, **DESKTOP)
    page.evaluate("document.querySelector('#tokens').value = 200")
    page.press("#question")
    page.type(QUESTION)
    page.evaluate("(form => { form.requestSubmit(); form.requestSubmit(); })(document.querySelector('#form'))")
    page.wait(f"document.querySelectorAll('.answer').length && {IDLE}")
    assert texts(page, ".answer .stats") == ["stopped", "stopped"]
