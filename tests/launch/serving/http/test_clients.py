from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from launch.serving.http.clients import Clients, client_name


async def _seen(request: Request) -> JSONResponse:
    forwarded = sorted(name for name in request.headers if name.startswith("x-forwarded"))
    client = request.client.host if request.client else ""
    return JSONResponse({"client": client, "base": str(request.base_url), "forwarded": forwarded})


def client(*, address: str = "10.0.0.9") -> TestClient:
    app = Clients(Starlette(routes=[Route("/a", _seen)]), proxies=["10.0.0.9"])
    return TestClient(app, base_url="http://inside:7860", client=(address, 1))


FORWARDED = {
    "X-Forwarded-For": "203.0.113.66, 198.51.100.7",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "draws.example",
    "X-Forwarded-Prefix": "/images/",
}


def test_a_trusted_proxy_speaks_for_its_clients() -> None:
    seen = client().get("/a", headers=FORWARDED).json()
    assert seen == {"client": "198.51.100.7", "base": "https://draws.example/images/", "forwarded": []}


def test_nobody_else_does() -> None:
    seen = client(address="10.0.0.8").get("/a", headers=FORWARDED).json()
    assert seen == {"client": "10.0.0.8", "base": "http://inside:7860/", "forwarded": []}


def test_a_proxy_may_leave_the_prefix_in_the_path() -> None:
    assert client().get("/images/a", headers=FORWARDED).json()["client"] == "198.51.100.7"
    assert client().get("/a", headers={"X-Forwarded-Prefix": '/"><script>'}).json()["base"] == "http://inside:7860/"


NAMES = {
    "10.0.0.1": "10.0.0.1",
    "::ffff:10.0.0.1": "10.0.0.1",
    "2001:db8:1:2:3:4:5:6": "2001:db8:1:2::/64",
    "2001:db8:1:2::ffff": "2001:db8:1:2::/64",
    "fe80::1%eth0": "fe80::/64",
    "::1": "::1",
    "testclient": "testclient",
}


@pytest.mark.parametrize(("address", "name"), NAMES.items())
def test_a_client_is_an_address_or_a_network_of_one(address: str, name: str) -> None:
    assert client_name(address) == name
