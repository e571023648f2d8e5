"""Provenance of a measurement."""

from companion.provenance import provenance


def test_provenance_says_how():
    found = provenance("cpu", ["python", "-m", "companion", "sample"])
    assert found["command"] == ["python", "-m", "companion", "sample"]
    assert found["versions"]["torch"] and found["device"].startswith("cpu") and found["threads"] >= 1
