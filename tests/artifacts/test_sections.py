"""Sections of a chain: every step once, each with what it reads, in files' bytes that are those of the whole."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from moec.artifacts.dense_runs import dense_runs
from moec.artifacts.files.bundle import Bundle
from moec.artifacts.files.reader import open_bundle
from moec.artifacts.ids import LayerId
from moec.artifacts.layout.chain import CHAIN_INPUTS, step_values
from moec.artifacts.layout.footprint import dense_weights, footprint
from moec.artifacts.paths import DENSE_NAME
from moec.artifacts.sections import crossing, cut_places, sections_of, whole_section
from moec.artifacts.steps import ExpertsStep, SegmentStep
from tests.support.tiny_bundle import make_bundle, tiny_model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(make_bundle(tmp_path_factory.mktemp("bundle") / "tiny.moec"), verify="sizes")


def test_a_router_stays_with_its_experts_and_the_last_steps_with_each_other(bundle: Bundle) -> None:
    """Steps: embed, then for each of two layers segment, attention, experts, then the head."""
    assert cut_places(bundle.model) == [1, 4]
    assert crossing(bundle.model, 4) == ("moe0",)
    assert cut_places(replace(bundle.model, encoder=bundle.model.steps[:1])) == []


@pytest.mark.parametrize("cuts", [(1,), (4,), (1, 4)])
def test_sections_have_every_step_once_and_what_it_reads(bundle: Bundle, cuts: tuple[int, ...]) -> None:
    sections = sections_of(bundle, cuts)
    steps = [step for section in sections for step in section.bundle.model.steps]
    assert [
        replace(step, layer=LayerId(0)) if not isinstance(step, SegmentStep) else step for step in steps
    ] == [
        replace(step, layer=LayerId(0)) if not isinstance(step, SegmentStep) else step
        for step in bundle.model.steps
    ]
    assert sections[0].arriving == sections[-1].leaving == ()
    for before, behind in itertools.pairwise(sections):
        assert before.leaving == behind.arriving
    for section in sections:
        known = {*CHAIN_INPUTS, *section.arriving}
        for step in section.bundle.model.steps:
            reads, writes = step_values(step)
            assert known.issuperset(reads)
            known.update(writes)
        assert known.issuperset(section.leaving)
    assert sum(footprint(section.bundle.model).experts_bytes for section in sections) == (
        footprint(bundle.model).experts_bytes
    )


def test_layers_count_from_0_in_each_section_and_experts_keep_their_files(bundle: Bundle) -> None:
    _, section = sections_of(bundle, (4,))
    own = section.bundle
    (layer,) = [step.layer for step in own.model.steps if isinstance(step, ExpertsStep)]
    assert (layer, section.experts_before, own.model.experts[0].layer) == (0, 1, 1)
    np.testing.assert_array_equal(
        own.experts_view(own.model.experts[0].layer), bundle.experts_view(LayerId(1))
    )
    assert own.schedule.profile.layers == bundle.schedule.profile.layers[1:]


def test_dense_weights_go_to_both_sections_that_read_them(bundle: Bundle) -> None:
    file = np.fromfile(bundle.path / DENSE_NAME, np.uint8)
    for section in sections_of(bundle, (1, 4)):
        runs = dense_runs(section)
        memory = np.zeros(runs.size_bytes, np.uint8)
        for run in runs.runs:
            memory[run.offset : run.offset + run.end - run.start] = file[run.start : run.end]
        assert set(runs.offsets) == set(dense_weights(section.bundle.model))
        for name, offset in runs.offsets.items():
            assert offset % 64 == 0
            wanted = bundle.dense_view(name)
            np.testing.assert_array_equal(memory[offset : offset + wanted.size], wanted)
    assert {"embed"} < set(bundle.dense)
    assert "embed" in sections_of(bundle, (4,))[0].bundle.dense
    assert "embed" in sections_of(bundle, (4,))[1].bundle.dense


def test_the_whole_is_the_file_as_it_is(bundle: Bundle) -> None:
    runs = dense_runs(whole_section(bundle))
    assert runs.size_bytes == bundle.manifest.files[DENSE_NAME].size_bytes
    assert runs.offsets == {name: place.offset_bytes for name, place in bundle.dense.items()}
    assert sections_of(bundle, ()) == (whole_section(bundle),)


def test_a_chain_may_be_cut_before_every_layer() -> None:
    layers = tuple((8, 2, 8) for _ in range(4))
    assert cut_places(tiny_model(layers)) == [1, 4, 7, 10]
