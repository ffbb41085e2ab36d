"""The example observers, installed with pip: TensorBoard and MLflow read what they wrote of a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'medrl[log]'")
pytest.importorskip("mlflow", reason="mlflow-skinny is not installed: pip install mlflow-skinny")

ROOT = Path(__file__).resolve().parents[2]
PROJECTS = (
    ROOT / "examples" / "medrl-tensorboard",
    ROOT / "examples" / "medrl-mlflow",
    ROOT / "tests" / "plugin_host" / "fixtures" / "cine",
)


@pytest.fixture(scope="module")
def medrl(tmp_path_factory):
    """An environment with both observers and a small method; what they depend on is borrowed."""
    folder = tmp_path_factory.mktemp("observers")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    python = folder / "env" / "bin" / "python"
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    for project in PROJECTS:
        ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
        shutil.copytree(project, folder / project.name, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    pip += ["--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([*pip, *(str(folder / project.name) for project in PROJECTS)], check=True)
    work = folder / "work"
    work.mkdir()

    def call(*arguments, **environment):
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("MEDRL", "PYTHON", "MLFLOW"))
        }
        done = subprocess.run(
            [str(python), "-m", "medrl.cli", *map(str, arguments)],
            cwd=work,
            env={**clean, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done

    call.folder = work
    return call


@pytest.fixture(scope="module")
def run(medrl):
    """Two steps, and two more after a resume."""
    medrl("train", "cine", "-o", "runs/one", "--max-steps", 2, "--device", "cpu")
    medrl("resume", "runs/one", "--extend-to", 4)
    return medrl.folder / "runs" / "one"


@pytest.fixture
def records(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {item["step"]: item for item in map(json.loads, lines) if "loss" in item}


def test_tensorboard_reads_every_metric_of_both_parts_of_the_run(run, records):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "board"))
    board.Reload()
    assert {"loss", "reward", "entropy"} <= set(board.Tags()["scalars"])
    for name in ("loss", "reward"):
        found = {event.step: event.value for event in board.Scalars(name)}
        assert found == pytest.approx({step: item[name] for step, item in records.items()}, rel=1e-6)
    texts = {
        name: board.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()
        for name in ("config", "checkpoint", "outcome")
    }
    assert "method: cine" in texts["config"]
    assert ".pt" in texts["checkpoint"]
    assert texts["outcome"].strip() == "finished"


def test_mlflow_reads_one_finished_run_with_parameters_and_metrics(run, records, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(run.parent / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("cine")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.status, found.info.run_name) == ("FINISHED", "one")
    assert found.data.params["method"] == "cine"
    assert found.data.params["train.max_steps"] == "2"
    for name in ("loss", "reward"):
        history = {item.step: item.value for item in client.get_metric_history(found.info.run_id, name)}
        assert history == pytest.approx({step: item[name] for step, item in records.items()}, rel=1e-12)
    assert found.data.tags["medrl.checkpoint"].endswith("at step 4")


def test_an_observer_without_its_server_is_switched_off_and_the_run_goes_on(medrl):
    done = medrl(
        *("train", "cine", "-o", "runs/two", "--max-steps", "1", "--device", "cpu"),
        MLFLOW_TRACKING_URI="no-such-scheme://nowhere",
    )
    assert "its observers are off" in done.stderr
    assert done.stderr.count("plugin 'mlflow'") == 1
    assert json.loads((medrl.folder / "runs" / "two" / "manifest.json").read_text())["status"] == "finished"


def test_both_keep_the_rules_and_are_shown_with_version_and_distribution(medrl):
    facts = {item["name"]: item for item in json.loads(medrl("plugins", "list", "--json").stdout)}
    for name in ("tensorboard", "mlflow"):
        assert facts[name]["distribution"] == f"medrl-{name}"
        assert (facts[name]["version"], facts[name]["status"]) == ("1.0.0", "loaded")
        assert facts[name]["load_s"] < 1.0
        medrl("plugins", "check", name)
