"""JSON files are replaced whole, and one that is damaged is named."""

import json
import resource

import pytest

from gptjax.json_files import read_json, write_json


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a" / "summary.json"
    assert read_json(path) == {}
    for value in ({"x": 1}, {"x": "日"}):
        write_json(path, value)
        assert json.loads(path.read_text(encoding="utf-8")) == read_json(path) == value
    assert [path.name for path in path.parent.iterdir()] == ["summary.json"]


def test_what_has_no_room_is_named(tmp_path):
    write_json(tmp_path / "summary.json", {"x": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(OSError, match="summary.json"):
            write_json(tmp_path / "summary.json", {"x": "y" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_json(tmp_path / "summary.json") == {"x": 1}


def test_what_is_no_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"half": ')
    with pytest.raises(ValueError, match="config.json: is not JSON"):
        read_json(tmp_path / "config.json")
