"""Which models' prompts may begin with pages that are in the cache."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moec.errors import RequestError
from moec.runtime.loading.prefixes import choose_prefix_caching
from tests.support import fake_chain


@pytest.mark.parametrize("wanted", [True, None, False])
def test_models_whose_cache_is_not_all_they_know_are_refused(wanted: bool | None) -> None:
    record = fake_chain.record()
    assert choose_prefix_caching(record, wanted) == (wanted is not False, ())
    encoding = replace(record, encoder=record.steps[:1])
    if wanted:
        with pytest.raises(RequestError, match="no prefix caching"):
            choose_prefix_caching(encoding, wanted)
        return
    on, notes = choose_prefix_caching(encoding, wanted)
    assert not on
    assert [("encoder" in note, "off" in note) for note in notes] == (
        [] if wanted is False else [(True, True)]
    )
