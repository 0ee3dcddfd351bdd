"""docs/bundle-format.md against the schemas, the records and a real bundle."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec import schemas
from moec.artifacts.files.manifest import FORMAT_VERSION
from moec.artifacts.files.reader import open_bundle
from moec.artifacts.ids import LayerId
from moec.artifacts.layout.experts import layout
from tests.support.tiny_bundle import make_bundle

DOCUMENT = Path(__file__).parents[3] / "docs/bundle-format.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")

WORDS = {
    *(
        "bundle",
        "modules",
        "cpu",
        "cuda",
        "segment",
        "attention",
        "append",
        "state",
        "experts",
        "traced",
        "uniform",
        "gate",
        "up",
    ),
    *(
        "tokens",
        "positions",
        "logits",
        "gate_bias",
        "up_bias",
        "chosen_",
        "weights_",
        "sequence_starts",
        "prefill",
    ),
    *("input", "weight", "output", "local", "none", "dequantize_rows"),
    *("token_sequence", "token_source", "token_last", "token_call"),
}
"""Words in code style that are values, parts of an expert, or arrays, not properties of a JSON file."""


APART = {"fit", "machine", "quantization"}
"""Schemas that those of a bundle's files refer to."""


def properties(schema: Any) -> set[str]:
    parts = [schema, *schema.get("$defs", {}).values()]
    return {name for part in parts for name in part.get("properties", {})}


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title}"
    return found[1]


def test_it_is_of_this_version_and_short() -> None:
    assert f"version {FORMAT_VERSION}" in TEXT.splitlines()[0]
    assert len(TEXT.splitlines()) <= 200


@pytest.mark.parametrize("name", ["manifest", "model", "packing", "schedule", "program", "accuracy"])
def test_every_json_file_has_a_section_with_its_properties(name: str) -> None:
    text = section(f"{name}.json")
    known = set.union(*(properties(schemas.load(each)) for each in (name, *APART)))
    named = set(re.findall(r"`([a-z][a-z_0-9]*)(?:\[m\])?`", text))
    assert named - known - WORDS == set()
    top = set(schemas.load(name)["properties"])
    assert len(top & named) >= min(3, len(top)), "the section says too little"


def test_every_file_of_a_bundle_is_in_the_list(tmp_path: Path) -> None:
    listing = TEXT.split("\n## ")[0]
    for path in open_bundle(make_bundle(tmp_path / "b")).manifest.files:
        known = path if "/" not in path or path.startswith(("weights", "profile")) else path.split("/")[0]
        assert known.replace("00001", "00000") in listing, path


def test_the_shell_line_gives_the_manifests_own_hash(tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "b"))
    command = re.search(r"^    (sed .*?sha256sum)$", TEXT, re.MULTILINE | re.DOTALL)
    assert command
    result = subprocess.run(
        ["bash", "-c", command[1]], cwd=bundle.path, capture_output=True, text=True, check=True
    )
    assert result.stdout.split()[0] == bundle.manifest.manifest_sha256


def test_the_python_lines_read_an_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "b"))
    code = re.search(r"^    import json, pathlib, numpy as np\n(?:    .*\n)+", TEXT, re.MULTILINE)
    assert code
    monkeypatch.chdir(bundle.path)
    names: dict[str, Any] = {}
    exec("\n".join(line[4:] for line in code[0].splitlines()), names)
    part = layout(bundle.model.bodies[0]).part("up")
    expected = bundle.expert_view(LayerId(0), 5)[part.offset_bytes : part.offset_bytes + part.size_bytes]
    np.testing.assert_array_equal(names["up"], expected)
