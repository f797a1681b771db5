"""scripts/fuzz.py finds what it is there to find: servers that are wrong in one way each. Real ones: test_hardening."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from fuzz import FASTAPI_REFUSAL, fuzz, judge, openai_error


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ("{}", set()),
        ('{"tau": 0.5}', set()),
        ('{"tau": 1}', set()),
        ('{"tau": null, "sparsity": 0}', set()),
        ('{"tau": "auto"}', set()),
        ('{"tau": {"min": 0.5, "max": 1.0}}', set()),
        ('{"tau": 0.5, "vllm_xargs": {"tau": 0.5}}', set()),
        ('{"tau": 7, "tau": 0.5}', set()),  # the last one counts, for Python's parser and so for the engine
        ('{"prunepath_report": false}', set()),
        ('{"tau": 1.06}', {"tau"}),
        ('{"tau": true}', {"tau"}),
        ('{"tau": "0.5"}', {"tau"}),
        ('{"tau": NaN}', {"tau"}),
        ('{"tau": 0.5, "tau": 7}', {"tau"}),
        ('{"tau": {"min": 0.9, "max": 0.5}}', {"tau"}),
        ('{"tau": {"min": 0.5}}', {"tau"}),
        ('{"sparsity": 1}', {"sparsity"}),
        ('{"sparsity": 0.5, "tau": 0.5}', {"tau", "sparsity"}),
        ('{"tau": 0.5, "vllm_xargs": {"tau": 0.6}}', {"tau"}),
        ('{"vllm_xargs": {"sparsity": -1}}', {"sparsity"}),
        ('{"prunepath_report": 1}', {"prunepath_report"}),
        ('{"vllm_xargs": 3}', None),
        ('{"vllm_xargs": {"tau": null}}', None),
        ("[]", None),
        ('{"tau": 0.5', None),
        ("[" * 10**5, None),
    ],
    # Sorted: a set's order differs between processes, and every worker must collect the same names.
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value)[:50],
)
def test_what_the_documentation_says_of_a_body(body, verdict):
    assert judge(body.encode()) == verdict


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ('{"error": {"message": "no", "type": "BadRequestError", "param": "tau", "code": 400}}', True),
        ('{"error": {"message": "no", "type": "BadRequestError", "param": null, "code": 400}}', True),
        ('{"error": {"message": "", "type": "BadRequestError", "param": null, "code": 400}}', False),
        ('{"error": {"message": "no", "type": "BadRequestError", "param": null, "code": 500}}', False),
        ('{"error": {"message": "no", "type": "BadRequestError", "code": 400}}', False),
        ('{"error": "no"}', False),
        ("[]", False),
        (FASTAPI_REFUSAL, False),
        ("Internal Server Error", False),
    ],
)
def test_what_an_openai_error_is(text, whole):
    assert (openai_error(text, 400) is not None) == whole


def refusal(field: str, status: int = 400) -> httpx.Response:
    error = {"message": f"{field} is wrong", "type": "BadRequestError", "param": field, "code": status}
    return httpx.Response(status, json={"error": error})


def right(request: httpx.Request) -> httpx.Response:
    """A server that does what the documentation says."""
    if request.url.path == "/v1/models":
        return httpx.Response(200, json={"data": [{"id": "tiny"}]})
    wrong = judge(request.content)
    if wrong is None:
        return refusal("body")
    return refusal(min(wrong)) if wrong else httpx.Response(200, json={"choices": [{"text": "fine"}]})


def run(server: Callable[[httpx.Request], httpx.Response], count: int = 40) -> list[str]:
    transport = httpx.MockTransport(server)
    summary = fuzz("http://test", count=count, bodies=0, threads=1, progress=False, transport=transport)
    assert summary.sent == count
    return [failure["reason"] for failure in summary.failures]


def test_a_right_server_passes():
    assert run(right, 120) == []


def instead(status: int, answer: Callable[[httpx.Request], httpx.Response]) -> Callable:
    """The right server, but for the answers of one status to what is not a probe."""

    def server(request: httpx.Request) -> httpx.Response:
        given = right(request)
        probe = request.url.path == "/v1/models" or b'"temperature"' in request.content
        return answer(request) if given.status_code == status and not probe else given

    return server


def breaks(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadError("closed", request=request)


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        (instead(400, lambda _: httpx.Response(200, json={})), "200, expected a 400 that names"),
        (instead(400, lambda _: httpx.Response(400, json={"detail": "no"})), "not an OpenAI error"),
        (instead(400, lambda _: refusal("model")), "expected a 400 that names"),
        (instead(400, lambda _: refusal("tau", 422)), "expected a 400 that names"),
        (instead(400, lambda request: refusal("x", 500) if b"tau" in request.content else right(request)), "HTTP 500"),
        (instead(400, breaks), "HTTP 0"),
        (instead(200, lambda _: refusal("tau")), "400 for a right request"),
        (
            instead(200, lambda _: httpx.Response(200, text='data: {"error": {"code": 500}}')),
            "an error inside a stream",
        ),
    ],
    ids=["accepts", "form", "other-field", "status", "crashes", "hangs-up", "refuses", "stream"],
)
def test_a_wrong_server_is_found(server, reason):
    assert any(found.startswith(reason) for found in run(server))


def test_a_server_that_has_gone_wrong_is_found():
    asked = []

    def server(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        drifted = len(asked) > 20 and b'"temperature"' in request.content
        return httpx.Response(200, json={"choices": [{"text": "other"}]}) if drifted else right(request)

    assert "greedy answers have changed" in run(server)


def test_an_error_of_the_engine_alone_is_told_apart():
    def server(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/responses":
            return refusal("input", 500)
        return right(request)

    transport = httpx.MockTransport(server)
    summary = fuzz("http://test", count=60, bodies=0, threads=1, progress=False, transport=transport)
    assert summary.engine_errors["input is wrong"] > 0
    assert all(json.dumps(failure).count("/v1/responses") == 1 for failure in summary.failures)
    assert all(failure["reason"] == "HTTP 500" for failure in summary.failures)  # there the knob was wrong
