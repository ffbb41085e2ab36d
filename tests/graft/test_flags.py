"""Every flag of the original: live ones set a config value, dead ones say in one line what to use instead."""

from __future__ import annotations

import json

import click
import pytest

from medrl.cli.main import run as run_command_line
from medrl.core.config import known_keys, parse_yaml
from medrl.core.jobs import ConfigOption
from medrl.plugins.graft import commands, data, train
from medrl.plugins.graft.config import GraftConfig
from medrl.plugins.graft.flags import ARCHITECTURES, RETIRED
from medrl.plugins.graft.lengths import in_steps, steps_per_epoch

LIVE = {
    "--arch fullres_3d_unet": ("model.name", "graft.fullres"),
    "--epochs 240": ("epochs.total", 240),
    "--batch-size 64": ("train.batch_size", 64),
    "--wd 1e-4": ("train.weight_decay", 1e-4),
    "--weight-decay 1e-4": ("train.weight_decay", 1e-4),
    "--workers 8": ("train.workers", 8),
    "--seed 5": ("train.seed", 5),
    "--gpu 1": ("train.device", "cuda:1"),
    "--dynamic": ("agent.dynamic", True),
    "--ce-weight 1.5": ("loss.weight", 1.5),
    "--kd-weight 2": ("distill.logit_weight", 2.0),
    "--feat-weight 5": ("distill.feature_weight", 5.0),
    "--epochs 240 --milestones 150 180 210": ("epochs.milestones", [150, 180, 210]),
    "--init-lr 0.05": ("train.lr", 0.05),
    "--lr-type multistep": ("optim.schedule", "multistep"),
    "--warmup-epochs 3": ("epochs.ramp", 3),
    "--use-orthogonal": ("distill.projection", "orthogonal"),
    "--kd-T 3": ("distill.temperature", 3.0),
    "--kd-loss-type contrastive": ("distill.logit_loss", "contrastive"),
    "--agent-step 1000": ("agent.step_every", 1000),
    "--agent-lr 0.001": ("agent.lr", 0.001),
    "--agent-warmup-epochs 5": ("epochs.agent_warmup", 5),
    "--use-episode-reward": ("agent.terminal", True),
    "--reward-gamma 0.9": ("agent.gamma", 0.9),
    "--agent-update-interval 50": ("agent.interval", 50),
    "--batches-per-epoch 100": ("epochs.batches", 100),
    "--reward-alpha 0.6": ("agent.reward_alpha", 0.6),
    "--use-disagreement-reward": ("agent.disagreement", True),
    "--no-accuracy-gated-diversity": ("agent.gated_diversity", False),
    "--fp16": ("train.precision", "fp16"),
    "--bf16": ("train.precision", "bf16"),
    "--gradient-accumulation-steps 2": ("train.accumulate", 2),
    "--overfit-batches 4": ("split.overfit_batches", 4),
    "--val-mode train": ("validation.mode", "train"),
    "--val-subset-size 20": ("validation.max_cases", 20),
    "--use-loss-balancing": ("loss.balance", True),
    "--loss-balance-momentum 0.8": ("loss.balance_momentum", 0.8),
    "--loss-balance-warmup 7": ("loss.balance_warmup", 7),
    "--use-fixed-subset-sampler": ("split.fixed_subsets", True),
    "--distill-features neg1 neg2": ("distill.taps", ["neg1", "neg2"]),
    "--distill-features neg2": ("distill.taps", ["neg2"]),
    "--neg2-weight 0.5": ("distill.neg2_weight", 0.5),
    "--use-feature-masking": ("distill.mask_features", True),
    "--mask-dilation-radius 5": ("distill.mask_dilation", 5),
    "--use-deep-supervision": ("loss.deep_supervision", True),
    "--use-region-based-training": ("target.kind", "regions"),
    "--use-mild-focal": ("loss.focal", "mild"),
    "--use-sharp-focal": ("loss.focal", "sharp"),
    "--use-high-sensitivity": ("loss.focal", "high_sensitivity"),
    "--early-stopping": ("validation.early_stopping", True),
    "--early-stopping-patience 9": ("validation.patience", 9),
    "--early-stopping-min-delta 0.01": ("validation.min_delta", 0.01),
    # names of the specification that the original lacks
    "--weighting meta": ("weighting.mode", "meta"),
    "--weighting-prior quality": ("weighting.prior", "quality"),
    "--policy-update reinforce": ("weighting.mode", "reinforce"),
    "--random-reward": ("agent.random_reward", True),
    "--reward-split 0.2": ("split.reward", 0.2),
    "--reward-every 3": ("agent.reward_every", 3),
    "--feat-loss cosine": ("distill.feature_loss", "cosine"),
    "--grad-clip 0": ("train.clip_norm", 0.0),
    "--normalization volume": ("sample.normalization", "volume"),
    "--init-scope encoder": ("optim.init_scope", "encoder"),
    "--teacher-source live": ("teachers.source", "live"),
    "--teacher-oof mean": ("teachers.oof", "mean"),
    "--unlabelled-from-test": ("split.unlabelled_from_test", True),
}
"""Command lines with live flags, and the config value that each must set."""

