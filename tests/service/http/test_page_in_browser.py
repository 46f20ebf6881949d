"""The page at / in a real Chromium, with a real pair: what users see, click, type and drop (`make page`)."""

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from dense_reward.heatmap.visible import visible
from dense_reward.serving.loaders import loader
from running_service import served
from served_pair import SIZES, ServedPair, free_port, write_pair
from tiny_heads import write_head

from bench.page.browser import PHONE, Visit, axe_violations, chromium, missing, visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]
KEY = "a-key-of-the-browser-tests"
RIGHT, WRONG = "5+8=13 write 3 carry 1\n#### 143", "5+8=14 write 3 carry 1\n#### 143"


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two pairs with the same SFT model and other references."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pair(folder, sizes=SIZES.model_copy(update={"max_position_embeddings": 2048}))
    sft = str(folder / "sft")
    pairs = [{"name": name, "sft": sft, "reference": str(folder / name)} for name in ("early", "reference")]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    pair = ServedPair(folder, free_port(), folder / "pairs.json")
    pair.start()
    try:
        pair.wait_until_ready()
        yield pair.url
    finally:
        pair.kill()


@pytest.fixture
def seen(browser: "Browser", url: str) -> Iterator[Visit]:
    """A visit that must end without a fault, a violation of the policy, or a request to another host."""
    with visit(browser, url) as found:
        yield found
        assert found.faults == []
        assert found.violations() == []
        assert found.outside == []


def scores(seen: Visit) -> int:
    return sum(path == "/score" for path in seen.asked)


def choose(seen: Visit, control: str, value: str) -> None:
    seen.page.select_option(f"#{control}", value)
    seen.shown()


def classes(seen: Visit, response: int = 0) -> list[str]:
    found = (
        seen.page.locator("article").nth(response).locator(".t").evaluate_all("all => all.map(one => one.className)")
    )
    return [str(name) for name in found]


def test_the_numbers_beside_a_response_are_those_that_the_service_sums(seen: Visit, url: str) -> None:
    seen.score("Add 85 and 58.", RIGHT, WRONG)
    card = httpx2.get(f"{url}/models").json()["models"][0]
    body = {"prompt": "Add 85 and 58.", "responses": [RIGHT, WRONG], "model": card["name"]}
    results = httpx2.post(f"{url}/score", json=body).json()["results"]
    for at, result in enumerate(results):
        stats = seen.page.locator("article").nth(at).locator(".stats").inner_text().replace("−", "-")
        wanted = [result["sum"], result["mean"], result["min"]]
        shown = [float(part) for part in stats.split() if part.lstrip("+-").replace(".", "").isdigit()]
        assert shown[1:4] == pytest.approx(wanted, abs=0.006)
        assert sum("low" in name for name in classes(seen, at)) == 1
        text = "".join(seen.page.locator("article").nth(at).locator(".t").all_text_contents()).replace("⏎", "")
        assert text.startswith([RIGHT, WRONG][at])


def test_signal_reference_difference_and_palette_change_without_asking_again(seen: Visit) -> None:
    seen.score("Add 85 and 58.", RIGHT, WRONG)
    reward = classes(seen)
    drawn = {"reward": reward}
    for signal in ("centred", "kl", "sft_logprob", "reference_logprob", "entropy", "varentropy"):
        choose(seen, "signal", signal)
        drawn[signal] = classes(seen)
    choose(seen, "signal", "reward")
    choose(seen, "reference", "reference")
    drawn["other reference"] = classes(seen)
    choose(seen, "reference", "early")
    assert classes(seen) == reward
    choose(seen, "minus", "preference")
    drawn["references compared"] = classes(seen)
    choose(seen, "minus", "r0")
    assert all("none" in name for name in classes(seen, 0)), "it is what the other is compared with"
    assert sum("none" in name for name in classes(seen, 1)) == 1, "one token is in one response only"
    choose(seen, "palette", "dark-red")
    assert "Red: higher than in response 1" in seen.page.inner_text("#meaning")
    assert len(set(map(tuple, drawn.values()))) == len(drawn)
    assert scores(seen) == 2, "once for each reference: the other one is fetched ahead"


def test_an_aggregate_marks_the_response_that_it_ranks_first(seen: Visit) -> None:
    seen.score("Add 85 and 58.", RIGHT, WRONG, "#### 143")
    for aggregate in ("sum", "mean", "min"):
        seen.page.locator(f"label:has([value={aggregate}])").click()
        (badge,) = seen.page.locator(".badge").all()
        assert badge.locator("xpath=..").inner_text().startswith(aggregate)
    assert seen.page.locator(".stats .at").count() == 3
    seen.page.locator(".stats .at").nth(1).click()
    assert "low" in seen.page.evaluate("document.activeElement.className")


