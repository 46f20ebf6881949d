"""Both commands explain themselves: a missing extra, help that imports little, examples that work, completion."""

import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from dense_reward.cli import main as service_main
from dense_reward.command_line.arguments import EXAMPLES as SERVICE_EXAMPLES
from dense_reward.command_line.arguments import parser as service_parser
from dense_reward_trainer.cli import main as trainer_main
from dense_reward_trainer.commands import EXAMPLES as TRAINER_EXAMPLES
from dense_reward_trainer.commands import JOBS
from dense_reward_trainer.commands import parser as trainer_parser
from shell_command import resolve

ROOT = Path(__file__).resolve().parents[1]
CORE = ("httpx2", "numpy", "pydantic")
MAINS = {"dense-reward": "dense_reward.cli", "dense-reward-train": "dense_reward_trainer.cli"}
EXTRAS = {"dense-reward": "serve", "dense-reward-train": "train"}
PARSERS = {"dense-reward": service_parser, "dense-reward-train": trainer_parser}
LIBRARIES = {"numpy", "httpx2", "pydantic", "pydantic_settings", "yaml"} | {"torch", "transformers", "tokenizers"}
LIBRARIES |= {"fastapi", "uvicorn", "huggingface_hub", "shtab", "matplotlib", "datasets", "trl"}
SUBCOMMANDS = [
    *(("dense-reward", command) for command in SERVICE_EXAMPLES),
    *(("dense-reward-train", job) for job in TRAINER_EXAMPLES),
]
WITH_SETTINGS = {"serve", "check", "score"}


