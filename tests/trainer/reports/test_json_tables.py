"""Results of any job as tables, by their form alone."""

from dense_reward_trainer.reports.json_tables import Table, number, tables_of


def test_estimates_and_intervals_are_one_cell() -> None:
    value = {
        "sft": {"accuracy": {"value": 0.5, "standard_error": 0.0125, "count": 9}, "nll": 1.23456, "pairs": {}},
        "dpr": {
            "accuracy": {"value": 0.75, "standard_error": None, "count": 1},
            "kl": {"value": 2, "low": 1, "high": 3},
        },
    }
    assert list(tables_of(value)) == [
        Table(
            (),
            ("", "accuracy", "nll", "pairs", "kl"),
            (("sft", "0.5 ± 0.0125", "1.235", "–", "–"), ("dpr", "0.75", "–", "–", "2 [1, 3]")),
        )
    ]


def test_records_inside_records_become_columns_and_parts_that_are_no_rows_become_sections() -> None:
    value = {
        "tables": [
            {"name": "gsm8k", "count": 3, "rows": [{"method": {"column": "reward", "rule": "lowest"}, "f1": 0.1}]},
            {"name": "math", "control": {"column": "margin", "rule": "lowest"}, "rows": []},
        ],
        "note": None,
        "seeds": list(range(20)),
    }
    assert list(tables_of(value)) == [
        Table((), ("", "value"), (("note", "–"), ("seeds", "0, 1, 2, 3, 4, 5, 6, 7, … (20 values)"))),
        Table(("tables", "gsm8k"), ("", "value"), (("name", "gsm8k"), ("count", "3"))),
        Table(
            ("tables", "gsm8k", "rows"),
            ("", "method.column", "method.rule", "f1"),
            (("1", "reward", "lowest", "0.1"),),
        ),
        Table(
            ("tables", "math"),
            ("", "value"),
            (("name", "math"), ("control.column", "margin"), ("control.rule", "lowest"), ("rows", "–")),
        ),
    ]


def test_a_record_of_too_many_fields_is_a_section_of_its_own() -> None:
    wide = {f"field {n}": {"a": n, "b": n} for n in range(9)}
    tables = list(tables_of({"first": wide, "second": wide}))
    assert [table.path for table in tables] == [("first",), ("second",)]
    assert tables[0].titles == ("", "a", "b")


def test_numbers_have_four_significant_digits_and_counts_are_whole() -> None:
    assert [number(value) for value in (1234567, 0.000123456, 12.3456, True)] == [
        "1,234,567",
        "0.0001235",
        "12.35",
        "1",
    ]
