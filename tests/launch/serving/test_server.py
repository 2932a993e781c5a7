"""`tim serve` as clients see it: a real process on a network with random weights, spoken to in HTTP."""

from __future__ import annotations

import base64
import json
import re
import signal
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from launch.cli import main
from launch.sampling.files.image_files import read_settings
from tests.launch.serving.server import SMALL, Server, base64_of, noise, pixels_of, png_of, started
from tests.processes import is_running

LONG = {"width": 200, "height": 200, "steps": 128}
SECRETS = re.compile(rb"Traceback|File \"|/tmp|/root|/work|/home|site-packages|\.py\b")


def test_images_of_exact_sizes_that_tim_sample_repeats(server: Server, model: Path, tmp_path: Path, capsys: Any) -> None:
    done = server.draw("?embed=true", sizes=[[9, 7], [16, 33]], steps=[1, 3], guidance=[1, 2.5], count=2).json
    assert (done["state"], len(done["images"])) == ("finished", 16)
    kinds = {(each["width"], each["height"], each["settings"]["steps"], each["settings"]["guidance"]) for each in done["images"]}
    assert len(kinds) == 8
    assert all(each["evaluations"] == each["settings"]["steps"] * (1 + (each["settings"]["guidance"] != 1)) for each in done["images"])
    assert all(each["seconds"] > 0 and each["peak_memory_bytes"] > 1e6 for each in done["images"])
    last = done["images"][-1]
    png = server.get(last["url"])
    assert base64_of(png.body) == last["data"]
    assert pixels_of(png.body).shape == (last["height"], last["width"], 3)
    (tmp_path / "drawn.png").write_bytes(png.body)
    recorded = read_settings(tmp_path / "drawn.png")
    assert (recorded.seed, recorded.model) == (last["settings"]["seed"], "first")
    main(["sample", str(model), "--like", str(tmp_path / "drawn.png"), "--out", str(tmp_path / "out"), "--json"])
    repeated = json.loads(capsys.readouterr().out)["images"][0]["path"]
    assert np.abs(pixels_of(Path(repeated).read_bytes()) - pixels_of(png.body)).max() <= 1


