"""What ``medrl plugins list|info|doctor`` tell: version, API, what is added, time, and why one is broken."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_the_list_tells_what_each_plugin_adds(medrl):
    facts = {item["name"]: item for item in json.loads(medrl("plugins", "list", "--json").out)}
    toy = facts["toy"]
    assert (toy["version"], toy["api"], toy["distribution"]) == ("1.2", 1, "medrl-toy")
    assert toy["parts"] == {"models": 2}
    assert toy["commands"] == ["train", "predict", "demo"]
    assert toy["tools"] == 1
    assert toy["load_s"] > 0.0
    assert facts["wreck"]["api"] is None
    err = medrl("plugins", "list").err
    assert "train, predict, demo, 2 models, 1 tool" in err
    assert "broken: wreck of " in err
    assert "wreckage" in err


def test_listing_plugins_imports_neither_torch_nor_commands(toy):
    code = (
        "import sys; from medrl.cli.main import run; run(['plugins', 'list', '-q']); "
        "print(sorted({'torch', 'numpy', 'medrl_toy.commands'} & set(sys.modules)))"
    )
    path = str(Path(__file__).parent / "toy")
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_info_tells_api_and_observers(medrl):
    facts = json.loads(medrl("plugins", "info", "toy", "--json").out)
    assert (facts["api"], facts["observes"]) == (1, [])


def test_doctor_finds_the_broken_plugin_and_says_what_mends_it(medrl):
    answer = medrl("plugins", "doctor")
    assert answer.code == 5
    assert "wreckage" in answer.err
    assert "do: pip install" in answer.err
    found = json.loads(medrl("plugins", "doctor", "--json").out)
    assert [item["state"] for item in found if "wreck" in item["what"]] == ["problem"]
