"""Files of pages that are put together while their pages come."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from haulier.containers.checkpoint import digest_of_pages
from haulier.containers.drafts import DRAFT_BYTES, Draft, Drafting
from haulier.units import PAGE

MIB = 1 << 20


def test_a_layout_counts_once_its_pages_are_here_even_if_drafts_came_between() -> None:
    drafting = Drafting()
    assert drafting.due(0, False, 0) == (True, False), "an early layout, of nothing yet"
    assert drafting.due(0, False, MIB) == (False, False)
    # The settled layout comes before the last of its pages, and so much has come meanwhile that it is time for a draft.
    assert drafting.due(DRAFT_BYTES + MIB, True, DRAFT_BYTES) == (True, False)
    assert drafting.due(DRAFT_BYTES + MIB, True, DRAFT_BYTES + MIB) == (True, True)
    assert drafting.due(DRAFT_BYTES + MIB, True, DRAFT_BYTES + MIB) == (False, False)


def test_a_settled_layout_of_no_bytes_more_counts_too() -> None:
    drafting = Drafting()
    assert drafting.due(MIB, False, MIB) == (True, False)
    assert drafting.due(MIB, True, MIB) == (True, True)


@given(st.lists(st.integers(0, 3 * DRAFT_BYTES), max_size=12), st.integers(0, 3 * DRAFT_BYTES), st.integers(0, 12))
def test_whatever_comes_first_the_settled_layout_is_drafted_whole(parts: list[int], early: int, place: int) -> None:
    """`place`: before which of the pages the settled layout, which holds from all of them on, arrives."""
    total, came, drafting = sum(parts), 0, Drafting()
    said: list[tuple[bool, bool]] = []
    for at, part in enumerate(parts):
        said.append(drafting.due(*((total, True) if place <= at else (min(early, total), False)), came))
        came += part
    said.append(drafting.due(total, True, total))
    assert (True, True) in said


def test_a_draft_follows_the_picture_and_the_pages_asked_for(tmp_path: Path) -> None:
    chosen = np.random.default_rng(1)
    picture = chosen.integers(0, 255, (200, PAGE), dtype=np.uint8)
    touched = np.zeros(200, np.bool_)
    path = tmp_path / "pages-1.img"
    draft = Draft(path, picture, touched)
    for count, changes in ((40, 3), (40, 5), (55, 2), (17, 1), (0, 0), (33, 9), (32, 0), (33, 0)):
        numbers = chosen.permutation(200)[:count].astype(np.int64) if changes != 5 else numbers  # noqa: F821
        changed = chosen.permutation(200)[:changes]
        picture[changed, 7] += 1
        touched[changed] = True
        draft.follow(numbers)
        assert path.read_bytes() == picture[numbers].tobytes()
        assert draft.digest() == digest_of_pages(picture[numbers])
    # What did not change is not taken again.
    before = draft.written
    picture[numbers[4], 9] += 1
    touched[numbers[4]] = True
    draft.follow(numbers)
    assert draft.written == before + 1
    assert draft.digest() == digest_of_pages(picture[numbers])
    draft.close()


def test_a_draft_of_an_empty_picture_takes_only_what_came(tmp_path: Path) -> None:
    picture, touched = np.zeros((100, PAGE), np.uint8), np.zeros(100, np.bool_)
    path, numbers = tmp_path / "pages-1.img", np.arange(90, 20, -1, dtype=np.int64)
    draft = Draft(path, picture, touched)
    draft.begin(numbers)
    for came in (range(30, 40), range(85, 95), range(38, 42)):
        picture[came] += 7
        touched[came] = True
        draft.follow(numbers)
        assert path.read_bytes() == picture[numbers].tobytes()
        assert draft.digest() == digest_of_pages(picture[numbers])
    # Those beyond the file are no part of it.
    assert draft.written == 10 + 6 + 4
    draft.close()
