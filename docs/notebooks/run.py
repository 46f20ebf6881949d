"""`make notebook`: runs the notebook's cells, in order and in one namespace, and writes their outputs into it.

The cells are plain Python, without magics, so this needs no Jupyter. Viewers such as GitHub show no styled HTML, so
of a value, its PNG is kept, else its text. Progress is left out.
"""

import ast
import base64
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TypedDict

NOTEBOOK = Path(__file__).with_name("token_rewards.ipynb")
PARAMETERS = "parameters"
PROGRESS = re.compile(r"^$|\|.*\| .* left|it/s\]|^Loading weights")


class Cell(TypedDict, total=False):
    """A cell of a notebook, as far as it is used here: nbformat 4.5."""

    cell_type: str
    metadata: dict[str, list[str]]
    source: list[str]
    outputs: list[dict[str, object]]
    execution_count: int | None


def run(cells: list[Cell], namespace: dict[str, object], parameters: Mapping[str, object]) -> None:
    """Runs the code cells in the namespace, and keeps their outputs in them. What a cell raises is raised.

    `parameters` replace what the cell with the tag `parameters` assigned, as papermill does.
    """
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        cell["outputs"], cell["execution_count"] = _outputs("".join(cell["source"]), namespace, number), number
        if PARAMETERS in cell["metadata"].get("tags", ()):
            namespace |= parameters


def _outputs(source: str, namespace: dict[str, object], number: int) -> list[dict[str, object]]:
    *body, last = ast.parse(source).body
    shown = compile(ast.Expression(last.value), f"cell {number}", "eval") if isinstance(last, ast.Expr) else None
    value: object = None
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            exec(compile(ast.Module(body if shown else [*body, last], []), f"cell {number}", "exec"), namespace)
            value = None if shown is None else eval(shown, namespace)
    except Exception as error:
        error.add_note(printed.getvalue())
        raise
    outputs: list[dict[str, object]] = []
    if lines := [line for line in re.split(r"[\r\n]", printed.getvalue()) if not PROGRESS.search(line)]:
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines("\n".join(lines) + "\n")})
    if value is not None:
        result = {"output_type": "execute_result", "execution_count": number, "metadata": {}}
        outputs.append(result | {"data": _data(value)})
    return outputs


def _data(value: object) -> dict[str, object]:
    png = getattr(value, "_repr_png_", None)
    picture = {} if png is None else {"image/png": base64.b64encode(png()).decode() + "\n"}
    return {**picture, "text/plain": _lines(repr(value))}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> int:
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the outputs name folders of the run, none of this machine
        try:
            run(notebook["cells"], {}, {})
        finally:
            os.chdir(here)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")
    sys.stdout.write(f"written: {NOTEBOOK}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