def arguments_of(request: dict[str, Any]) -> list[str]:
    """A request as options of `tim sample`."""
    options: list[str] = []
    for key, value in {"prompt": ["a fox"], "size": "9x7", **request}.items():
        if key == "prompt":
            options += [part for prompt in value for part in ("--prompt", prompt)]
        elif value is True:
            options.append(f"--{key}")
        else:
            options += [f"--{key.replace('_', '-')}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return options


SAMPLED: list[dict[str, Any]] = [
    {"times": [1, 0.7, 0.2, 0], "stochasticity": 0.4, "seed": 3},
    {"prompt": ["a fox", "a lake"], "interpolate": 2, "steps": 2, "guidance": 2, "seed": 1},
    {"variations": 3, "variation_share": 0.3, "steps": [1, 3], "seed": 7},
    {"prompt": ["a", "b"], "zip": True, "steps": [1, 3], "guidance": [1, 2.5], "seed": [4, 2]},
    {"negative": "a dog", "interval": [0.1, 0.8], "guidance": 3, "steps": 3, "count": 3, "seed": 2**64 - 3},
]


@pytest.mark.parametrize("request_", SAMPLED, ids=[", ".join(each) for each in SAMPLED])
def test_images_are_those_of_tim_sample_bit_by_bit(
    server: Server, model: Path, tmp_path: Path, capsys: Any, request_: dict[str, Any]
) -> None:
    steps = {} if "times" in request_ else {"steps": 1}
    body = json.dumps({"prompt": "a fox", "width": 9, "height": 7, **steps, **request_}).encode()
    drawn = server.ask("POST", "/api/draw?embed=true", body, {"Content-Type": "application/json"}).json["images"]
    main(["sample", str(model), *arguments_of(request_), "--device", "cpu", "--out", str(tmp_path / "out"), "--json"])
    sampled = json.loads(capsys.readouterr().out)["images"]
    assert len(drawn) == len(sampled)
    for ours, theirs in zip(drawn, sampled, strict=True):
        assert np.array_equal(pixels_of(base64.b64decode(ours["data"])), pixels_of(Path(theirs["path"]).read_bytes()))
        same = ("prompt", "second_prompt", "second_share", "times", "steps", "seed", "variation", "stochasticity", "guidance")
        assert [ours["settings"].get(key) for key in same] == [theirs.get(key) for key in same]


@pytest.mark.parametrize("form", ["jpeg", "webp", "avif"])
def test_other_formats_record_the_same(server: Server, tmp_path: Path, form: str) -> None:
    drawn = server.draw(prompt="a 🦊", seed=5).json["images"][0]
    other = server.get(f"/api/images/{drawn['id']}.{form}?download=true")
    assert other.headers["content-type"] == f"image/{form}"
    assert other.headers["content-disposition"].startswith("attachment")
    (tmp_path / "x").write_bytes(other.body)
    with Image.open(tmp_path / "x") as image:
        assert (image.format, image.size) == (form.upper(), (9, 7))
    assert server.ask("POST", "/api/parameters", other.body).json["settings"] == drawn["settings"]


def test_edits_keep_what_is_not_masked(server: Server) -> None:
    source = noise(24, 20)
    mask = np.zeros((20, 24), np.uint8)
    mask[5:12, 6:18] = 255
    masked = server.draw(image=base64_of(source), mask=base64_of(png_of(mask)), feather=0, steps=2).json["images"][0]
    before, after = pixels_of(source), pixels_of(server.get(masked["url"]).body)
    assert np.array_equal(before[mask == 0], after[mask == 0])
    assert not np.array_equal(before[mask == 255], after[mask == 255])
    wider = server.draw(image="data:image/png;base64," + base64_of(source), extend=[4, 0, 6, 2]).json["images"][0]
    assert (wider["width"], wider["height"], wider["settings"]["extend"]) == (34, 22, [4, 0, 6, 2])
    assert np.array_equal(pixels_of(server.get(wider["url"]).body)[:20, 4:28], before)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"width": 301, "height": 1}, "width and height 301x1: the limit is 300 pixels a side"),
    ({"width": 8}, "width and height: give both"),
    ({"width": 8, "height": 8, "aspect": "1:1"}, "width and height and aspect: give one of them"),
    ({"aspect": "1:1", "megapixels": 1}, "the limit is 300 pixels a side"),
    ({"aspect": "wide"}, "aspect wide: expected WIDTH:HEIGHT"),
    ({"steps": 201}, "steps 201: the limit is 200"),
    ({"steps": [1, 0]}, "'steps': input should be greater than or equal to 1"),
    ({"steps": 2.5}, "'steps': input should be a valid integer"),
    ({"prompt": "x" * 4001}, "prompt of 4,001 characters: the limit is 4,000"),
    ({"negative": "x" * 4001}, "prompt of 4,001 characters"),
    ({"prompt": "\ud800"}, "send valid Unicode"),
    ({"prompt": 1}, "this model takes text, not class ids"),
    ({"count": 17}, "the request asks for 17 images, the limit is 16"),
    ({"count": 2, "steps": [1] * 9}, "the request asks for 18 images"),
    ({"guidance": -1}, "'guidance': input should be greater than or equal to 0"),
    ({"interval": [0.7, 0.2]}, "interval 0.7 to 0.2"),
    ({"seed": 2**64 - 1, "count": 2}, "it exceeds the largest seed"),
    ({"seed": -1}, "'seed'"),
    ({"mask": "aaaa"}, "mask: changes an image; give image as well"),
    ({"image": "%"}, "image: is not base64"),
    ({"image": base64_of(noise(301, 2))}, "image: has 301x2 pixels, the limit is 300 a side"),
    ({"image": base64_of(noise(4, 4)), "mask": base64_of(noise(5, 4, channels=1))}, "mask of 5x4: the image to edit has 4x4"),
    ({"image": base64_of(noise(200, 4)), "extend": [150, 0, 0, 0]}, "350x4: the limit is 300 pixels a side"),
    ({"image": base64_of(bytes(1_000_001))}, "image: has 1,000,001 bytes, the limit is 1 MB"),
    ({"heigth": 5}, "'heigth': extra inputs are not permitted"),
    ({"steps": 1, "times": [1, 0]}, "steps and times: give one of them"),
    ({"steps": None, "times": [0, 1]}, "times [0.0, 1.0]: a grid needs at least two times, each smaller than the one before"),
    ({"steps": None, "times": [2, 0]}, "this transport's times run from 1 to 0"),
    ({"steps": None, "times": [k / 300 for k in range(300, -1, -1)]}, "times: has 300 steps, the limit is 200"),
    ({"stochasticity": -0.1}, "'stochasticity': input should be greater than or equal to 0"),
    ({"interpolate": 2}, "interpolate 2: give two prompts or more"),
    ({"prompt": ["a", "b"], "interpolate": 15}, "the request asks for 17 images, the limit is 16"),
    ({"variations": 17}, "the request asks for 17 images, the limit is 16"),
    ({"variation_share": 0.1}, "variation_share 0.1: give the number of variations as well"),
    ({"variations": 10**30}, "images, the limit is 16"),
    ({"count": 10**30}, "images, the limit is 16"),
    ({"zip": True, "prompt": ["a", "b"], "steps": [1, 2, 3]}, "zip: 2 prompts, 3 steps: give lists of equal length"),
    ({"seed": [1, 2], "count": 2}, "count 2 and 2 seeds: give one of them"),
    ({"seed": [1, -1]}, "'seed': input should be greater than or equal to 0, not -1"),
    ({"image": base64_of(noise(4, 4)), "mask": base64_of(noise(4, 4)), "extend": [1, 0, 0, 0]}, "mask and extend exclude each other"),
]


