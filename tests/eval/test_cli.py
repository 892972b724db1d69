"""The command line: output channels, help, and errors before anything is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dit_sparse.cli import app
from dit_sparse.eval import compare

runner = CliRunner()
TINY = ["--steps", "2", "--height", "32", "--width", "32", "--frames", "4", "--device", "cpu"]


@pytest.fixture
def no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("the pipeline was loaded")

    monkeypatch.setattr(compare, "load_pipeline", fail)


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch, pipe: Any) -> None:
    monkeypatch.setattr(compare, "load_pipeline", lambda *args: pipe)


def test_json_is_alone_on_stdout(tiny_model: None, tmp_path: Path) -> None:
    arguments = ["compare", *TINY, "--json", "--output", str(tmp_path), "--prompt", "a heart"]
    result = runner.invoke(app, [*arguments, "--methods", "noise-floor,adaspa"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert [run["method"] for run in report["runs"]] == ["dense", "noise-floor", "adaspa"]
    assert "PSNR" in result.stderr


def test_table_and_paths(tiny_model: None, tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("a heart\n\na star\n")
    arguments = ["compare", *TINY, "--output", str(tmp_path / "out"), "--prompts", str(file)]
    result = runner.invoke(app, [*arguments, "--methods", "adaspa:sparsity=0.5"])
    assert result.exit_code == 0, result.output
    for text in ("adaspa:sparsity=0.5", "a star", "PSNR", "report.html", "report.json"):
        assert text in result.stdout
    assert "4 frames" not in result.stdout and "steps 2" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "nothing"], "noise-floor"),
        (["--methods", "adaspa:sparsity=2"], "sparsity"),
        (["--frames", "15"], "even number"),
        (["--prompts", "absent.txt"], "absent.txt"),
        (["--dtype", "int8"], "bfloat16"),
        (["--model", "/absent/folder"], "model_index.json"),
        (["--prompt", " "], "prompt"),
        (["--prompt", "a dog bouncing"], "does not know the word 'dog'"),
    ],
)
def test_errors(
    no_load: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["compare", "--device", "cpu", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.output
    assert result.stdout == ""


def test_a_pipeline_that_knows_no_word_of_the_caption(tiny_model: None, tmp_path: Path) -> None:
    arguments = ["compare", *TINY, "--output", str(tmp_path), "--model", "some/emoji"]
    result = runner.invoke(app, [*arguments, "--methods", "adaspa", "--prompt", "dog"])
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "got 'dog'; use for example a, heart, star" in " ".join(result.stderr.split())


def test_an_empty_prompts_file(no_load: None, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    result = runner.invoke(app, ["compare", "--prompts", str(tmp_path / "empty.txt")])
    assert result.exit_code == 2 and "caption a line" in result.stderr


def test_help_documents_the_report() -> None:
    result = runner.invoke(app, ["compare", "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    for key in ("psnr_clip", "identical_frames", "cache_mb", "attention_s", "schema_version"):
        assert key in result.stdout


def test_methods_lists_methods() -> None:
    result = runner.invoke(app, ["methods"], env={"COLUMNS": "160"})
    assert result.exit_code == 0
    assert "adaspa" in result.stdout and "sparsity=0.8" in result.stdout


def test_commands_word_the_options_that_they_share_alike() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    helps = {
        name: {option.name: option.help for option in commands[name].params}
        for name in ("compare", "search", "search-mminference")
    }
    shared = set.intersection(*map(set, helps.values())) - {"prompt", "output"}
    assert len(shared) == 10
    for option in shared:
        assert len({found[option] for found in helps.values()}) == 1, option


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, dit_sparse.cli; sys.exit(bool({'torch', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
