import json


def test_methods_are_listed_with_the_broken_ones(medrl):
    facts = {item["name"]: item for item in json.loads(medrl("methods", "--json").out)}
    assert facts["toy"]["commands"] == ["train", "predict", "demo"]
    assert facts["wreck"]["summary"].startswith("broken: ")
    assert "count steps" in medrl("methods").err


def test_one_method_is_shown_with_presets_tools_and_parts(medrl):
    facts = json.loads(medrl("methods", "toy", "--json").out)
    assert facts["presets"] == ["smoke"]
    assert facts["tools"] == ["shout"]
    assert facts["parts"] == {"models": {"toy.curve": "two weights", "toy.line": "one weight"}}
    err = medrl("methods", "toy").err
    assert "toy.curve" in err
    assert "medrl toy shout" in err


def test_an_unknown_method_gives_the_nearest(medrl):
    answer = medrl("methods", "tooy")
    assert (answer.code, "did you mean 'toy'?" in answer.err) == (5, True)


def test_plugins_are_listed_with_status_package_and_reason(medrl):
    facts = {item["name"]: item for item in json.loads(medrl("plugins", "list", "--json").out)}
    assert facts["toy"]["status"] == "loaded"
    assert facts["toy"]["distribution"] == "medrl-toy"
    assert facts["toy"]["origin"] == "third-party"
    assert facts["graft"]["origin"] == "bundled"
    assert facts["wreck"]["status"] == "broken"
    assert "wreckage" in facts["wreck"]["reason"]
    assert medrl("plugins", "list").code == 0


def test_info_shows_the_file_of_a_plugin(medrl):
    facts = json.loads(medrl("plugins", "info", "toy", "--json").out)
    assert facts["file"].endswith("medrl_toy/plugin.py")
    assert "toy.line" in medrl("plugins", "info", "toy").err
    assert "medrl_toy.plugin" in medrl("plugins", "info", "toy").err


def test_info_of_an_unknown_plugin_gives_the_nearest(medrl):
    answer = medrl("plugins", "info", "tooy")
    assert (answer.code, "did you mean 'toy'?" in answer.err) == (5, True)


def test_tools_of_a_method_are_commands_and_receive_the_plugin_manager(medrl):
    word, known = medrl("toy", "shout", "--word", "ho").out.split()
    assert word == "HO"
    assert {"graft", "toy", "wreck"} <= set(known.split(","))
    out = medrl("toy").out
    assert "shout  Say a word loudly." in out
    assert "medrl train toy" in out


def test_a_wrong_tool_gives_the_nearest(medrl):
    answer = medrl("toy", "shot")
    assert (answer.code, "did you mean 'shout'?" in answer.err) == (2, True)
