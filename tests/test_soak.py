"""A minute of the soak test, and what it reports."""

import pytest

from serving_harness import user
from soak import CHAT, Request, Soak, soak


def test_soak_reports_another_requests_answer_but_not_rounding() -> None:
    requests = [Request(name, CHAT, {"messages": [user(name)]}) for name in ("one", "other")]
    campaign = Soak("http://127.0.0.1:1", requests, 0)
    for request in requests:
        campaign.alone[id(request)] = (f"an answer to {request.name}", 0)
    campaign.note_difference(requests[0], ("an answer to one, rounded", 0))
    assert (campaign.report.differing, campaign.report.faults) == (1, [])
    campaign.note_difference(requests[0], ("an answer to other", 0))
    assert campaign.report.faults == ["one: got the answer of other"]


@pytest.mark.slow
def test_server_survives_a_minute_of_mixed_broken_and_cut_off_requests() -> None:
    report = soak(minutes=1, clients=8, seed=1, tolerance=2)  # too short for the memory to settle
    assert not report.faults
    assert report.counts["cut off"] and any(name.startswith("broken") for name in report.counts)
    assert report.counts["words: 200"] and report.counts["about video: 200"]
