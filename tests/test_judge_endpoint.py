"""The endpoint judge against a local server that also misbehaves; nothing leaves this machine."""

import http.server
import json
import threading
import time

import pytest

from rlhf_edu.judge_endpoint import EndpointJudge, append_to_cache, parse_answer, read_cache
from rlhf_edu.judges import both_orders, order_effect

try:
    import openai
except ModuleNotFoundError:
    openai = None
needs_client = pytest.mark.skipif(openai is None, reason="the extra `judge` is not installed")


class StandIn(http.server.ThreadingHTTPServer):
    """Answers from `script` (a list of status or text, used up first), then with the longer response's letter."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.asked, self.keys, self.lock = [], [], [], threading.Lock()
        self.judge = lambda first, second: "A" if len(first) >= len(second) else "B"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        with server.lock:
            server.asked.append(question)
            server.keys.append(self.headers["Authorization"])
            act = server.script.pop(0) if server.script else None
        if act == "sleep":
            time.sleep(3.0)
            act = None
        if isinstance(act, int):
            return self.reply(act, {"error": {"message": "as scripted"}})
        if isinstance(act, bytes):
            return self.reply(200, act)
        if act is None:
            first, second = question.split("|")[1:]
            act = f"One is longer.\n{server.judge(first, second)}"
        message = {"role": "assistant", "content": act}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        self.reply(
            200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        )

    def reply(self, status, body):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("retry-after-ms", "10")
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client did not wait
            pass


@pytest.fixture
def server():
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def judge(server, tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "not a real key")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return EndpointJudge(
        "m",
        (1.0, 2.0),
        tmp_path / "answers" / "judge.jsonl",
        base_url=f"http://127.0.0.1:{server.server_address[1]}/v1",
        key_variable="A_KEY",
        template="{prompt}|{first}|{second}",
        workers=1,
    )


PAIRS = (["p", "q", "r"], ["long one", "x", "same"], ["short", "a long one", "same"])


@needs_client
def test_answers_are_read_and_kept(judge, server, capsys):
    assert judge(*PAIRS).tolist() == [1, 0, 1]
    assert "3 questions, 0 of them answered on disk" in capsys.readouterr().out
    assert server.keys[0] == "Bearer not a real key" and "not a real key" not in judge.cache.read_text()
    assert judge(*PAIRS).tolist() == [1, 0, 1]
    assert (
        len(server.asked) == 3 and capsys.readouterr().out == ""
    )  # asked once, and silent when nothing is sent
    judge.temperature = 0.5
    judge(*PAIRS)
    assert len(server.asked) == 6  # other settings are another question
    judge(*([column[0]] * 4 for column in PAIRS))
    assert len(server.asked) == 6  # nor is one question asked twice in a batch


@needs_client
def test_a_server_that_misbehaves(judge, server):
    judge.timeout = 1.5  # half of what "sleep" takes: a busy machine is not taken for a slow server
    server.script = [
        429,
        429,
        "sleep",
        500,
        "I like both.",
        "Neither\nC",
        b"no json at all",
        b'{"choices": []}',
    ]
    judge.retries, judge.attempts = 4, 6
    assert judge(*PAIRS).tolist() == [1, 0, 1]
    assert judge.unreadable == 0


@needs_client
def test_unreadable_answers_are_ties_and_counted(judge, server):
    server.script = ["Both are fine."] * 3
    assert judge(*PAIRS).tolist() == [0.5, 0, 1]
    assert judge.unreadable == 1
    assert judge(*PAIRS).tolist() == [1, 0, 1]  # asked again, since nothing was kept
    assert judge.unreadable == 0


@needs_client
def test_disagreeing_orders_are_a_tie(judge, server):
    server.judge = lambda first, second: "A"
    assert both_orders(judge)(*PAIRS).tolist() == [0.5] * 3
    assert order_effect(judge, *PAIRS)["favours_first"] == 1
    assert len(server.asked) == 5  # the pair of equal texts is one question in both orders


@needs_client
def test_what_was_answered_survives_an_error(judge, server, one_sentence):
    judge.retries = 1
    server.script = [None, 429, 429]
    with one_sentence("429", "1 new answers are kept", "run it again"):
        judge(*PAIRS)
    asked = len(server.asked)
    assert judge(*PAIRS).tolist() == [1, 0, 1]
    assert len(server.asked) - asked == 2


@needs_client
def test_refused_key_and_slow_server_are_explained(judge, server, one_sentence):
    server.script = [401]
    with one_sentence("A_KEY was refused"):
        judge(*PAIRS)
    judge.timeout, judge.retries, server.script = 0.2, 0, ["sleep"]
    with one_sentence("no answer in time"):
        judge(*PAIRS)


@needs_client
def test_missing_key_is_explained(judge, monkeypatch, one_sentence):
    monkeypatch.delenv("A_KEY")
    with one_sentence("A_KEY is not set"):
        judge(*PAIRS)


@needs_client
def test_several_workers_agree_with_one(judge, server):
    judge.workers = 4
    n = 40
    first, second = ["x" * (i % 7) for i in range(n)], ["x" * (i % 5) for i in range(n)]
    found = judge([str(i) for i in range(n)], first, second)
    assert found.tolist() == [float(i % 7 >= i % 5) for i in range(n)]
    assert len(read_cache(judge.cache)) == n


def test_missing_client_is_explained(judge, monkeypatch, one_sentence):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with one_sentence("[judge]"):
        judge(*PAIRS)


def test_estimate_and_dry_run_send_nothing(judge, server, capsys, monkeypatch, one_sentence):
    monkeypatch.delenv("A_KEY")
    judge.max_tokens = 100
    estimate = judge.estimate(*PAIRS)
    tokens_in = sum(len(q) // 4 + 8 for q in judge.questions(*PAIRS))
    assert (estimate.questions, estimate.cached, estimate.output_tokens) == (3, 0, 900)
    # each may be asked three times
    assert estimate.cost == pytest.approx(3 * (tokens_in * 1.0 + 300 * 2.0) / 1e6)
    judge.dry_run = True
    assert judge(*PAIRS).tolist() == [0.5] * 3
    assert "p|long one|short" in capsys.readouterr().out
    judge.dry_run, judge.max_cost = False, 1e-9
    with one_sentence("max_cost"):
        judge(*PAIRS)
    assert server.asked == [] and not judge.cache.exists()


@pytest.mark.parametrize(
    "text, answer",
    [
        ("A is vague.\nB", 0), ("B says more.\n\nA\n", 1), ("Better: **B**", 0), ("Answer: A.", 1), ("(a)", 1),
        ("The better one is B.", 0), ('"A"', 1), ("Winner: Summary A", 1), ("Preferred: Answer B", 0),
        ("A or B", None), ("", None), ("\n", None), ("A\nBoth are fine", None), ("Apple", None), ("AB", None),
        ("C", None), ("A and B are equal.", None), ("I prefer neither", None),
    ],
)  # fmt: skip
def test_parse_answer_never_guesses(text, answer):
    assert parse_answer(text) == answer


def test_a_cut_short_line_of_the_cache_is_dropped(tmp_path, one_sentence):
    path = tmp_path / "cache.jsonl"
    append_to_cache(path, {"key": "k1", "answer": "A"})
    with open(path, "a") as file:
        file.write('{"key": "k2", "ans')
    assert read_cache(path) == {"k1": "A"}
    append_to_cache(path, {"key": "k3", "answer": "é B"})
    assert read_cache(path) == {"k1": "A", "k3": "é B"}
    path.write_text("no json\n" + path.read_text())
    with one_sentence("cache.jsonl", "another cache"):
        read_cache(path)
