"""The rules that train: a new project keeps them; each defect is found, named and comes with an advice."""

from __future__ import annotations

import importlib.metadata
import itertools
import sys

import pytest

from medrl.cli.templates import write_project
from medrl.core.manager import PluginManager
from medrl.core.testing import RULES, Subject, check_plugin, check_rule, examine_rule

_numbers = itertools.count()


@pytest.fixture
def project(tmp_path, monkeypatch, no_policy):
    """Return a function that makes a new project importable, with parts of its text replaced."""
    names = []

    def make(*changes):
        name = f"probe{next(_numbers)}"
        names.append(name)
        folder = tmp_path / name
        write_project(name, folder)
        for file, before, after in changes:
            path = folder / f"medrl_{name}" / file
            text = path.read_text()
            assert before in text
            path.write_text(text.replace(before, after))
        info = folder / f"medrl_{name}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: medrl-{name}\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text(f"[medrl.plugins]\n{name} = medrl_{name}.plugin\n")
        monkeypatch.syspath_prepend(str(folder))
        return name

    yield make
    for module in [item for item in sys.modules if item.startswith(tuple(f"medrl_{name}" for name in names))]:
        del sys.modules[module]


def broken(name, *rules):
    """Check some rules and return what was found as ``(rule, what, do)``."""
    manager = PluginManager.create()
    with Subject(manager.load(name), manager) as subject:
        return [item for rule in rules for item in check_rule(rule, subject)]


def test_a_new_project_keeps_every_rule_but_that_of_ranks_which_the_tutorial_checks(project):
    name = project()
    assert [str(item) for item in check_plugin(name)] == []
    rest = [rule for rule in RULES if rule != "ranks"]
    assert [str(item) for item in broken(name, *rest)] == []


def test_a_network_that_is_never_stepped_is_found(project):
    name = project(
        (
            "train.py",
            "        rt.step(optimizer, clip_norm=cfg.train.clip_norm)\n",
            "        optimizer.zero_grad()\n",
        )
    )
    (found,) = broken(name, "learning")
    assert found.what == "no loss is lower after 6 steps than after the first: loss"
    assert "rt.backward called before rt.step" in found.do


def test_a_method_that_logs_no_loss_is_found(project):
    name = project(("train.py", "rt.log(step, loss=loss.detach(), **earned)", "rt.log(step, a=1)"))
    (found,) = broken(name, "learning")
    assert (found.what, found.do) == ("no record has a loss", "log it: rt.log(step, loss=loss)")


def test_a_loss_that_is_not_finite_is_found_with_the_words_of_the_runtime(project):
    name = project(("losses.py", "return -(log_p", "return float('nan') * -(log_p"))
    (found,) = broken(name, "learning")
    assert found.what.startswith("it could not be checked: non-finite loss 3 times in a row")


def test_a_run_that_fails_is_told_once_and_the_rules_that_need_it_say_so(project):
    name = project(("losses.py", "return -(log_p", "return 1 / 0 * -(log_p"))
    manager = PluginManager.create()
    with Subject(manager.load(name), manager) as subject:
        (found,) = examine_rule("learning", subject).findings
        assert found.what == "it could not be checked: ZeroDivisionError: division by zero"
        for rule in ("checkpoint", "resume", "ranks", "geometry"):
            outcome = examine_rule(rule, subject)
            assert (outcome.findings, outcome.skipped) == ([], "its training run failed, as said above")


def test_a_rule_that_does_not_apply_says_why(project):
    name = project(
        ("plugin.py", '    registry.add("threshold"', '    return\n    registry.add("threshold"'),
        ("plugin.py", '    commands.predict(', '    return\n    commands.predict('),
    )  # fmt: skip
    manager = PluginManager.create()
    with Subject(manager.load(name), manager) as subject:
        assert examine_rule("environments", subject).skipped == "it registers no environment"
        assert examine_rule("geometry", subject).skipped == "it has no predict command"
        subject.plugin.commands._recorder.main.clear()
        assert examine_rule("learning", subject).skipped == "it has no train command"


def test_weights_that_no_seed_decides_are_found(project):
    name = project(
        ("models.py", "        self.head = conv(width, out_channels, 1)\n",
         "        self.head = conv(width, out_channels, 1)\n"
         "        with torch.no_grad():\n"
         "            self.head.bias.copy_(torch.rand(out_channels, generator=_free()))\n"),
        ("models.py", "class SmallUNet", "def _free():\n"
         "    generator = torch.Generator()\n"
         "    generator.seed()\n"
         "    return generator\n\n\nclass SmallUNet"),
    )  # fmt: skip
    (found,) = broken(name, "checkpoint")
    assert found.what.startswith("two runs with one seed differ in agent")
    assert "medrl.core.rng" in found.do