DEAD = {
    "--dataset": "pimed",
    "--lr": "0.1",
    "--learning-rate": "0.1",
    "--momentum": "0.9",
    "--start-epoch": "0",
    "--print-freq": "10",
    "--evaluate": "",
    "--pretrained": "",
    "--dummy": "",
    "--rank": "-1",
    "--world-size": "-1",
    "--local-rank": "-1",
    "--dist-url": "tcp://224.66.41.62:23456",
    "--dist-backend": "nccl",
    "--multiprocessing-distributed": "",
    "--feat-kd": "mse",
    "--use-robust-loss": "",
    "--contrastive-margin": "0.5",
    "--logits-actions": "",
    "--load-neg2": "",
    "--cache-features": "",
    "--cache-size": "300",
    "--checkpoint-dir": "./checkpoint",
    "--trial": "1",
    "--innovation-suffix": "5fold",
    "--teacher-name-list": "fold0 fold1 fold2",
}
"""Flags without effect, with a value as the original's scripts give it."""

SCRIPT = """--arch fullres_3d_unet --dataset pimed --checkpoint-dir ./checkpoint_5fold_201 --batch-size 2
--gradient-accumulation-steps 2 --teacher-name-list fold0 fold1 fold2 fold3 fold4 --workers 4 --epochs 200
--kd-loss-type kl --use-episode-reward --reward-gamma 0.95 --reward-alpha 0.7 --use-disagreement-reward
--agent-step 200 --agent-warmup-epochs 1 --agent-update-interval 50 --batches-per-epoch 9999 --bf16
--init-lr 0.001 --lr-type cosine --milestones 50 75 --ce-weight 1 --kd-weight 0 --feat-weight 1
--innovation-suffix 5fold_ensemble_binary_focal_201_neg1 --kd-T 4 --print-freq 50
--multiprocessing-distributed --dist-backend nccl --dist-url env:// --world-size 1 --use-orthogonal
--use-deep-supervision --use-region-based-training --distill-features neg1"""
"""The arguments of the published run script but for its YAML file."""


SPECIFIED = """arch dataset data-configs workers epochs start-epoch batch-size lr momentum wd print-freq
resume seed gpu rank world-size local-rank dist-url dist-backend multiprocessing-distributed evaluate
pretrained dummy dynamic ce-weight kd-weight feat-weight milestones init-lr lr-type warmup-epochs
feat-kd use-orthogonal use-robust-loss kd-T kd-loss-type contrastive-margin agent-step agent-lr
agent-warmup-epochs use-episode-reward reward-gamma agent-update-interval batches-per-epoch
logits-actions reward-alpha use-disagreement-reward no-accuracy-gated-diversity checkpoint-dir
teacher-name-list fp16 bf16 gradient-accumulation-steps trial overfit-batches val-mode
val-subset-size selected-cases use-loss-balancing loss-balance-momentum loss-balance-warmup
cache-features cache-size use-fixed-subset-sampler innovation-suffix load-neg2 distill-features
neg2-weight use-feature-masking mask-dilation-radius use-deep-supervision use-region-based-training
use-mild-focal use-sharp-focal use-high-sensitivity early-stopping early-stopping-patience
early-stopping-min-delta"""
"""Names of the flags in the specification, §6."""