@pytest.mark.parametrize(("request_", "message"), REFUSED, ids=[str(each)[:40] for each, _ in REFUSED])
def test_every_limit_is_a_sentence(server: Server, request_: dict[str, Any], message: str) -> None:
    answer = server.draw(**request_)
    assert answer.status == 422
    assert message in answer.json["error"]


def test_uploads_of_hostile_files(server: Server, shared: Path) -> None:
    statuses = set()
    for file in sorted((shared / "corpora" / "hostile").iterdir()):
        content = file.read_bytes()
        for answer in (server.draw(image=base64_of(content)), server.ask("POST", "/api/parameters", content)):
            assert answer.status in (200, 413, 422), file
            assert not SECRETS.search(answer.body), file
            assert answer.status == 200 or list(answer.json) == ["error"]
            statuses.add(answer.status)
    assert statuses >= {200, 422}
    assert server.draw().status == 200


def test_bodies_have_a_limit_before_they_are_read(server: Server) -> None:
    connection = server.connection()
    connection.putrequest("POST", "/api/draw")
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()  # and no body
    answer = connection.getresponse()
    assert (answer.status, list(json.loads(answer.read()))) == (413, ["error"])
    connection.close()


def test_what_is_not_json_is_a_sentence(server: Server) -> None:
    json_header = {"Content-Type": "application/json; charset=utf-8"}
    for body, message in {
        b"{": "the body is not JSON",
        b"": "the body is not JSON",
        b"\xff": "the body is not JSON",
        b"[" * 5000: "not JSON",
    }.items():
        answer = server.ask("POST", "/api/draw", body, json_header)
        assert (answer.status, message in answer.json["error"]) == (400, True), body
    for body in (b"[]", b"1", b"null", b'"a"'):
        answer = server.ask("POST", "/api/draw", body, json_header)
        assert (answer.status, answer.json["error"]) == (422, "the body is not an object of JSON: send one, with the keys of /docs")
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        answer = server.ask("POST", "/api/draw", b'{"prompt": "a"}', {"Content-Type": kind})
        assert (answer.status, list(answer.json)) == (415, ["error"]), kind
    many = server.ask("POST", "/api/draw", b'{"prompt": "a", "sizes": [' + b"[8,8]," * 500_000 + b"[8,8]]}", json_header)
    assert many.status == 413
    assert re.fullmatch(r"the body of a request has at most [\d,]+ values", many.json["error"])


def test_methods(server: Server) -> None:
    for method in ("PUT", "PATCH", "TRACE", "OPTIONS", "GET"):
        answer = server.ask(method, "/api/draw")
        assert (answer.status, answer.json["error"]) == (405, f"{method}: this address takes POST")
        assert answer.headers["allow"] == "POST"
    drawn = server.draw().json["images"][0]["url"]
    head, whole = server.ask("HEAD", drawn), server.get(drawn)
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(whole.body)))


def test_two_clients_at_once(server: Server) -> None:
    answers: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda seed=seed: answers.append(server.draw(seed=seed).json)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each["images"][0]["settings"]["seed"] for each in answers) == [1, 2]


def test_events_of_a_job(server: Server) -> None:
    job = server.draw("?wait=false", width=8, height=8, steps=3)
    assert job.status == 202
    stream = server.get(f"/api/jobs/{job.json['id']}/events?previews=true")
    assert stream.headers["content-type"].startswith("text/event-stream")
    events = re.findall(r"event: (\w+)\ndata: (.*)\n\n", stream.body.decode())
    assert events[-1][0] == "finished"
    assert {name for name, _ in events} <= {"waiting", "progress", "finished"}
    assert json.loads(events[-1][1])["images"][0]["width"] == 8