def test_a_response_is_one_tab_stop_with_arrows_inside(seen: Visit) -> None:
    seen.score("Add 85 and 58.", RIGHT, WRONG)
    assert seen.page.locator(".t[tabindex='0']").count() == 2
    seen.page.locator(".t").first.focus()
    details = seen.page.locator("#details")
    for key, place in (("ArrowRight", "token 2 "), ("End", "token "), ("Home", "token 1 "), ("ArrowRight", "token 2 ")):
        seen.page.keyboard.press(key)
        assert place in details.inner_text()
    assert seen.page.evaluate("document.activeElement.getAttribute('role')") == "button"
    seen.page.keyboard.press("ArrowDown")
    first, now = seen.page.evaluate("[document.querySelector('.t'), document.activeElement].map(one => one.offsetTop)")
    assert now > first
    seen.page.keyboard.press("Escape")
    assert details.is_hidden()
    assert seen.page.locator(".t[tabindex='0']").count() == 2


def test_pointing_at_a_token_shows_its_numbers_and_the_alternatives(seen: Visit) -> None:
    seen.score("Add 85 and 58.", RIGHT)
    seen.page.locator(".t").nth(2).hover()
    text = seen.page.locator("#details").inner_text()
    for name in ("token 3 of", "reward", "centred", "KL", "log π SFT", "entropy", "likeliest under SFT"):
        assert name in text
    assert seen.page.locator("#details .others tbody tr").count() == 5


def test_a_chat_with_thoughts_is_sent_as_messages(seen: Visit) -> None:
    seen.page.fill("#prompt", "Add 85 and 58.")
    seen.page.locator("label:has([value=chat])").click()
    assert seen.page.locator(".turn .text").first.input_value() == "Add 85 and 58."
    for at, text in ((1, "143"), (2, "Again.")):
        seen.page.click("#add-turn")
        seen.page.locator(".turn .text").nth(at).fill(text)
    seen.page.locator(".response .text").fill("#### 143")
    seen.page.locator(".response summary").click()
    seen.page.locator(".response .thoughts").fill("5+8")
    with seen.page.expect_request("**/score") as sent:
        seen.show()
    (item,) = sent.value.post_data_json["items"]
    assert [message["role"] for message in item["messages"]] == ["user", "assistant", "user", "assistant"]
    assert item["messages"][-1] == {"role": "assistant", "content": "#### 143", "reasoning_content": "5+8"}


def drop(seen: Visit, name: str, lines: list[str]) -> None:
    seen.renew()
    seen.page.evaluate(
        """([name, text]) => {
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([text], name));
          for (const kind of ["dragover", "drop"]) {
            dispatchEvent(new DragEvent(kind, { dataTransfer, cancelable: true, bubbles: true }));
          }
        }""",
        [name, "\n".join(lines)],
    )
    seen.shown()


def test_a_dropped_file_is_gone_through_row_by_row(seen: Visit) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    answer = {"role": "assistant", "content": "#### 3", "tool_calls": [call]}
    rows: list[dict[str, object]] = [
        {"prompt": "Add 85 and 58.", "chosen": RIGHT, "rejected": WRONG},
        {"question": "Add 1 and 2.", "answer": "#### 3"},
        {"messages": [{"role": "user", "content": "Add."}, answer]},
        {"prompt": "no response"},
    ]
    sent: list[Any] = []
    seen.page.on("request", lambda request: sent.append(request.post_data_json))
    drop(seen, "mine.jsonl", [*map(json.dumps, rows), "{"])
    assert seen.page.locator("article").count() == 2
    assert "mine.jsonl" in seen.page.inner_text("#records")
    for at in (1, 2, 3, 4):
        seen.renew()
        seen.page.click("#next")
        seen.shown()
        error = seen.page.inner_text("#error") if seen.page.locator("#error").is_visible() else ""
        if at == 1:
            assert seen.page.input_value("#prompt") == "Add 1 and 2."
        elif at == 2:
            assert sent[-1]["items"][0]["messages"][-1]["tool_calls"] == [call], "calls are sent along"
        else:
            assert {3: "no prompt with a response", 4: "Line 5 is not JSON"}[at] in error
            assert seen.page.locator("#result").is_hidden()
            assert seen.page.locator(".response .text").input_value() == ""


def test_a_link_opens_the_same_view_and_holds_no_key(browser: "Browser", url: str, seen: Visit) -> None:
    seen.page.evaluate("sessionStorage.setItem('dense-reward-key', 'a-secret-of-this-tab')")
    seen.score("Add 85 and 58. ∑ 🙂", RIGHT, WRONG)
    choose(seen, "signal", "entropy")
    choose(seen, "palette", "grey")
    wanted = classes(seen)
    seen.page.click("#link")
    seen.page.wait_for_url("**/#v1=*")
    with visit(browser, url, f"/#{seen.page.url.partition('#')[2]}") as other:
        other.ready()
        other.shown()
        assert other.page.input_value("#prompt") == "Add 85 and 58. ∑ 🙂"
        assert other.page.input_value("#signal") == "entropy"
        assert classes(other) == wanted
        opened = other.page.evaluate("import('/web/link.js').then((link) => link.viewOf(location.hash))")
    assert "a-secret" not in json.dumps(opened)
    assert set(opened) == {"pair", "input", "choices"}