@pytest.fixture
def medrl(capsys):
    """Run medrl in this process; return exit code, stdout and stderr."""

    def call(*arguments):
        code = run_command_line([str(item) for item in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def printed(medrl, line):
    code, out, err = medrl("train", "graft", *line.split(), "--print-config")
    assert code == 0, err
    return parse_yaml(out), err


def value_of(config, key):
    for part in key.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("line", LIVE)
def test_every_live_flag_sets_its_value(medrl, line):
    config, err = printed(medrl, line)
    key, expected = LIVE[line]
    assert value_of(config, key) == expected
    assert "changes nothing" not in err


@pytest.mark.parametrize("name", DEAD)
def test_every_dead_flag_is_accepted_with_one_line_that_says_what_to_use(medrl, name):
    plain, _ = printed(medrl, "")
    config, err = printed(medrl, f"{name} {DEAD[name]}")
    assert config == plain
    lines = [line for line in err.splitlines() if "changes nothing here" in line]
    assert lines == [f"warning: {name} changes nothing here: {RETIRED[name][1]}"]


def test_every_flag_of_the_specification_is_known():
    names = SPECIFIED.split()
    from medrl.cli.options import train_options

    known = {opt for item in (*commands.train.params, *train_options()) for opt in item.opts}
    assert [name for name in names if f"--{name}" not in known] == []
    assert len(names) == 78
    tried = {word for line in LIVE for word in line.split() if word.startswith("--")} | set(DEAD)
    assert {f"--{name}" for name in names} - tried == {"--resume", "--data-configs", "--selected-cases"}


def test_dead_flags_are_not_in_the_help_and_live_ones_are(medrl):
    code, out, _ = medrl("train", "graft", "--help")
    assert code == 0
    words = set(out.replace(",", " ").split())
    assert not set(RETIRED) & words
    assert {line.split()[0] for line in LIVE} <= words
    assert set(RETIRED) == set(DEAD)


def test_the_published_script_runs_with_its_own_words(medrl):
    config, err = printed(medrl, SCRIPT)
    assert config["model"]["name"] == "graft.fullres"
    assert config["epochs"] == {
        "total": 200,
        "batches": 9999,
        "ramp": None,
        "milestones": [50, 75],
        "agent_warmup": 1,
    }
    assert config["train"]["precision"] == "bf16"
    assert config["distill"]["taps"] == ["neg1"]
    assert err.count("changes nothing here") == 9


def test_the_method_may_stand_behind_an_option_that_takes_several_words(medrl):
    code, out, _ = medrl("train", "--distill-features", "neg1", "neg2", "graft", "--print-config")
    assert code == 0
    assert parse_yaml(out)["distill"]["taps"] == ["neg1", "neg2"]
    code, out, _ = medrl(
        "train", "graft", "--epochs", "9", "--milestones", "3", "--milestones", "5", "--print-config"
    )
    assert parse_yaml(out)["epochs"]["milestones"] == [3, 5]


def test_of_the_focal_flags_high_sensitivity_counts_before_mild_before_sharp(medrl):
    for line, expected in (
        ("--use-high-sensitivity --use-mild-focal --use-sharp-focal", "high_sensitivity"),
        ("--use-mild-focal --use-sharp-focal", "mild"),
        ("--use-sharp-focal", "sharp"),
    ):
        assert printed(medrl, line)[0]["loss"]["focal"] == expected


def test_a_cohort_file_and_selected_cases_are_paths(medrl, tmp_path):
    (tmp_path / "cases.json").write_text('{"case_ids": ["a"]}')
    config, _ = printed(
        medrl, f"--data-configs {tmp_path / 'c.yaml'} --selected-cases {tmp_path / 'cases.json'}"
    )
    assert config["data"]["root"] == str(tmp_path / "c.yaml")
    assert config["split"]["selected_cases"] == str(tmp_path / "cases.json")


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES.values())))
def test_every_network_of_the_original_names_one_that_is_registered(manager, name):
    assert name in manager.registry("models").keys()  # noqa: SIM118 - no mapping


def test_a_network_that_does_not_exist_is_told(medrl):
    code, _, err = medrl("train", "graft", "--arch", "resnet18_imagenet", "--print-config")
    assert code == 2
    assert "no 'resnet18_imagenet'" in err


@pytest.mark.parametrize("line", ["--gpu one", "--milestones x", "--kd-loss-type cosine", "--epochs 0"])
def test_wrong_values_are_refused(medrl, line):
    code, _, err = medrl("train", "graft", *line.split(), "--print-config")
    assert code == 2
    assert line.split()[0] in err


def test_every_option_names_a_config_key_and_explains_itself():
    keys = known_keys(GraftConfig)
    for item in commands.train.params:
        assert isinstance(item, click.Option)
        assert item.help, item.opts
        if isinstance(item, ConfigOption):
            assert item.config_key in keys


# -- what the values do ----------------------------------------------------------------------------


def config(**values):
    return GraftConfig.model_validate({"method": "graft", **values})