def test_jobs_are_cancelled(server: Server) -> None:
    drawing, waiting = (server.draw("?wait=false", **LONG).json["id"] for _ in range(2))
    for job in (waiting, drawing):
        assert server.ask("DELETE", f"/api/jobs/{job}").status == 200
    assert server.draw().status == 200  # has its turn only if both have ended
    assert {server.get(f"/api/jobs/{job}").json["state"] for job in (drawing, waiting)} == {"cancelled"}


def test_a_client_that_leaves_cancels_its_request(server: Server) -> None:
    connection = server.connection()
    body = json.dumps({"prompt": "a", **LONG, "count": 16})
    connection.request("POST", "/api/draw", body, {"Content-Type": "application/json"})
    connection.close()
    assert server.draw().status == 200  # in minutes, if the other is drawn to its end


def test_the_schema_and_the_reference(server: Server) -> None:
    schema = server.get("/openapi.json").json
    assert schema["openapi"].startswith("3.")
    body = {**schema["components"]["schemas"]["DrawRequest"], "components": schema["components"]}
    jsonschema.Draft202012Validator.check_schema(body)
    jsonschema.validate({"prompt": ["a"], "sizes": [[8, 8]], "steps": [1, 2], "seed": None}, body)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"prompt": "a", "steps": 0}, body)
    answer = {**schema["components"]["schemas"]["JobAnswer"], "components": schema["components"]}
    jsonschema.validate(server.draw().json, answer)
    page = server.get("/docs")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    text = page.body.decode()
    assert all(address.startswith(server.url) for address in re.findall(r"https?://[^\s\"'<]+", text))
    assert "<script" not in text
    assert all(f"<code>{method.upper()} {path}</code>" in text for path, each in schema["paths"].items() for method in each)
    about = server.get("/api/model").json
    assert (about["name"], about["kind"], about["limits"]["max_side"]) == ("first", "text", 300)


KEYS = ["prompt", "width", "height", "steps", "guidance", "sizes", "seed", "count", "image", "mask", "extend", "interval", "aspect", "x"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=8) | st.sampled_from(["8", "1:1", "aaaa"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
BODIES = (
    st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5).map(lambda each: json.dumps({"prompt": "a", **each}).encode())
    | JSON.map(lambda each: json.dumps(each).encode())
    | st.binary(max_size=50)
    | st.just(b"[" * 100_000)
    | st.just(b'{"prompt": ' + b"9" * 5000 + b"}")
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES)
def test_any_body_is_answered_by_a_sentence_or_a_result(server: Server, body: bytes) -> None:
    answer = server.ask("POST", "/api/draw?wait=false", body, {"Content-Type": "application/json"})
    assert answer.status in (202, 400, 422)
    if answer.status == 202:
        server.ask("DELETE", f"/api/jobs/{answer.json['id']}")
    else:
        assert list(answer.json) == ["error"]
        assert 0 < len(answer.json["error"]) < 1000
        assert "\n" not in answer.json["error"]
    assert not SECRETS.search(answer.body)


def test_unknown_addresses_are_sentences(server: Server) -> None:
    for path in (
        "/api/nothing",
        "/api/jobs/x",
        "/api/images/x.png",
        "/api/images/..%2f..%2fx.png",
        "/api/images/x.exe",
        "/api/jobs/x/events",
    ):
        answer = server.get(path)
        assert answer.status in (404, 422), path
        assert list(answer.json) == ["error"]


def test_health(server: Server) -> None:
    before = server.get("/api/health").json
    server.draw(count=2)
    after = server.get("/api/health").json
    assert (after["status"], after["version"]) == ("ok", version("tim"))
    assert (after["finished"], after["images"]) == (before["finished"] + 1, before["images"] + 2)
    assert (after["waiting"], after["clients"]) == (0, 0)
    assert after["uptime_seconds"] >= before["uptime_seconds"] > 0


def test_the_log_has_requests_without_prompts(server: Server) -> None:
    server.draw(prompt="unspeakable", count=2)
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d finished: 2 images for 127\.0\.0\.1 in \d+\.\d s$", server.said(), re.MULTILINE)
    assert "unspeakable" not in server.said()


def test_many_clients_at_once(server: Server) -> None:
    statuses: list[int] = []
    threads = [threading.Thread(target=lambda seed=seed: statuses.append(server.draw(seed=seed).status)) for seed in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) == 200
    assert set(statuses) <= {200, 429}
    assert server.draw().status == 200


def test_behind_a_proxy(model: Path) -> None:
    with started(model, "--proxy", "127.0.0.1", "--allow-host", "draws.example", "--max-per-client", "1") as server:
        forwarded = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "draws.example", "X-Forwarded-Prefix": "/tim"}
        body = json.dumps({"prompt": "a", "steps": 1, **SMALL}).encode()
        headers = {"Content-Type": "application/json", "Origin": "https://draws.example", **forwarded}
        url = server.ask("POST", "/api/draw", body, headers).json["images"][0]["url"]
        assert url.startswith("/tim/api/images/")
        assert server.ask("GET", url, headers=forwarded).status == 200
        assert "https://draws.example/tim/api/draw" in server.get("/docs", **forwarded).body.decode()
        assert '"root":"https://draws.example/tim"' in server.get("/", **forwarded).body.decode()
        assert server.get("/api/model", **{**forwarded, "X-Forwarded-Host": "evil.example"}).status == 403
        for client in ("198.51.100.1", "198.51.100.2"):
            headers = {"Content-Type": "application/json", "X-Forwarded-For": client}
            long = json.dumps({"prompt": "a", **LONG}).encode()
            assert [server.ask("POST", "/api/draw?wait=false", long, headers).status for _ in range(3)][-1] == 429


