"""Bad feeds get an error that says expected and got, and the session lives on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from exporters.errors import FeedError
from suites.support.bench import Bench, Outputs, cast


def _feeds(case: Bench) -> Outputs:
    return cast(case.session(), case.feeds()[0].arrays)


def _refused(case: Bench, feeds: Mapping[str, np.ndarray], said: str) -> None:
    """The session must refuse the feeds in words that name the problem, and still work afterwards."""
    session = case.session()
    text = ""
    try:
        case.guard(lambda: session.run(feeds))
    except FeedError as error:
        text = str(error)
    assert text, f"feeds were taken that should be refused for '{said}': " + ", ".join(
        f"{k} {v.dtype} {list(v.shape)}" for k, v in feeds.items()
    )
    assert said in text and "expected" in text, f"the refusal says neither '{said}' nor what was expected: {text}"
    assert case.guard(lambda: session.run(_feeds(case))), "the session gave nothing after a refusal"


def test_missing_input_is_refused(case: Bench) -> None:
    """One of the inputs left out."""
    name = case.model.inputs[0].name
    _refused(case, {k: v for k, v in _feeds(case).items() if k != name}, name)


def test_unknown_input_is_refused(case: Bench) -> None:
    """One more input than there are."""
    feeds = _feeds(case)
    _refused(case, {**feeds, "surplus": next(iter(feeds.values()))}, "surplus")


def test_wrong_dtype_is_refused(case: Bench) -> None:
    """The right values in another type."""
    feeds = _feeds(case)
    name = case.model.inputs[0].name
    _refused(case, {**feeds, name: feeds[name].astype(np.float64)}, "float64")