def test_epochs_are_counted_in_batches_that_see_each_case_once():
    one = config(train={"batch_size": 2, "accumulate": 2})
    assert steps_per_epoch(one, labelled=10, unlabelled=0) == 3
    assert steps_per_epoch(one, labelled=10, unlabelled=0, world_size=2) == 2
    assert steps_per_epoch(one, labelled=4, unlabelled=9) == 5  # one of each in a batch, nine batches
    few = config(train={"batch_size": 2}, epochs={"batches": 3})
    assert steps_per_epoch(few, labelled=10, unlabelled=0) == 3
    assert steps_per_epoch(few, labelled=4, unlabelled=0) == 2


def test_lengths_in_epochs_replace_those_in_steps():
    given = config(
        train={"max_steps": 7},
        optim={"ramp": 9, "milestones": [0.5]},
        agent={"warmup": 5},
        epochs={"total": 240, "ramp": 2, "milestones": [150, 180, 210], "agent_warmup": 0},
    )
    found = in_steps(given, 10)
    assert found.train.max_steps == 2400
    assert found.optim.ramp == 20
    assert found.optim.milestones == (0.625, 0.75, 0.875)
    assert found.agent.warmup == 0
    plain = config(train={"max_steps": 7})
    assert in_steps(plain, 10) is plain


def fit(job, change=None):
    with job.runtime() as rt:
        found = data.load(rt, job.config)
        if change is not None:
            change(found)
        train.fit(rt, job.config, found)
    return job.run_dir


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_of_two_epochs_has_twice_the_steps_of_one(make_job, tmp_path):
    over = {"epochs": {"total": 2}, "train": {"batch_size": 2, "max_steps": 99}}
    run = fit(make_job(tmp_path / "run", over))
    rows = records(run)
    assert max(row["step"] for row in rows) == 4
    assert [row["epoch"] for row in rows if "val_dice" in row] == [1, 2]


def test_an_agent_that_warms_up_for_all_epochs_is_off(make_job, tmp_path, features):
    over = {
        "teachers": {"features": [str(features)]},
        "weighting": {"mode": "reinforce", "prior": "uniform"},
        "epochs": {"total": 2, "agent_warmup": 2},
        "split": {"reward": 0.4},
    }
    kept = []
    run = fit(make_job(tmp_path / "run", over), kept.append)
    assert kept[0].reward == ()
    assert len(kept[0].labelled) == 4
    assert {row["weights_neg1/teacher_0"] for row in records(run) if "loss" in row} == {0.5}


def test_training_may_be_limited_to_selected_cases_or_a_few_batches(make_job, tmp_path):
    names = ["prostate_001", "prostate_004"]
    kept = []
    everything = make_job(tmp_path / "a")
    fit(everything, kept.append)
    known = [case.id for case in kept[0].labelled]
    names = known[1:3]
    for content in (names, {"case_ids": names, "description": "two cases"}):
        path = tmp_path / "cases.json"
        path.write_text(json.dumps(content))
        fit(make_job(tmp_path / f"run{len(kept)}", {"split": {"selected_cases": str(path)}}), kept.append)
        assert [case.id for case in kept[-1].labelled] == names
    fit(make_job(tmp_path / "few", {"split": {"overfit_batches": 2}}), kept.append)
    assert [case.id for case in kept[-1].labelled] == known[:2]
    for content in ("[", '{"cases": []}', '["nobody"]'):
        (tmp_path / "cases.json").write_text(content)
        job = make_job(tmp_path / "bad", {"split": {"selected_cases": str(tmp_path / "cases.json")}})
        with pytest.raises(Exception, match=r"split.selected_cases .*cases.json"):
            fit(job)


def test_fixed_subsets_train_and_resume(make_job, tmp_path, monkeypatch):
    over = {"split": {"fixed_subsets": True}, "train": {"max_steps": 4, "checkpoint_every": 2}}
    straight = fit(make_job(tmp_path / "straight", over))
    original = train.set_rate

    def fall(optimizer, cfg, step):
        if step == 4:
            raise KeyboardInterrupt
        return original(optimizer, cfg, step)

    with monkeypatch.context() as patch:
        patch.setattr(train, "set_rate", fall)
        with pytest.raises(KeyboardInterrupt):
            fit(make_job(tmp_path / "fell", over))
    fell = fit(make_job(tmp_path / "fell", over))
    assert (fell / "metrics.jsonl").read_text() == (straight / "metrics.jsonl").read_text()
