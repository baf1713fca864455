"""Text that is wrong or hostile costs a message, not time or memory; what dstrain writes is read back."""

import time
from pathlib import Path

import pytest

from dstrain.storage.parsing import dump_yaml, parse_json, parse_yaml, read_tree
from tests.unit.storage.yardstick import longest_reading


def billion_laughs() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 12)]
    return "\n".join(lines)


YAML = {
    "deep brackets": ("[" * 100_000, "nested deeper than 64 levels"),
    "deep blocks": ("- " * 100_000, "nested deeper than 64 levels"),
    "deep mappings": ("{a: " * 60_000, "nested deeper than 64 levels"),
    "aliases that expand": (billion_laughs(), "more than 10,000 values, aliases expanded"),
    "an alias to itself": ("a: &a [*a]", "an alias to what contains it"),
    "many values": ("- 1\n" * 60_000, "more than 10,000 values"),
    "a long number": ("x: " + "9" * 200_000, "has 200000 digits, more than 64"),
    "a number of base 60": ("x: " + ":".join(["59"] * 80_000), "has 239999 digits, more than 64"),
    "a hexadecimal number": ("x: 0x" + "f" * 200_000, "has 200002 digits, more than 64"),
    "a key twice": ("a: 1\na: 2", "the key 'a' is given twice"),
    "a key that is a list": ("? [a]\n: b", "the key ['a'] is not text in YAML; quote it"),
    "a key that is a truth value": ("no: b", "the key no is not text in YAML; quote it"),
    "a number and its text": ("1: a\n'1': b", "the key '1' is given twice"),
    "a set": ("!!set {a, b}", "the tag 'tag:yaml.org,2002:set' is not read"),
    "an object": ("!!python/object/apply:os.system [ls]", "a tag (!...) that is not read"),
    "a NUL": ("a: \0b", "line 1: a character that YAML does not have (number 0)"),
    "a tab": ("a:\n\tb: 1", "line 2, column 1: a tab; indent with spaces"),
    "an open bracket": ("a:\n  b: [1\nc: {", "line 3, column 2: a comma or a closing bracket is missing before this"),
    "an open bracket at the end": ("a: {b: 1\n", "line 1, column 4: a bracket or a quote that is not closed"),
    "an open quote": ("a: 1\nb: 'c\n", "line 2, column 4: a bracket or a quote that is not closed"),
    "a colon too many": ("a: b: c", "line 1, column 5: a colon too many"),
    "an indentation of its own": ("a:\n  b: 1\n c: 2", "line 3, column 2: the indentation fits no line above"),
    "an octal number": ("a: 010", "line 1, column 4: 010 is a number of base 8 in YAML; write it in base 10 or in quotes"),
    "a time": ("a: 1:30", "1:30 is a number of base 60 in YAML; write it in base 10 or in quotes"),
    "two documents": ("--- a\n--- b", "expected a single document"),
}
JSON = {
    "deep": ("[" * 100_000, "nested deeper than 64 levels"),
    "deep and closed": ("[" * 900 + "]" * 900, "nested deeper than 64 levels"),
    "many values": ("[" + "{}," * 3_000_000 + "[]]", "more than 150,000 values"),
    "a long number": ('{"a":' + "9" * 5000 + "}", "has 5000 digits, more than 64"),
    "not a number": ("[NaN]", "NaN is not a number"),
    "a key twice": ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_is_read_within_bounds(name: str) -> None:
    text, message = YAML[name]
    limit, start = longest_reading(), time.process_time()
    with pytest.raises(ValueError) as caught:
        parse_yaml(text)
    assert message in str(caught.value)
    assert time.process_time() - start < limit


@pytest.mark.parametrize("name", JSON)
def test_json_is_read_within_bounds(name: str) -> None:
    text, message = JSON[name]
    limit, start = longest_reading(), time.process_time()
    with pytest.raises(ValueError) as caught:
        parse_json(text)
    assert message in str(caught.value)
    assert time.process_time() - start < limit


def test_keys_that_are_whole_numbers_are_text_as_in_json() -> None:
    assert parse_yaml("layers: {1: 3, 2: 4}") == {"layers": {"1": 3, "2": 4}}


@pytest.mark.parametrize("name", ["x.yaml", "x.json"])
def test_what_editors_of_other_systems_write_is_read_or_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_tree(path) == {"a": 1}
    path.write_text('{"a": 1}', encoding="utf-16")
    with pytest.raises(ValueError, match="UTF-16 text; convert it: iconv"):
        read_tree(path)


def test_yaml_that_is_written_is_read_back() -> None:
    shared = ["eng_Latn", "hin_Deva"]
    tree = {"b": 1, "a": [1.5e-5, None, True, "é", "2001-01-01", "yes", "1e5"], "tags": {"source": shared, "target": shared}}
    text = dump_yaml(tree)
    assert "*id001" in text  # PyYAML writes an alias for an object that it meets twice
    assert parse_yaml(text) == tree
    assert list(parse_yaml(text)) == ["b", "a", "tags"]
