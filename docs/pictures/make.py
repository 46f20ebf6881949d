"""`make heatmap-picture`: makes the README's picture, a screenshot of the demo's HTML heatmap.

Needs Chromium (or Chrome) on the PATH; trains the demo's pair if it does not exist yet.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dense_reward import Client, ScoreOptions
from dense_reward_trainer.jobs.demo import PAIR, RUN, example, train_pair
from dense_reward_trainer.runs.local_service import free_port, serving_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OFFLINE = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
WINDOW_PX = (900, 445)


def main() -> int:
    """Returns exit code 0 once the picture is written, 1 without a browser."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        print(f"none of {', '.join(BROWSERS)} is on the PATH: install one of them", file=sys.stderr)
        return 1
    train_pair()
    prompt, responses = example()
    options = ScoreOptions(model=PAIR)
    with serving_run(RUN, free_port()) as (_, url), Client(url) as client:
        html = client.heatmap([{"prompt": prompt, "responses": responses}], format="html", options=options)
    picture = Path(__file__).parent / "heatmap.png"
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "heatmap.html"
        page.write_text(html)
        size = ",".join(str(pixels) for pixels in WINDOW_PX)
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=2")
        target = (
            f"--window-size={size}",
            f"--user-data-dir={folder}/profile",
            f"--screenshot={picture}",
            page.as_uri(),
        )
        subprocess.run([browser, *flags, *OFFLINE, *target], check=True, stderr=subprocess.DEVNULL)
    print(f"written: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
