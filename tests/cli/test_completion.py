import pytest


@pytest.fixture
def complete(medrl_process):
    """Ask for completions as bash does; the last word is the incomplete one."""

    def call(*words: str) -> list[str]:
        answer = medrl_process(
            _MEDRL_COMPLETE="bash_complete",
            COMP_WORDS=" ".join(["medrl", *words]),
            COMP_CWORD=str(len(words)),
        )
        return [line.partition(",")[2] for line in answer.out.splitlines()]

    return call


def test_commands_and_methods_are_completed(complete):
    assert complete("tra") == ["train"]
    assert "toy" in complete("to")
    assert complete("data", "ch") == ["check"]


def test_methods_are_completed_after_train(complete):
    assert complete("train", "t") == ["toy"]


def test_options_of_the_method_are_completed(complete):
    assert "--mode" in complete("train", "toy", "--mo")
    assert "--mode" not in complete("train", "graft", "--mo")


def test_presets_and_config_keys_are_completed(complete):
    assert complete("train", "toy", "--preset", "s") == ["smoke"]
    assert complete("train", "toy", "--set", "policy.m") == ["policy.mode="]


def test_registry_keys_are_completed(complete):
    assert complete("train", "toy", "--set", "model.name=toy.c") == ["model.name=toy.curve"]


def test_runs_are_completed(complete, medrl):
    medrl("train", "toy", "-o", "runs/one")
    assert complete("runs", "show", "ru") == ["runs/one"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_is_printed(medrl, shell):
    answer = medrl("completion", shell)
    assert answer.code == 0
    assert f"_MEDRL_COMPLETE={shell}_complete" in answer.out