def test_the_password_is_needed_everywhere(model: Path) -> None:
    with started(model, environment={"TIM_PASSWORD": "geheim🔑"}) as server:
        right = {"Authorization": "Basic " + base64_of("anyone:geheim🔑".encode())}
        for path in ("/", "/docs", "/openapi.json", "/api/model", "/api/images/x.png", "/config", "/gradio_api/info", "/nothing"):
            answer = server.get(path)
            assert (answer.status, answer.headers["www-authenticate"][:5]) == (401, "Basic"), path
        assert server.get("/api/model", **right).status == 200
        assert server.get("/api/model", Authorization="Basic " + base64_of(b"anyone:wrong")).status == 401


def test_limits_of_requests(model: Path) -> None:
    with started(model, "--max-per-client", "1", "--requests-per-minute", "6") as server:
        first = server.draw("?wait=false", **LONG).json["id"]
        while server.get(f"/api/jobs/{first}").json["state"] == "waiting":
            pass
        assert server.draw("?wait=false", **LONG).status == 202
        full = server.draw("?wait=false", **LONG)
        assert (full.status, full.headers["retry-after"]) == (429, "10")
        assert full.json["error"] == "1 of your requests wait, the limit is 1; wait for one to finish"
        answers = [server.draw("?wait=false", **LONG) for _ in range(5)]
        assert answers[-1].status == 429
        assert answers[-1].json["error"].startswith("more than 6 requests in a minute: try again in ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_while_it_draws(model: Path, number: int) -> None:
    with started(model) as server:
        job = server.draw("?wait=false", width=256, height=256, steps=128, count=16).json["id"]
        while server.get(f"/api/jobs/{job}").json["state"] == "waiting":
            pass
        answers: list[Any] = []
        waiting = threading.Thread(target=lambda: answers.append(server.draw()))
        waiting.start()
        while server.get("/api/health").json["waiting"] == 0:
            pass
        server.process.send_signal(number)
        waiting.join()
        assert (answers[0].status, answers[0].json) == (503, {"error": "the server is stopping; ask again later"})
        server.process.send_signal(number)  # twice
        assert server.process.wait(timeout=60) == 0
        assert "Traceback" not in server.said()
        assert not is_running(server.process.pid)


WRONG = [
    (["--host", "0.0.0.0"], "--host 0.0.0.0: other machines could draw without a password; set TIM_PASSWORD"),
    (["--password", ""], "the password is empty"),
    (["--password", "a", "--password-file", "b"], "--password and --password-file: give one of them"),
    (["--password-file", "nowhere"], "--password-file nowhere: cannot be read"),
    (["--proxy", "nginx"], "--proxy nginx: is no address; give that of the proxy"),
    (["--host", "nowhere.invalid", "--no-password"], "--host nowhere.invalid: unknown"),
    (["--host", "203.0.113.1", "--no-password"], "--host 203.0.113.1: cannot listen there"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[" ".join(options) for options, _ in WRONG])
def test_wrong_options_are_sentences(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "nowhere", "--port", "0", *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_taken_port_is_named_with_another(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(SystemExit):
        main(["serve", "nowhere", "--port", str(port)])
    assert re.search(rf"--port {port}: is taken; give another one, for example --port \d+", capsys.readouterr().err)
