"""SECURITY.md promises the caps that the code has."""

from __future__ import annotations

from pathlib import Path

from modelcache import header_grammar, headers

TEXT = (Path(__file__).resolve().parents[2] / "SECURITY.md").read_text()


def test_the_caps_are_those_of_the_code():
    promised = " ".join(TEXT.split())
    assert (
        f"{header_grammar.MAX_HEADER_BYTES >> 20} MiB of header, {header_grammar.MAX_TENSORS:,} tensors, "
        f"rank {header_grammar.MAX_RANK}, dimensions of 2^{header_grammar.MAX_DIMENSION.bit_length() - 1}, "
        f"names of {header_grammar.MAX_NAME_BYTES:,} bytes, {header_grammar.MAX_METADATA_BYTES >> 20} MiB of metadata"
    ) in promised
    assert f"({headers.MAX_CONFIG_BYTES >> 20} MiB, indexes {headers.MAX_INDEX_BYTES >> 20} MiB)" in promised
