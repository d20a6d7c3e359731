"""What a server may lead to: addresses and certificates that are not to be trusted."""

from __future__ import annotations

import ssl
import time
import types
import urllib.request

import pytest

from stillhouse.edge import fetching
from stillhouse.engine.errors import StillhouseError


def test_a_clock_in_1970_is_named_where_a_certificate_is_not_valid_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((1970, 1, 1, 0, 0, 0, 3, 1, 0)))
    error = fetching._untrusted("https://host/x", ssl.SSLCertVerificationError())
    assert "this device's clock says" in str(error)
    assert "date" in (error.hint or "")


def test_an_encrypted_address_does_not_lead_to_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    response = types.SimpleNamespace(url="http://elsewhere/x", close=lambda: None)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: response)
    with pytest.raises(StillhouseError, match="leads to http://elsewhere/x, which is not encrypted"):
        fetching.fetch_text("https://host/x")
