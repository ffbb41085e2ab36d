"""``medrl env list|check|play``."""

import json

SMALL = ("--set", "size=16", "--set", "cases=2", "--set", "budget=3")


def test_environments_are_listed_without_torch(medrl_process):
    answer = medrl_process("env", "list", "--json")
    names = {item["name"]: item["plugin"] for item in json.loads(answer.out)}
    assert names["kspace.lines"] == "kspace"
    assert "loading torch" not in answer.err


def test_the_parameters_of_one_are_shown_with_defaults(medrl):
    rows = {row["name"]: row for row in json.loads(medrl("env", "list", "kspace.lines", "--json").out)}
    assert rows["budget"] == {"name": "budget", "required": False, "default": 8}
    assert "num_envs" not in rows


def test_the_environment_of_lines_keeps_the_rules(medrl):
    answer = medrl("env", "check", "kspace.lines", *SMALL)
    assert (answer.code, answer.err.split()[-2:]) == (0, ["ok", "kspace.lines"])


def test_greedy_is_better_than_random_and_play_repeats(medrl):
    def returns(policy):
        call = ("env", "play", "kspace.lines", "--policy", policy, "--episodes", 2, *SMALL, "--json")
        return [episode["return"] for episode in json.loads(medrl(*call).out)["episodes"]]

    random, greedy = returns("random"), returns("greedy")
    assert random == returns("random")
    assert sum(greedy) > sum(random)


def test_steps_are_shown_one_by_one(medrl):
    err = medrl("env", "play", "kspace.lines", "--episodes", 1, "--steps", *SMALL).err
    assert "action" in err
    assert "mean return" in err
    assert err.count("\n      1     ") == 4


def test_wrong_names_and_parameters_are_one_line(medrl):
    answer = medrl("env", "play", "kspace.line")
    assert (answer.code, "did you mean 'kspace.lines'?" in answer.err) == (2, True)
    answer = medrl("env", "play", "kspace.lines", "--set", "sise=16")
    assert (answer.code, "unknown parameter 'sise', did you mean" in answer.err) == (2, True)
    answer = medrl("env", "play", "kspace.lines", "--set", "size=abc")
    assert (answer.code, "--set size=abc: expected a value like 32" in answer.err) == (2, True)
    answer = medrl("env", "check", "--set", "size=16")
    assert (answer.code, "name it" in answer.err) == (2, True)


def test_a_broken_environment_is_exit_code_5(medrl, monkeypatch):
    from medrl.plugins.kspace.env import KSpaceEnv

    step = KSpaceEnv.step

    def wrong(self, actions):
        observation, reward, *rest = step(self, actions)
        return observation, reward * float("nan"), *rest

    monkeypatch.setattr(KSpaceEnv, "step", wrong)
    answer = medrl("env", "check", "kspace.lines", *SMALL)
    assert (answer.code, "rewards are not finite" in answer.err) == (5, True)
