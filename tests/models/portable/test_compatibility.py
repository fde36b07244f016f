"""The table of ways to run an exported model."""

from tests.models.portable.compatibility import DOCS, DTYPES, WAYS, newest, page


def test_documentation_has_the_newest_results():
    results = newest()
    assert page(results) == DOCS.read_text()
    assert results["same"].keys() == WAYS.keys()
    for counts in results["same"].values():
        assert counts.keys() == DTYPES.keys()
