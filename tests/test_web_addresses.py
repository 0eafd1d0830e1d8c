"""The web addresses that users are sent to: documents, data sets and citation. Asked for where there is a network."""

import http.client
import re
import socket
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from urllib.parse import urlsplit

import pytest

from tests.documents import pages
from tests.helpers import ROOT

ADDRESS = re.compile(r"https?://[^\s<>()\"'`]+")
# Answers that say that nothing is there. Others may be meant for programs: sites refuse them, or ask for a login.
GONE = (404, 410)
SECONDS = 20


def addresses():
    """Return every web address of the documents, of the data sets' YAML files and of CITATION.cff, once."""
    files = [*pages(), ROOT / "CITATION.cff", *ROOT.glob("*/datasets/*.yaml")]
    found = (address for file in files for address in ADDRESS.findall(file.read_text()))
    return sorted({address.rstrip(".,;:*") for address in found})


def status_of(address):
    """Return the HTTP status of an address. OSError or HTTPException where there is no answer."""
    request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0 (a test of links)"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_addresses_are_complete():
    found = addresses()
    assert "https://arxiv.org/abs/2306.08913" in found and "http://medicaldecathlon.com" in found
    for address in found:
        host = urlsplit(address).hostname
        assert host and re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", host), address


def test_a_missing_page_is_told_from_a_refusal(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(int(self.path[1:]))
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        statuses = [status_of(f"http://127.0.0.1:{server.server_port}/{code}") for code in (200, 403, 404)]
        server.shutdown()
    assert [status in GONE for status in statuses] == [False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("address", addresses())
def test_an_address_leads_somewhere(address):
    host = urlsplit(address).hostname
    try:
        socket.getaddrinfo(host, None)
        status = status_of(address)
    except (OSError, http.client.HTTPException) as error:
        pytest.skip(f"no answer from {host}: no network, or the site is down ({error})")
    assert status not in GONE, f"{address}: HTTP {status}"
