"""A model at the level that rounds a prompt's activations to bfloat16 (decision 42)."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec import runtime
from moec.compiler.reference import compare, reference_logits
from tests.end_to_end.conftest import EXAMPLE
from tests.support.compiling import compile_checkpoint


@pytest.mark.slow
def test_the_trained_example_keeps_its_choices(tmp_path: Path) -> None:
    """Beside transformers in float32; the products alone are tested on all machines (tests/kernels/test_pairs.py)."""
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("this processor has no AVX512-BF16")
    compile_checkpoint(EXAMPLE, tmp_path / "model.moec", targets=("cpu-x86-64-v4-bf16", "cpu-x86-64-v4-vnni"))
    text = (EXAMPLE / "README.md").read_text()
    with runtime.load(tmp_path / "model.moec") as model:
        assert model.target == "cpu-x86-64-v4-bf16"
        assert model.tokenizer is not None
        ids = model.tokenizer.encode(text)[:512]
        sequences = [ids[first : first + 128] for first in range(0, len(ids) - 127, 128)]
        measured = [model.forward(row)[0] for row in sequences]
    agreement = compare(sequences, reference_logits(EXAMPLE, sequences, "float32"), iter(measured))
    assert agreement.tokens >= 256
    assert agreement.argmax_agreement >= 0.98
    assert agreement.mean_kl < 1e-3
