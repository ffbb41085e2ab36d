import json

import pytest
import torch


@pytest.fixture
def checkpoint(toy):
    from medrl.core.checkpoint import write_checkpoint

    folder = toy / "run" / "checkpoints"
    folder.mkdir(parents=True)
    meta = {"method": "toy", "step": 7, "label_names": {"background": 0, "liver": 1}, "config": {"lr": 1.0}}
    for name in ("last.pt", "step_000005.pt"):
        write_checkpoint(folder / name, {"student": {"w": torch.zeros(3, 2)}}, meta)
    return folder / "last.pt"


def test_info_shows_method_step_labels_and_size(medrl, checkpoint):
    facts = json.loads(medrl("model", "info", checkpoint, "--json").out)
    assert (facts["method"], facts["step"], facts["objects"]) == ("toy", 7, {"student": 6})
    text = medrl("model", "info", "run").err
    assert "background 0, liver 1" in text
    assert "student (6 numbers)" in text


def test_verify_looks_at_every_checkpoint_of_a_run(medrl, checkpoint):
    answer = medrl("model", "verify", "run")
    assert (answer.code, answer.err.count("intact")) == (0, 2)


def test_verify_finds_a_flipped_bit_and_is_exit_code_4(medrl, checkpoint):
    content = bytearray(checkpoint.read_bytes())
    content[100] ^= 1
    checkpoint.write_bytes(content)
    answer = medrl("model", "verify", "run", "--json")
    assert answer.code == 4
    assert [item["ok"] for item in json.loads(answer.out)] == [False, True]
    assert "damaged" in medrl("model", "verify", checkpoint).err
    assert medrl("model", "info", checkpoint).code == 4


def test_a_file_of_another_program_is_exit_code_4(medrl, toy):
    torch.save({"w": torch.zeros(1)}, toy / "foreign.pth")
    assert medrl("model", "info", "foreign.pth").code == 4
    assert medrl("model", "verify", "nowhere.pt").code == 4


def test_the_cache_is_shown_and_cleaned(medrl, toy):
    import numpy as np

    from medrl.core.cache import Cache, make_key

    Cache(toy / "cache").put(make_key("00", {}, "1"), {"x": np.zeros(10)}, {})
    facts = json.loads(medrl("cache", "info", "--dir", "cache", "--json").out)
    assert facts["entries"] == 1
    assert facts["bytes"] > 80
    assert medrl("cache", "clean", "--dir", "cache", "--unused-days", 1).code == 0
    assert json.loads(medrl("cache", "info", "--dir", "cache", "--json").out)["entries"] == 1
    assert "removed 1 entries" in medrl("cache", "clean", "--dir", "cache").err
    assert json.loads(medrl("cache", "info", "--dir", "cache", "--json").out)["entries"] == 0
