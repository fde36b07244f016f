"""The OpenAPI document, and requests that are generated from it."""

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.serving.test_api import audio, engine, running  # noqa: F401

EXAMPLES = 10


@pytest.fixture(scope="module")
def url(engine):  # noqa: F811
    with running(engine, engine.model.config) as (address, _):
        yield address


@pytest.mark.slow
def test_every_route_declares_the_error_object(url):
    document = httpx.get(f"{url}/openapi.json").json()
    for path in document["paths"].values():
        for operation in path.values():
            for status in ("4XX", "5XX"):
                schema = operation["responses"][status]["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorBody"}
            assert "422" not in operation["responses"]


def with_audio(case):
    """Replace what the document cannot describe: the model's name and audio."""
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = "tiny"
        if "file" in case.body:
            case.body["file"] = audio(0.3)
    return case


def unchanged(case):
    return case


def statuses_of(operation, mode, change):
    """Send generated requests to an operation, check the answers, and return their statuses."""
    import schemathesis
    from schemathesis.checks import CHECKS, load_all_checks

    load_all_checks()
    # a form that the document allows may have a file that is not audio, or fields that conflict
    excluded = [CHECKS.get_one("positive_data_acceptance")]
    statuses = set()

    @settings(
        derandomize=True,
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def check(case):
        answer = change(case).call_and_validate(excluded_checks=excluded)
        statuses.add(answer.status_code)

    check()
    return statuses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "change"),
    [("positive", unchanged), ("positive", with_audio), ("negative", unchanged)],
    ids=["valid", "with audio", "invalid"],
)
def test_generated_requests_have_the_answers_of_the_document(url, mode, change):
    import schemathesis  # seconds

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    if mode == "negative":  # the others have no field that could be invalid
        operations = [operation for operation in operations if operation.method == "post"]
    statuses = {operation.path: statuses_of(operation, mode, change) for operation in operations}
    assert max(set().union(*statuses.values())) < 500
    if change is with_audio:
        assert 200 in statuses["/v1/audio/transcriptions"]