@pytest.fixture(scope="module")
def core_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of libraries as `pip install .` leaves it: the core alone, and this distribution with its metadata."""
    site = tmp_path_factory.mktemp("site")
    waiting, seen = list(CORE), set()
    while waiting:
        if (name := waiting.pop()) in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        waiting += [line.split(";")[0].strip().split(">")[0].split("=")[0] for line in distribution.requires or []
                    if ";" not in line]  # fmt: skip
        for part in {file.parts[0] for file in distribution.files or [] if ".." not in file.parts}:
            if not (site / part).exists():
                (site / part).symlink_to(Path(str(distribution.locate_file(part))))
    for package in ("dense_reward", "dense_reward_start"):
        (site / package).symlink_to(ROOT / "service" / package)
    (site / "dense_reward_trainer").symlink_to(ROOT / "trainer" / "dense_reward_trainer")
    info = site / "dense_reward-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(str(importlib.metadata.metadata("dense-reward")))
    (info / "direct_url.json").write_text(json.dumps({"url": ROOT.as_uri(), "dir_info": {}}))
    return site


def run_in(site: Path, command: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """The command in a fresh process that finds the libraries of this folder and no others."""
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from {MAINS[command]} import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("dense-reward", ("serve", "--run", "runs/demo")),
        ("dense-reward", ("serve", "--help")),
        ("dense-reward", ("adopt", "run/final")),
        ("dense-reward-train", ("sft", "arithmetic_sft")),
        ("dense-reward-train", ("report", "runs")),
    ],
)
def test_without_its_extra_a_command_names_it_and_the_line_that_installs_it(
    core_site: Path, command: str, arguments: Sequence[str]
) -> None:
    done = run_in(core_site, command, *arguments)
    assert done.returncode == 2
    first, install = done.stderr.splitlines()
    assert first.startswith(f"{command} needs the extra `{EXTRAS[command]}`, which is not installed here (")
    python, *words = shlex.split(install)
    assert python == sys.executable
    assert words[:3] == ["-m", "pip", "install"]
    assert words[-1] == f"{ROOT}[{EXTRAS[command]}]"
    assert Path(words[words.index("-c") + 1]).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("command", MAINS)
def test_without_its_extra_a_command_still_shows_its_help_and_then_says_what_is_missing(
    core_site: Path, command: str
) -> None:
    done = run_in(core_site, command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {command} ")
    assert f"needs the extra `{EXTRAS[command]}`" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", MAINS)
def test_help_imports_no_library_that_it_does_not_show(command: str) -> None:
    """Of all subcommands; only those with settings as flags need pydantic, which holds the settings."""
    names = [["--help"], *([name, "--help"] for one, name in SUBCOMMANDS if one == command)]
    names.sort(key=lambda words: (words[0] in WITH_SETTINGS, words[0] == "score"))
    code = (
        f"import contextlib, io, json, sys; from {MAINS[command]} import main; seen = {{}}\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        main(words)\n"
        "    seen[words[0]] = [name for name in sys.modules if '.' not in name]\n"
        "print(json.dumps(seen))"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(names)], capture_output=True, text=True, check=True)
    for subcommand, modules in json.loads(done.stdout).items():
        allowed = {"pydantic", "pydantic_settings"} if subcommand in WITH_SETTINGS else set()
        allowed |= {"numpy"} if subcommand == "score" else set()  # its arrays are named where they are defined
        assert not (LIBRARIES - allowed) & set(modules), subcommand


@pytest.mark.parametrize(("command", "subcommand"), SUBCOMMANDS)
def test_the_help_of_a_subcommand_ends_with_its_examples(
    command: str, subcommand: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        (service_main if command == "dense-reward" else trainer_main)([subcommand, "--help"])
    shown = capsys.readouterr().out
    examples = (SERVICE_EXAMPLES if command == "dense-reward" else TRAINER_EXAMPLES)[subcommand]
    assert shown.endswith("examples:\n" + "".join(f"  {line}\n" for line in examples))


@pytest.mark.parametrize("line", [line for lines in (*SERVICE_EXAMPLES.values(), *TRAINER_EXAMPLES.values())
                                  for line in lines])  # fmt: skip
def test_an_example_is_a_command_that_can_be_run(line: str) -> None:
    resolve(line)


def test_every_subcommand_has_examples() -> None:
    assert set(service_parser().subcommands()) == set(SERVICE_EXAMPLES)
    assert set(trainer_parser().subcommands()) == set(TRAINER_EXAMPLES) == {*JOBS, "report"}


@pytest.mark.parametrize(
    ("main", "typed", "cure"),
    [
        (service_main, "serv", "did you mean serve?"),
        (service_main, "serve --runs a", "did you mean --run?"),
        (service_main, "adopt a --role refrence", "did you mean reference?"),
        (service_main, "", "dense-reward --help lists them"),
        (trainer_main, "sfft a", "did you mean sft?"),
        (trainer_main, "sft", "are required: config"),
        (trainer_main, "sft arithmetic_sft --skipbad", "did you mean --skip-bad?"),
        (trainer_main, "sft arithmetic_sft --epochs=2", "are typed without dashes: epochs=2"),
    ],
)
def test_a_slip_is_answered_with_the_usage_of_the_subcommand_and_the_cure(
    main: Callable[[Sequence[str]], int], typed: str, cure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(typed.split())
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].endswith(cure)
    program, *subcommand = lines[-1].partition(": ")[0].split()
    assert lines[0].startswith(f"usage: {' '.join([program, *subcommand])} ")


@pytest.mark.parametrize(
    ("typed", "cure"),
    [
        ("sft arithmetic_stf", "Did you mean arithmetic_sft?"),
        ("dpr arithmetic_sft", "is a recipe of another job than dpr. Recipes: arithmetic_dpr"),
        ("sft .", "is a folder: name a YAML file or a recipe"),
        ("sft arithmetic_sft epochs 2", "such as epochs=2"),
    ],
)
def test_a_wrong_recipe_or_override_is_one_line_with_the_cure(
    typed: str, cure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trainer_main(typed.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert cure in line


BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
$(complete -p "$1" | sed 's/.*-F \\([^ ]*\\).*/\\1/') "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
COMPLETED = [
    ("dense-reward-train s", {"sft", "sweep", "sample"}),
    ("dense-reward-train sft arithmetic", {"arithmetic_sft", "arithmetic_sft_tiny"}),
    ("dense-reward-train gradient dpr", {"dpr_full"}),
    ("dense-reward-train sft sft_full --str", {"--strategy"}),
    ("dense-reward-train sft sft_full --strategy z", {"zero3"}),
    ("dense-reward s", {"serve", "score", "stats"}),
    ("dense-reward adopt --role ref", {"reference"}),
    ("dense-reward serve --engine v", {"vllm"}),
]


def completion(command: str, shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The script that the command prints, in a file."""
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as ended:
        (service_main if command == "dense-reward" else trainer_main)(["--print-completion", shell])
    assert ended.value.code in {None, 0}
    file = folder / f"{command}.{shell}"
    file.write_text(capsys.readouterr().out)
    return file


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("command", MAINS)
def test_a_completion_script_is_valid(
    command: str, shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    script = completion(command, shell, tmp_path, capsys)
    done = subprocess.run([shell, "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(("typed", "expected"), COMPLETED)
def test_bash_completes_jobs_recipes_flags_and_choices(
    typed: str, expected: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = completion(typed.split(maxsplit=1)[0], "bash", tmp_path, capsys)
    command = ["bash", "-c", BASH, "bash", str(script), *typed.split(" ")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert set(done.stdout.split()) == expected


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
@pytest.mark.parametrize(("typed", "expected"), COMPLETED)
def test_fish_completes_jobs_recipes_flags_and_choices(
    typed: str, expected: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = completion(typed.split(maxsplit=1)[0], "fish", tmp_path, capsys)
    command = ["fish", "--no-config", "-c", f"source {script}; complete -C '{typed}'"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    assert {line.partition("\t")[0] for line in done.stdout.splitlines()} == expected
