"""Tables to the letter."""

import pytest

from gisp_hf.report import format_table


def test_table_to_the_letter():
    rows = [
        {"level": "dense", "sparsity": 0.0, "parameters": 134515008, "perplexity": 23.754, "other": 1},
        {"level": "a|b", "sparsity": 0.25, "parameters": 98304, "perplexity": 1234.5},
        {"level": None, "sparsity": None, "parameters": None, "perplexity": float("inf")},
    ]
    columns = {"level": "level", "sparsity": "sparsity", "parameters": "parameters", "perplexity": "ppl"}
    assert format_table(rows, columns, formats={"sparsity": ".0%"}).splitlines() == [
        "| level | sparsity |  parameters |      ppl |",
        "| ----- | -------: | ----------: | -------: |",
        "| dense |       0% | 134,515,008 |    23.75 |",
        "| a\\|b  |      25% |      98,304 | 1,234.50 |",
        "| -     |        - |           - |      inf |",
    ]


def test_table_without_rows_is_a_heading():
    assert format_table([], {"a": "name"}) == "| name |\n| ---: |"


@pytest.mark.parametrize(
    ("rows", "columns", "formats", "message"),
    [
        ([{"a": 1}, {"b": 1}], {"a": "A"}, None, r"row 1 lacks \['a'\]"),
        ([{"a": 1}], {"a": "A"}, {"b": ".0f"}, r"formats names \['b'\]"),
        ([{"a": 1}], {}, None, "columns is empty"),
    ],
)
def test_table_names_the_key_that_does_not_fit(rows, columns, formats, message):
    with pytest.raises(ValueError, match=message):
        format_table(rows, columns, formats=formats)
