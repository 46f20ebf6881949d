"""The sentences that a reader judges: prose of the documents only, and the same ones for the same seed."""

from pathlib import Path

import pytest

from docs.scripts import sentences as sentences_module
from docs.scripts.sentences import sample, sentences

PAGE = """# A title of five words

The first one has *five words.* The second one has `code` too. [A link](page.md) starts the third one. Short.

- An item that is long enough.

| what is in the head | short |
|---|---|
| a cell with more words | `x` |

<!-- figures: written by python -m bench.report -->
A program has written this sentence.
<!-- /figures -->

```sh
echo this is not a sentence
```

    r = log a - log b + c
"""


def test_prose_is_split_into_sentences_with_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentences_module, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(PAGE, "utf-8")
    found = list(sentences(page))
    assert [one.text for one in found] == [
        "The first one has *five words.*",
        "The second one has `code` too.",
        "[A link](page.md) starts the third one.",
        "An item that is long enough.",
        "what is in the head",
        "a cell with more words",
    ]
    assert [one.before for one in found[:3]] == ["", found[0].text, found[1].text]


def test_a_seed_names_its_sample() -> None:
    drawn = sample(1, 200)
    assert len(set(drawn)) > 190  # a few sentences are in the documents twice
    assert drawn == sample(1, 200) != sample(2, 200)