def test_a_checkpoint_that_does_not_name_its_labels_is_found(project):
    name = project(("train.py", "label_names=dataset.labels, ", ""))
    (found,) = broken(name, "checkpoint")
    assert found.what == "it does not say label_names, which predictors need"
    assert found.do.startswith("rt.checkpoint.describe(label_names=")


def test_state_that_the_checkpoint_does_not_hold_is_found(project):
    name = project(
        ("train.py", "    for step in rt.steps(", "    drift = 1.0\n    for step in rt.steps("),
        ("train.py", "loss = parts.loss(logits, one_hot(labels, classes))",
         "drift *= 1.5\n                loss = drift * parts.loss(logits, one_hot(labels, classes))"),
    )  # fmt: skip
    (found,) = broken(name, "resume")
    assert found.what.startswith("stopped after step 3 and resumed, it differs in agent")
    assert "rt.checkpoint.register" in found.do


def test_a_loop_without_the_steps_of_the_runtime_is_found(project):
    name = project(
        ("train.py", "for step in rt.steps(rt.checkpoint.resume(), cfg.train.max_steps):",
         "rt.checkpoint.resume()\n    for step in range(1, cfg.train.max_steps + 1):"),
    )  # fmt: skip
    found = broken(name, "resume")
    assert [item.what for item in found] == ["the run could not be stopped between two steps"]


def test_segmentations_of_another_shape_are_found(project):
    name = project(
        ("predict.py", "torch.softmax(logits, dim=0).numpy()", "torch.softmax(logits, dim=0)[:, 1:].numpy()")
    )
    found = broken(name, "geometry")
    assert len(found) == 3
    assert all("the method returned probabilities of shape (4, 31, 32, 12)" in item.what for item in found)


def test_a_predict_command_that_returns_nothing_is_found(project):
    name = project(("commands.py", "    return run(job)", "    run(job)"))
    (found,) = broken(name, "geometry")
    assert "returned NoneType, not a PredictOutcome" in found.what
    assert found.do == "return job.run(load)"


def test_an_environment_that_breaks_the_rules_of_gymnasium_is_found(project):
    name = project(("env.py", "OBSERVATION,), np.float32)", "OBSERVATION + 1,), np.float32)"))
    found, *_ = broken(name, "environments")
    assert found.what == (
        f"{name}.threshold: gymnasium's checker: The first element returned by `env.reset()` is not within "
        "the observation space."
    )


def test_an_environment_that_needs_arguments_is_found(project):
    name = project(("env.py", "        turns: int = 3,\n", "        *,\n        turns: int,\n"))
    (found,) = broken(name, "environments")
    assert found.what == f"{name}.threshold cannot be built alone: missing parameter 'turns'"
    assert found.do.startswith("give every parameter besides num_envs a default")


@pytest.mark.ddp
def test_ranks_that_take_different_branches_are_found(project):
    name = project(
        ("train.py", "        rt.step(optimizer,",
         "        if rt.rank == 1:\n            rt.reduce(1.0)\n        rt.step(optimizer,"),
    )  # fmt: skip
    (found,) = broken(name, "ranks")
    assert found.what.startswith("two ranks do not train: 2 ranks: error:")
    assert found.do.endswith("decide every branch by values from rt.reduce")


def test_the_trial_data_of_a_plugin_are_taken(project):
    name = project(
        ("plugin.py", 'license=', 'trial=__package__ + ".data:trial",\n        license='),
        ("data.py", "def read(", '''def trial(folder):
    """Write synthetic data for trial runs."""
    from medrl.core.phantoms.prostate import write_prostate

    write_prostate(folder, cases=2, test_cases=1, shape=(16, 16, 6))
    return {"data": {"root": folder, "folds": 2}, "sample": {"size": [16, 16, 6]}}


def read('''),
    )  # fmt: skip
    manager = PluginManager.create()
    with Subject(manager.load(name), manager) as subject:
        assert check_rule("learning", subject) == []
        assert len(list(subject.trial.inputs.glob("*_0000.nii.gz"))) == 1
        config = (subject.trial.straight / "config.yaml").read_text()
    assert "- 16\n  - 16\n  - 6" in config


def test_the_version_of_the_project_is_what_is_installed(project):
    name = project()
    assert importlib.metadata.version(f"medrl-{name}") == "0.1.0"
