import json

import pytest

from asrllm.training.callbacks.json_log import reopen_log


@pytest.mark.parametrize(
    "damage",
    [b"\xff\xfe", b'{"step": ', b'{"step": "two"}', b"[1]", b"", b"[" * 100_000, b'{"loss": 1}'],
)
def test_only_the_corrupted_line_of_a_log_is_dropped(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    lines = []
    for step in (1, 2, 3, 4):
        line = json.dumps({"step": step, "text": "a\u2028é"}, ensure_ascii=False)
        lines.append(line.encode())
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]) + b"\n")
    with reopen_log(path, 3) as log:
        log.write(json.dumps({"step": 5}) + "\n")
    assert [json.loads(line)["step"] for line in path.read_text().split("\n") if line] == [1, 3, 5]


def test_incomplete_last_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    reopen_log(path, 9).close()
    assert path.read_text() == '{"step": 1}\n'
