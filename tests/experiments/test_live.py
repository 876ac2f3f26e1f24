"""The live page: what it shows of a run, who can read it, and what a browser makes of it."""

import http.client
import json
import shutil
import subprocess
from urllib.parse import urlsplit

import pytest

from experiments import live, live_state
from fedlora.runs.run_files import read_records

NAMES = ("Alpha", "<b>Beta</b>")


def line(number, accuracy=None):
    return {
        "round": number,
        "seconds": 2.0,
        "asked": 2,
        "updates": 2 - number % 2,
        "aggregation": {"rejected": {"Alpha": "too-large"} if number % 2 else {}},
        "metrics": {} if accuracy is None else {"accuracy": accuracy},
        "epsilon_max": number / 2 + 0.001,
        "institutions": {
            name: {"sent": 1000, "received": 500, "epsilon": number / 2 + 0.001} for name in NAMES
        },
    }


@pytest.fixture
def run_dir(tmp_path, tiny_config):
    """A run of six rounds after its third, with the orders of the fourth."""
    place = tmp_path / "one"
    place.mkdir()
    config = tiny_config(**{"federation.rounds": 6, "privacy.epsilon": 4.0})
    (place / "config.toml").write_text(config.to_toml())
    lines = [line(1), line(2, 0.25), line(3)]
    (place / "rounds.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (place / "orders.jsonl").write_text(json.dumps({"round": 4, "institutions": ["Alpha"]}) + "\n")
    return place


def summary(run_dir):
    return live_state.summary(run_dir, read_records(run_dir))


@pytest.fixture
def address(run_dir):
    with live.serving(run_dir) as served:
        yield served


def get(address, path="", **headers):
    """Status, headers and content of a GET request with these headers."""
    where = urlsplit(address)
    connection = http.client.HTTPConnection("127.0.0.1", where.port, timeout=10)
    connection.putrequest("GET", where.path + path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def test_a_run_in_its_fourth_round_is_summarised(run_dir):
    said = summary(run_dir)
    assert (said["stage"], said["round"], said["rounds"]) == ("rounds", 3, 6)
    assert (said["asked"], said["updates"], said["seconds_left"]) == (["Alpha"], [1, 2], 6.0)
    assert (said["metric"], said["measured"]) == ("accuracy", [[2, 0.25]])
    assert (said["epsilon"], said["limit"]) == ([[1, 0.501], [2, 1.001], [3, 1.501]], 4.0)
    assert said["institutions"][1] == {
        "name": "Alpha",
        "rounds": 3,
        "sent": 3000,
        "received": 1500,
        "epsilon": 1.501,
        "rejected": "too-large (round 3)",
    }


def test_every_stage_of_a_run_has_its_name(run_dir, tmp_path):
    assert summary(tmp_path / "not-yet")["stage"] == "starting"
    assert live_state.last_change(tmp_path / "not-yet") is None
    with (run_dir / "rounds.jsonl").open("a") as file:
        file.write("".join(json.dumps(line(n)) + "\n" for n in (4, 5, 6)) + '{"round": 7, "half')
    assert summary(run_dir)["stage"] == "ending"
    (run_dir / "result.json").write_text("{}")
    assert summary(run_dir)["stage"] == "complete"
    config = (run_dir / "config.toml").read_text()
    (run_dir / "config.toml").write_text(config.replace("epsilon = 4.0", "epsilon = inf"))
    said = summary(run_dir)
    assert (said["epsilon"], said["limit"]) == (None, None)


def test_an_epsilon_that_no_institution_reported_is_not_zero(run_dir):
    lines = [line(1) | {"epsilon_max": None}, line(2)]
    (run_dir / "rounds.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert summary(run_dir)["epsilon"] == [[2, 1.001]]


def test_the_page_follows_the_files(address, run_dir):
    assert json.loads(get(address, "run.json")[2])["round"] == 3
    with (run_dir / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(line(4)) + "\n")
    said = json.loads(get(address, "run.json")[2])
    assert said["round"] == 4 and 0 <= said["quiet"] < 60
    with (run_dir / "rounds.jsonl").open("r+b") as file:
        file.write(b"x")  # no JSON: a round that was read is not read again
        file.seek(0, 2)
        file.write(json.dumps(line(5)).encode() + b"\n")
    assert json.loads(get(address, "run.json")[2])["round"] == 5


def test_only_this_machine_and_only_its_own_page_reads_the_run(address):
    assert urlsplit(address).hostname == "127.0.0.1"
    for host in ("localhost:1234", "127.0.0.1"):
        assert get(address, "run.json", Host=host)[0] == 200
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        status, _, content = get(address, "run.json", Host=host)
        assert status == 421 and b"Alpha" not in content
    status, headers, _ = get(address, "run.json", Origin="http://evil.example")
    assert "Access-Control-Allow-Origin" not in headers
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    secret = urlsplit(address).path
    for path in ("/", "/run.json", "/wrong/run.json", f"{secret[:-2]}/run.json"):
        assert get(address.replace(secret, path))[0] == 404
    for path in ("../config.toml", "config.toml", "%2e%2e/config.toml"):
        assert get(address, path)[0] == 404


def test_each_answer_allows_its_own_script_only(address):
    pages = [get(address) for _ in range(2)]
    nonces = [p[1]["Content-Security-Policy"].split("'nonce-")[1].split("'")[0] for p in pages]
    assert nonces[0] != nonces[1]
    assert f'<script nonce="{nonces[0]}">' in pages[0][2].decode()


def page_of(address):
    """The page as a browser shows it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--virtual-time-budget=3000", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.slow
def test_a_browser_shows_an_epsilon_that_is_not_known(address, run_dir):
    label = "<span>epsilon of this run, of 4</span>"
    (run_dir / "rounds.jsonl").write_text(json.dumps(line(1) | {"epsilon_max": None}) + "\n")
    assert f"<b>not known</b>{label}" in page_of(address)
    (run_dir / "rounds.jsonl").write_text("")
    assert f"<b>0</b>{label}" in page_of(address)


@pytest.mark.slow
def test_a_browser_shows_the_run(address):
    page = page_of(address)
    for words in (
        "<title>3/6 one</title>",
        "Round 4 of 6: 1 institution trains.",
        "<b>3 / 6</b><span>rounds</span>",
        "<b>0.250</b><span>accuracy after round 2</span>",
        "<b>1.51</b><span>epsilon of this run, of 4</span>",  # a bound is rounded up
        '<td class="number">1.51</td>',
        'aria-label="epsilon spent, by round: round 3 1.51"',
        "<b>6 s</b><span>left for the rounds</span>",
        "&lt;b&gt;Beta&lt;/b&gt;",
        "too-large (round 3)",
        "budget 4",
        "<polyline",
    ):
        assert words in page, words