def test_a_damaged_link_and_a_refused_text_say_what_to_do(seen: Visit) -> None:
    seen.page.evaluate("() => { location.hash = '#v1=AAAA'; }")
    seen.page.wait_for_selector("#error:not([hidden])")
    assert "copy it again" in seen.page.inner_text("#error")
    seen.score("Add.", "1 " * 5000)
    error = seen.page.inner_text("#error")
    assert "2048" in error.replace(",", "")
    assert "code: too_long" in error


def test_files_that_are_saved_hold_the_view(seen: Visit, tmp_path: Path) -> None:
    seen.score("Add 85 and <58>.", RIGHT, WRONG)
    saved = {}
    for kind in ("svg", "html", "json"):
        with seen.page.expect_download() as download:
            seen.page.click(f"#save-{kind}")
        download.value.save_as(tmp_path / kind)
        saved[kind] = (tmp_path / kind).read_text()
    content = json.loads(saved["json"])
    assert content["request"]["responses"] == [RIGHT, WRONG]
    assert len(content["answers"]["early"]["results"]) == 2
    tokens = seen.page.locator(".t").count()
    assert saved["svg"].count("<title>") >= tokens
    assert saved["html"].count('<span class="c') == tokens
    assert "Add 85 and &#60;58&#62;." in saved["html"]


def test_signs_for_hidden_characters_are_those_of_the_services_pictures(seen: Visit) -> None:
    # What is unassigned in one version of Unicode may be a letter in the other.
    known = [chr(code) for code in range(0x3200) if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
    shown = seen.page.evaluate("async (all) => all.map((await import('/web/text.js')).visible)", known)
    assert [found for found, one in zip(shown, known, strict=True) if found != visible(one)] == []


def test_equal_tokens_are_aligned_by_the_shortest_edit(seen: Visit) -> None:
    cases = [
        ([1, 2, 3], [1, 2, 3], [0, 1, 2]),
        ([1, 2, 3], [1, 9, 3], [0, -1, 2]),
        ([1, 2, 3, 4], [2, 3, 4], [-1, 0, 1, 2]),
        ([1, 5, 2, 6, 3], [1, 2, 3], [0, -1, 1, -1, 2]),
        ([1, 2], [7, 1, 8, 2, 9], [1, 3]),
        ([], [1], []),
        ([1], [], [-1]),
    ]
    script = """async (cases) => {
      const { alignment } = await import("/web/align.js");
      return cases.map(([one, other]) => alignment(one, other));
    }"""
    found = seen.page.evaluate(script, [[one, other] for one, other, _ in cases])
    assert found == [wanted for _, _, wanted in cases]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: "Browser", url: str, scheme: str) -> None:
    with visit(browser, url, color_scheme=scheme) as seen:
        assert axe_violations(seen.page) == []
        seen.score("Add 85 and 58.", RIGHT, WRONG)
        seen.page.locator(".t").nth(3).click()
        assert axe_violations(seen.page) == []
    with visit(browser, url, "/docs") as seen:
        seen.page.wait_for_selector(".opblock")
        assert axe_violations(seen.page) == []


def test_a_phone_scrolls_the_page_alone_and_never_sideways(browser: "Browser", url: str) -> None:
    with visit(browser, url, viewport=PHONE, is_mobile=True, has_touch=True) as seen:
        seen.score("Add 85 and 58.", "\n".join([RIGHT] * 20), WRONG)
        seen.page.locator(".t").nth(40).tap()
        assert "token 41 of" in seen.page.locator("#details").inner_text()
        inner = seen.page.evaluate(
            """() => [...document.querySelectorAll("body *")].filter((one) =>
              one.scrollHeight > one.clientHeight + 1 && /auto|scroll/.test(getComputedStyle(one).overflowY)
            ).map((one) => one.id || one.className)"""
        )
        assert inner == []
        assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_token_head_has_one_signal_and_no_reference(browser: "Browser", tmp_path: Path) -> None:
    write_head(tmp_path / "head")
    with (
        served(loader("torch"), token_head=tmp_path / "head") as running,
        visit(browser, str(running.client.base_url).rstrip("/")) as seen,
    ):
        seen.score("1+1=", "2", "3")
        assert seen.page.locator("#signal option").all_inner_texts() == ["value"]
        assert seen.page.locator("#reference").is_hidden()
        assert "token head" in seen.page.inner_text("#meaning")
        assert seen.page.inner_text("#notes") == ""
        assert seen.faults == []


def test_with_keys_the_page_asks_for_one_and_opens_docs_and_metrics(browser: "Browser", tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps([{"name": "browser", "key": KEY}]))
    with served(api_keys_file=file) as running:
        address = str(running.client.base_url).rstrip("/")
        with visit(browser, address, "/health") as seen:
            seen.page.goto(address)
            seen.page.fill("#key", KEY)
            seen.page.click("#access button")
            seen.ready()
            seen.score("2+2=", "4")
            assert seen.page.locator(".t").count() == 2
            seen.page.click("#metrics")
            seen.page.wait_for_selector("#metrics-view[open]")
            assert "dense_reward_ready" in seen.page.inner_text("#metrics-text")
            seen.page.click("#metrics-close")
            seen.page.click("text=API docs")
            seen.page.wait_for_selector(".opblock")
            assert seen.faults == []
